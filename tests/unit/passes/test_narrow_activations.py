"""What is 16 bits wide between the kernels of a device that takes it so, and what stays float32."""

import json
from dataclasses import replace

import pytest
from tvm import relax

from mlcgen import passes
from mlcgen.formats import BF16, F16, Q4, Q8
from mlcgen.models.layers import export
from mlcgen.models.rope import Rope
from mlcgen.passes.narrow_activations import narrow_activations
from mlcgen.passes.rewrite import bindings, is_op
from mlcgen.targets import resolve
from mlcgen.targets.base import Linear
from mlcgen.targets.device_kernel import KEY

SIZE = 64


@pytest.fixture
def cuda(tools):
    return replace(tools, target=resolve("cuda:sm_80"))


def model(cuda, **formats):
    """The tiny model after all passes; formats: by a part of the weight's name, `rest` for all others."""
    rope = Rope(tuple(10000.0 ** (-i / 32) for i in range(32)))
    config = cuda.config(hidden_size=SIZE, intermediate_size=96, head_dim=64, rope=rope)
    mod, _ = export(config)
    sources = cuda.sources(mod, formats["rest"])
    for part, fmt in formats.items():
        sources |= {name: replace(source, fmt=fmt) for name, source in sources.items() if part in name}
    options = passes.PassOptions(sources, cuda.layout(config, 16, "float16"), {})
    return cuda.apply(mod, passes.model_pipeline(cuda.target, options))


def kernels(mod):
    """(name, type of each result) of each call of a kernel, in order."""
    calls = [value for value in bindings(mod).values() if is_op(value, "relax.call_tir") or _is_in_place(value)]
    return [
        (json.loads(str(attrs[KEY]))[0], [str(ty.dtype) for ty in _results(call)])
        for call in calls
        if (attrs := mod[call.args[0]].attrs) and KEY in attrs
    ]


def _is_in_place(value):
    return is_op(value, "relax.call_tir_inplace")


def _results(call):
    return list(call.ty.fields) if isinstance(call.ty, relax.TupleType) else [call.ty]


def types(mod):
    """Type of each kernel's first result, in order."""
    return [(name, dtypes[0]) for name, dtypes in kernels(mod)]


def layer(fmt, half):
    return [
        (f"linear_{fmt}_norm", half),  # queries, keys and values
        ("rope_attention", half),
        (f"linear_{fmt}_residual", "float32"),
        (f"linear_{fmt}_norm_swiglu", half),
        (f"linear_{fmt}_residual", "float32"),
    ]


@pytest.mark.parametrize(("fmt", "half"), [(Q4, "float16"), (Q8, "float16"), (F16, "float16"), (BF16, "bfloat16")])
def test_a_model(cuda, fmt, half):
    mod = model(cuda, rest=fmt)
    ends = (f"embedding_{fmt.name}", "float32"), (f"linear_{fmt.name}_norm", "float32")
    assert types(mod) == [ends[0], *layer(fmt.name, half), *layer(fmt.name, half), ends[1]]


def test_kernels_declare_the_types_that_they_are_given(cuda):
    mod = model(cuda, rest=F16)
    for value in bindings(mod).values():
        if not (is_op(value, "relax.call_tir") or _is_in_place(value)):
            continue
        given = [str(arg.ty.dtype) for arg in value.args[1].fields]
        results = [str(ty.dtype) for ty in _results(value)]
        if _is_in_place(value):
            results = [ty for ty, i in zip(results, value.attrs.inplace_indices, strict=True) if int(i) < 0]
        assert [str(param.ty.dtype) for param in mod[value.args[0]].params] == given + results


def test_pages_keep_their_type(cuda):
    appended = [dtypes for name, dtypes in kernels(model(cuda, rest=BF16)) if name == "rope_attention"]
    assert appended == 2 * [["bfloat16", "float16"]]


def test_what_a_product_in_another_type_reads_is_of_that_type(cuda):
    """Gated activations for a matrix in bfloat16 among others in float16."""
    found = types(model(cuda, rest=F16, down_proj=BF16))
    assert found.count(("linear_f16_norm_swiglu", "bfloat16")) == 2
    assert ("rope_attention", "float16") in found


def test_the_cpu_keeps_float32(tools):
    mod, _ = export(tools.config())
    options = passes.PassOptions(tools.sources(mod, F16), tools.layout(tools.config()), {})
    before = tools.apply(mod, passes.model_pipeline(tools.target, options)[:-1])
    assert narrow_activations(before, tools.target, "float16") is before


def products(cuda, *after, fmt=F16, second=None):
    """x -> product -> [after...] -> product; `after` operators are emitted and read by the second product, or, if they
    come as (operator,), read by nothing but the result."""

    def body(builder, x, *weights):
        def call(fmt, x, weight):
            kernel = cuda.target.kernels.linear(Linear(fmt, SIZE, SIZE))
            return cuda.call_kernel(builder, kernel, [x, weight], relax.TensorType((cuda.n, SIZE), "float32"))

        hidden = call(fmt, x, weights[0])
        value, others = hidden, []
        for operator in after:
            if isinstance(operator, tuple):
                others.append(builder.emit(operator[0](value)))
            else:
                value = builder.emit(operator(value))
        out = call(second or fmt, value, weights[1])
        for other in others:
            out = builder.emit(relax.op.add(out, builder.emit(relax.op.reshape(other, (cuda.n, SIZE)))))
        return out

    weights = [
        cuda.var(f.name + str(i), *f.parts(SIZE, SIZE)[0][1], dtype=f.dtype) for i, f in enumerate((fmt, second or fmt))
    ]
    mod = cuda.forward([cuda.var("x", cuda.n, SIZE), *weights], body)
    narrowed = narrow_activations(mod, cuda.target, "float16")
    relax.analysis.well_formed(narrowed)  # it raises
    return [dtypes[0] for _, dtypes in kernels(narrowed)]


def to(cuda, *shape):
    return lambda x: relax.op.reshape(x, shape)


def test_a_value_between_two_kernels(cuda):
    assert products(cuda) == ["float16", "float32"]


def test_under_another_shape(cuda):
    assert products(cuda, to(cuda, cuda.n, 2, 32), to(cuda, cuda.n, SIZE)) == ["float16", "float32"]


@pytest.mark.parametrize("operator", [relax.op.nn.silu, relax.op.exp], ids=["silu", "exp"])
def test_what_a_plain_operator_reads(cuda, operator):
    """Also where kernels read it too, or where the operator sees it under another shape."""
    assert products(cuda, operator) == ["float32", "float32"]
    assert products(cuda, (operator,)) == ["float32", "float32"]
    assert products(cuda, to(cuda, cuda.n, 2, 32), (operator,), to(cuda, cuda.n, SIZE)) == ["float32", "float32"]


def test_the_type_that_the_reader_takes(cuda):
    assert products(cuda, second=BF16) == ["bfloat16", "float32"]
    assert products(cuda, fmt=BF16) == ["bfloat16", "float32"]


def test_readers_that_agree_on_nothing(cuda):
    """One value, read by a product in float16 and one in bfloat16."""

    def body(builder, x, *weights):
        def call(fmt, x, weight):
            kernel = cuda.target.kernels.linear(Linear(fmt, SIZE, SIZE))
            return cuda.call_kernel(builder, kernel, [x, weight], relax.TensorType((cuda.n, SIZE), "float32"))

        hidden = call(F16, x, weights[0])
        return relax.op.add(call(F16, hidden, weights[1]), call(BF16, hidden, weights[2]))

    weights = [cuda.var(f"w{i}", *F16.parts(SIZE, SIZE)[0][1], dtype=f.dtype) for i, f in enumerate((F16, F16, BF16))]
    mod = cuda.forward([cuda.var("x", cuda.n, SIZE), *weights], body)
    assert types(narrow_activations(mod, cuda.target, "float16")) == 2 * [("linear_f16", "float32")] + [
        ("linear_bf16", "float32")
    ]


def test_the_function_returns_float32(cuda):
    """Logits are the caller's: no kernel reads them. Here no other variable stands for them."""

    def body(builder, x, weight):
        kernel = cuda.target.kernels.linear(Linear(F16, SIZE, SIZE))
        gv = builder.add_func(kernel.without_attr("global_symbol"), "linear")
        return relax.call_tir(gv, [x, weight], relax.TensorType((cuda.n, SIZE), "float32"))

    weight = cuda.var("weight", *F16.parts(SIZE, SIZE)[0][1], dtype="float16")
    mod = cuda.forward([cuda.var("x", cuda.n, SIZE), weight], body)
    assert types(narrow_activations(mod, cuda.target, "float16")) == [("linear_f16", "float32")]

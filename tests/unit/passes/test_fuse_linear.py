from dataclasses import replace

import numpy as np
import pytest
from tvm import relax

from mlcgen.formats import BF16, F16, F32, Q4, Q8, grouped
from mlcgen.passes.fuse_linear import LINEAR, fuse_linear
from mlcgen.passes.packing import dequantize
from mlcgen.passes.quantize import FORMAT
from mlcgen.passes.rewrite import bindings, is_op
from mlcgen.targets import resolve
from mlcgen.targets.base import Linear

ROWS, COLUMNS = 20, 64
FORMATS = [F32, F16, BF16, Q8, Q4, grouped(8, 16), grouped(4, has_minimum=True), grouped(8, has_minimum=True)]
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=[fmt.name for fmt in FORMATS])


def params(tools, fmt, first, *more):
    return [first, *(tools.var(name, *shape, dtype=dtype) for name, shape, dtype in fmt.parts(ROWS, COLUMNS)), *more]


def rows(tools, name="x"):
    return tools.var(name, tools.n, COLUMNS)


def decode(builder, fmt, parts, marked=True, n=ROWS, k=COLUMNS):
    attrs = {FORMAT: fmt.name} if marked else {}
    return builder.emit_te(
        lambda *p: dequantize(fmt, n, k, p), *parts, primfunc_name_hint="dequantize", primfunc_attrs=attrs
    )


def product(tools, fmt, bias=False, marked=True):
    def body(builder, x, *parts):
        *parts, b = [*parts] if bias else [*parts, None]
        return tools.linear(builder, x, decode(builder, fmt, parts, marked), b)

    return tools.forward(params(tools, fmt, rows(tools), *([tools.var("bias", ROWS)] if bias else [])), body)


def lookup(tools, fmt):
    def body(builder, ids, *parts):
        return relax.op.take(decode(builder, fmt, parts), ids, axis=0)

    return tools.forward(params(tools, fmt, tools.var("ids", tools.n, dtype="int32")), body)


def fuse(tools, mod, fmt):
    return fuse_linear(mod, {fmt.name: fmt}, tools.target)


def canonical(mod):
    return relax.transform.CanonicalizeBindings()(mod)


@pytest.mark.parametrize("bias", [False, True])
@every_format
def test_product_becomes_one_kernel(tools, fmt, bias):
    def body(builder, x, *stored):
        kernel = tools.target.kernels.linear(Linear(fmt, ROWS, COLUMNS, has_bias=bias)).with_attr(LINEAR, fmt.name)
        if bias:  # the product without its bias took the name first
            kernel = kernel.with_attr("global_symbol", f"{kernel.attrs['global_symbol']}1")
        return tools.call_kernel(builder, kernel, [x, *stored], relax.TensorType((tools.n, ROWS), "float32"))

    last = [tools.var("bias", ROWS)] if bias else []
    expected = tools.forward(params(tools, fmt, rows(tools), *last), body)
    tools.same(canonical(fuse(tools, product(tools, fmt, bias), fmt)), canonical(expected))


def test_lookup_becomes_one_kernel(tools):
    def body(builder, ids, *parts):
        kernel = tools.target.kernels.embedding(Q8, ROWS, COLUMNS)
        return tools.call_kernel(builder, kernel, [ids, *parts], relax.TensorType((tools.n, COLUMNS), "float32"))

    expected = tools.forward(params(tools, Q8, tools.var("ids", tools.n, dtype="int32")), body)
    tools.same(canonical(fuse(tools, lookup(tools, Q8), Q8)), canonical(expected))


def test_a_matrix_in_plain_floats_stays(tools):
    weight = tools.var("w", ROWS, COLUMNS)
    mod = tools.forward([rows(tools), weight], lambda builder, x, w: tools.linear(builder, x, w))
    tools.same(canonical(fuse(tools, mod, Q8)), canonical(mod))


def test_a_kernel_without_the_mark_stays(tools):
    """The attribute counts, not the name `dequantize`."""
    mod = product(tools, Q8, marked=False)
    tools.same(canonical(fuse(tools, mod, Q8)), canonical(mod))


@pytest.mark.parametrize("residual_first", [False, True])
def test_a_residual_addition_joins_its_product(tools, residual_first):
    def body(builder, x, residual, *parts):
        out = tools.linear(builder, x, decode(builder, Q8, parts))
        return relax.op.add(*((residual, out) if residual_first else (out, residual)))

    residual = tools.var("residual", tools.n, ROWS)
    first, *stored = params(tools, Q8, rows(tools))
    after = fuse(tools, tools.forward([first, residual, *stored], body, 2), Q8)
    assert tools.ops(after) == ["linear_q8_residual"]


def surrounded(tools):
    """silu(norm(x) U^T) * (norm(x) V^T) W^T + bias + x, U and V stacked: all that one kernel may hold, in two."""

    def body(builder, x, norm_weight, *params):
        up, down, bias = params[: len(params) // 2], params[len(params) // 2 : -1], params[-1]
        normed = builder.emit(relax.op.nn.rms_norm(x, norm_weight, [-1], 1e-5))
        split = builder.emit(relax.op.split(tools.linear(builder, normed, decode(builder, F32, up, n=2 * ROWS)), 2, 1))
        gate, value = (builder.emit(relax.TupleGetItem(split, i)) for i in range(2))
        gated = builder.emit(relax.op.multiply(builder.emit(relax.op.nn.silu(gate)), value))
        out = tools.linear(builder, gated, decode(builder, F32, down, n=COLUMNS, k=ROWS), bias)
        return relax.op.add(x, out)

    stored = [("up", 2 * ROWS, COLUMNS), ("down", COLUMNS, ROWS)]
    matrices = [tools.var(name, *F32.parts(n, k)[0][1]) for name, n, k in stored]
    return tools.forward([rows(tools), tools.var("norm", COLUMNS), *matrices, tools.var("bias", COLUMNS)], body)


def test_norm_gate_bias_and_residual_join_their_products(tools, rng):
    mod = surrounded(tools)
    after = fuse(tools, mod, F32)
    assert tools.ops(after) == ["linear_f32_norm", "linear_f32_gated_residual"]
    shapes = [(5, COLUMNS), (COLUMNS,), (3, COLUMNS, 16), (4, ROWS, 16), (COLUMNS,)]
    arrays = [rng.normal(0, 0.3, size=shape).astype("f4") for shape in shapes]
    np.testing.assert_allclose(tools.run(after, *arrays), tools.run(mod, *arrays), rtol=1e-3, atol=1e-3)


def test_a_norm_that_others_read_too_stays_for_them(tools):
    def body(builder, x, weight, *parts):
        normed = builder.emit(relax.op.nn.rms_norm(x, weight, [-1], 1e-5))
        return relax.op.add(tools.linear(builder, normed, decode(builder, Q8, parts, n=COLUMNS)), normed)

    stored = [tools.var(name, *shape, dtype=dtype) for name, shape, dtype in Q8.parts(COLUMNS, COLUMNS)]
    after = fuse(tools, tools.forward([rows(tools), tools.var("weight", COLUMNS), *stored], body), Q8)
    assert tools.ops(after) == ["nn.rms_norm", "linear_q8_norm_residual"]


def test_a_product_with_a_bias_that_others_read_too(tools, rng):
    def body(builder, x, *parts):
        *parts, bias = parts
        out = tools.linear(builder, x, decode(builder, F32, parts))
        return relax.op.multiply(builder.emit(relax.op.add(out, bias)), out)

    mod = tools.forward(params(tools, F32, rows(tools), tools.var("bias", ROWS)), body)
    arrays = [rng.normal(size=(5, COLUMNS)).astype("f4"), *stored(F32, rng), rng.normal(size=ROWS).astype("f4")]
    np.testing.assert_allclose(tools.run(fuse(tools, mod, F32), *arrays), tools.run(mod, *arrays), rtol=1e-3, atol=1e-3)


def stored(fmt, rng):
    """Any parts at all: what they mean does not matter here."""
    arrays = []
    for _, shape, dtype in fmt.parts(ROWS, COLUMNS):
        if fmt is BF16:
            arrays.append((rng.normal(size=shape).astype("f4").view("u4") >> 16).astype("u2"))
        elif dtype == "uint8":
            arrays.append(rng.integers(0, 256, shape, dtype="u1"))
        else:
            arrays.append(rng.normal(0, 0.1, size=shape).astype(dtype))
    return arrays


@every_format
def test_same_result(tools, rng, fmt):
    x, parts, bias = rng.normal(size=(5, COLUMNS)).astype("f4"), stored(fmt, rng), rng.normal(size=ROWS).astype("f4")
    before = product(tools, fmt, bias=True)
    plain = tools.run(before, x, *parts, bias)
    fused = tools.run(fuse(tools, before, fmt), x, *parts, bias)
    # Kernels may round the activations of grouped formats to 8 bits.
    limit = 0.02 if fmt.is_grouped else 1e-5
    assert np.linalg.norm(fused - plain) / np.linalg.norm(plain) < limit


@every_format
def test_same_rows(tools, rng, fmt):
    ids, parts = np.array([0, 19, 16, 3], "i4"), stored(fmt, rng)
    before = lookup(tools, fmt)
    plain, fused = (tools.run(mod, ids, *parts) for mod in (before, fuse(tools, before, fmt)))
    np.testing.assert_allclose(fused, plain, rtol=1e-4, atol=1e-5)


# A target whose products end with the gate, where others begin with it.


@pytest.fixture
def cuda(tools):
    return replace(tools, target=resolve("cuda:sm_80"))


def gated(tools, width, bias=False, others=False):
    """(silu(gate) * up) W^T, gate and up (n, width) being one product's halves; others: the gate is the result too."""

    def body(builder, x, up, down, *biases):
        both = tools.linear(builder, x, decode(builder, Q8, up, n=2 * width), *biases)
        split = builder.emit(relax.op.split(both, 2, 1))
        gate, value = (builder.emit(relax.TupleGetItem(split, i)) for i in range(2))
        hidden = builder.emit(relax.op.multiply(builder.emit(relax.op.nn.silu(gate)), value))
        out = tools.linear(builder, hidden, decode(builder, F16, [down], n=width, k=width))
        return relax.op.multiply(out, gate) if others else out

    up, scale = (tools.var(name, *shape, dtype=dtype) for name, shape, dtype in Q8.parts(2 * width, COLUMNS))
    down = tools.var("down", *F16.parts(width, width)[0][1], dtype="float16")
    biases = [tools.var("bias", 2 * width)] if bias else []

    def of_parts(builder, x, up, scale, down, *biases):
        return body(builder, x, [up, scale], down, *biases)

    return tools.forward([rows(tools), up, scale, down, *biases], of_parts)


def kernel_args(mod, name):
    """Names of the parameters of the kernel, and of what `forward` gives it."""
    call = next(v for v in bindings(mod).values() if is_op(v, "relax.call_tir") and v.args[0].name_hint == name)
    return [p.name for p in mod[name].params], [arg.name for arg in call.args[1].fields]


FUSED = {"q8": Q8, "f16": F16}


@pytest.mark.parametrize("width", [16, 48])
def test_the_gate_ends_the_product_before(cuda, width):
    after = fuse_linear(gated(cuda, width), FUSED, cuda.target)
    assert cuda.ops(after) == ["linear_q8_swiglu", "linear_f16"]
    assert next(iter(bindings(after).values())).ty.shape[1] == width
    spec = Linear(Q8, 2 * width, COLUMNS, gates_result=True)
    expected = cuda.target.kernels.linear(spec).with_attr(LINEAR, "q8").without_attr("global_symbol")
    cuda.same(after["linear_q8_swiglu"], expected)


def test_the_gate_begins_the_product_after_on_a_cpu(tools):
    assert tools.ops(fuse_linear(gated(tools, 16), FUSED, tools.target)) == ["linear_q8", "linear_f16_gated"]


@pytest.mark.parametrize("width", [8, 20, 40])
def test_gates_that_do_not_fill_blocks_of_rows_stay(cuda, width):
    plain = ["linear_q8", "split", "nn.silu", "multiply", "linear_f16"]
    assert cuda.ops(fuse_linear(gated(cuda, width), FUSED, cuda.target)) == plain


def test_a_bias_comes_before_the_gate(cuda):
    """It is as wide as the product, twice the gate's width."""
    after = fuse_linear(gated(cuda, 16, bias=True), FUSED, cuda.target)
    assert cuda.ops(after) == ["linear_q8_swiglu", "linear_f16"]
    given = kernel_args(after, "linear_q8_swiglu")
    assert given == (["x", "w", "scale", "bias", "out"], ["x", "w", "scale", "bias"])
    param = after["linear_q8_swiglu"].params[3]
    assert [int(size) for size in param.ty.shape] == [32]


def test_a_gate_that_others_read_too(cuda):
    """Then the product is computed for them once more, without the gate."""
    after = fuse_linear(gated(cuda, 16, others=True), FUSED, cuda.target)
    assert cuda.ops(after) == ["linear_q8", "split", "linear_q8_swiglu", "linear_f16", "multiply"]


def test_norm_gate_and_residual_of_a_device(cuda):
    def body(builder, x, norm, up, down):
        normed = builder.emit(relax.op.nn.rms_norm(x, norm, [-1], 1e-5))
        both = cuda.linear(builder, normed, decode(builder, F16, [up], n=64))
        split = builder.emit(relax.op.split(both, 2, 1))
        gate, value = (builder.emit(relax.TupleGetItem(split, i)) for i in range(2))
        hidden = builder.emit(relax.op.multiply(builder.emit(relax.op.nn.silu(gate)), value))
        return relax.op.add(cuda.linear(builder, hidden, decode(builder, F16, [down], n=COLUMNS, k=32)), x)

    matrices = [
        cuda.var(name, *F16.parts(n, k)[0][1], dtype="float16")
        for name, n, k in (("up", 64, COLUMNS), ("down", COLUMNS, 32))
    ]
    after = fuse_linear(cuda.forward([rows(cuda), cuda.var("norm", COLUMNS), *matrices], body), FUSED, cuda.target)
    assert cuda.ops(after) == ["linear_f16_norm_swiglu", "linear_f16_residual"]
    assert kernel_args(after, "linear_f16_norm_swiglu") == (["x", "norm", "w", "out"], ["x", "norm", "up"])
    assert kernel_args(after, "linear_f16_residual")[1][-1] == "x"

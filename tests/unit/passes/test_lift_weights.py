import numpy as np
import pytest
from tvm import relax

from mlcgen.formats import Q8, grouped
from mlcgen.models.layers import export
from mlcgen.passes import PassOptions, model_pipeline
from mlcgen.passes.lift_weights import WeightTransform, lift_weights
from mlcgen.passes.quantize import WeightSource

SIZE = 32


def doubled_twice(tools):
    """x (2 a)^T (2 b)^T + c: the same transform of two weights, and one that is stored as it is."""

    def body(builder, x, a, b, c):
        for weight in (a, b):
            x = tools.linear(builder, x, builder.emit(relax.op.add(weight, weight), "sum"))
        return relax.op.add(x, c)

    weights = [tools.var(f"m.{name}.weight", SIZE, SIZE) for name in "ab"]
    return tools.forward([tools.var("x", tools.n, SIZE), *weights, tools.var("m.c.weight", SIZE)], body)


def products(tools):
    def body(builder, x, a, b, c):
        for stored in (a, b):
            x = builder.emit(relax.op.matmul(x, stored))
        return relax.op.add(x, c)

    weights = [tools.var(name, SIZE, SIZE) for name in "ab"]
    return tools.forward([tools.var("x", tools.n, SIZE), *weights, tools.var("c", SIZE)], body)


def transform(tools):
    def weight_side(builder, weight):
        return builder.emit(relax.op.permute_dims(builder.emit(relax.op.add(weight, weight))))

    builder, weight = relax.BlockBuilder(), tools.var("weight", SIZE, SIZE)
    with builder.function("transform_0", [weight]):
        builder.emit_func_output(relax.Tuple([weight_side(builder, weight)]))
    return builder.get()


def test_the_function_splits_at_the_weights(tools):
    lifted = lift_weights(doubled_twice(tools))
    tools.same(lifted.forward, products(tools))
    tools.same(relax.transform.CanonicalizeBindings()(lifted.transform_module), transform(tools))
    assert [p.name for p in lifted.forward["forward"].params[1:]] == lifted.weights
    assert [(t.function, t.sources) for t in lifted.transforms] == [
        ("transform_0", ("m.a.weight",)),
        ("transform_0", ("m.b.weight",)),
        (None, ("m.c.weight",)),
    ]
    assert lifted.transforms[-1] == WeightTransform(None, ("m.c.weight",), ("m.c.weight",))


def test_without_computed_weights_nothing_moves(tools):
    mod = products(tools)
    lifted = lift_weights(mod)
    tools.same(lifted.forward, mod)
    assert [t.function for t in lifted.transforms] == [None] * 3


def optimised(tools, config, fmt, in_groups=False):
    mod, _ = export(config)
    sources = {name: WeightSource(name, fmt, in_groups) for name in tools.sources(mod)}
    return tools.apply(mod, model_pipeline(tools.target, PassOptions(sources, tools.layout(config), {})))


@pytest.mark.parametrize("fmt", [Q8, grouped(4, has_minimum=True)], ids=["q8", "q4m in groups"])
def test_stored_names_of_a_model(tools, fmt):
    lifted = lift_weights(optimised(tools, tools.config("qwen2"), fmt, fmt.has_minimum))
    parts = [".w", ".scale", ".minimum"][: 2 + fmt.has_minimum]
    names = set(lifted.weights)
    assert len(names) == len(lifted.weights)
    for stem in ("self_attn.q_proj+k_proj+v_proj", "mlp.gate_proj+up_proj", "mlp.down_proj", "self_attn.o_proj"):
        assert {f"model.layers.1.{stem}.weight{part}" for part in parts} <= names
    assert "model.layers.0.input_layernorm.weight" in names
    assert sum(len(t.outputs) for t in lifted.transforms) == len(names)
    # The two layers share their transforms.
    functions = {t.function for t in lifted.transforms if t.function}
    assert len(functions) == len(
        [f for f in lifted.transform_module.functions.values() if isinstance(f, relax.Function)]
    )
    assert len(functions) < sum(t.function is not None for t in lifted.transforms)


def test_stored_names_without_a_prefix(tools):
    lifted = lift_weights(optimised(tools, tools.config(num_layers=1), Q8))
    assert {"lm_head.weight.w", "lm_head.weight.scale"} <= set(lifted.weights)


def test_same_result(tools, rng):
    before = doubled_twice(tools)
    lifted = lift_weights(before)
    x, *weights = [rng.normal(size=s).astype("f4") for s in [(5, SIZE), (SIZE, SIZE), (SIZE, SIZE), (SIZE,)]]
    named = dict(zip(("m.a.weight", "m.b.weight", "m.c.weight"), weights, strict=True))
    vm, stored = tools.build(lifted.transform_module), {}
    for step in lifted.transforms:
        sources = [named[name] for name in step.sources]
        found = tools.call(vm, *sources, function=step.function) if step.function else sources
        stored.update(zip(step.outputs, found, strict=True))
    after = tools.run(lifted.forward, x, *(stored[name] for name in lifted.weights))
    np.testing.assert_allclose(after, tools.run(before, x, *weights), rtol=1e-4, atol=1e-3)

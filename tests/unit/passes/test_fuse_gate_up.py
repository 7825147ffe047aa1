import numpy as np
import pytest
from tvm import relax

from mlcgen.passes.fuse_gate_up import fuse_gate_up, gate_up_of
from mlcgen.passes.rewrite import bindings

HIDDEN, INNER = 16, 32


def always(names):
    return True


def params(tools, biases=()):
    weights = [tools.var(f"{name}_weight", INNER, HIDDEN) for name in ("gate", "up")]
    return [tools.var("x", tools.n, HIDDEN), *weights, *(tools.var(f"{b}_bias", INNER) for b in biases)]


def swiglu(tools, biases=(), activation=relax.op.nn.silu, twice=False, other_input=False):
    def body(builder, x, gate_weight, up_weight, *bias):
        named = dict(zip(biases, bias, strict=True))
        gate = tools.linear(builder, x, gate_weight, named.get("gate"))
        activated = builder.emit(activation(gate))
        other = builder.emit(relax.op.add(x, x)) if other_input else x
        up = gate if twice else tools.linear(builder, other, up_weight, named.get("up"))
        return relax.op.multiply(activated, up)

    return tools.forward(params(tools, biases), body)


def fused(tools, biases=()):
    def body(builder, x, gate_weight, up_weight, *bias):
        weight = builder.emit(relax.op.concat([gate_weight, up_weight], axis=0))
        out = builder.emit(relax.op.matmul(x, builder.emit(relax.op.permute_dims(weight))))
        if biases:
            out = builder.emit(relax.op.add(out, builder.emit(relax.op.concat(list(bias), axis=0))))
        split = builder.emit(relax.op.split(out, [INNER], axis=1))
        activated = builder.emit(relax.op.nn.silu(builder.emit(relax.TupleGetItem(split, 0))))
        return relax.op.multiply(activated, builder.emit(relax.TupleGetItem(split, 1)))

    return tools.forward(params(tools, biases), body)


def unbound(mod):
    """Without the variable that a hand-written module binds its kernel's result to."""
    return relax.transform.CanonicalizeBindings()(mod)


@pytest.mark.parametrize("biases", [(), ("gate", "up")])
def test_two_projections_become_one(tools, biases):
    found = fuse_gate_up(swiglu(tools, biases), always)
    tools.same(unbound(found), unbound(fused(tools, biases)))


@pytest.mark.parametrize(
    "change",
    [{"biases": ("gate",)}, {"activation": relax.op.nn.gelu}, {"twice": True}, {"other_input": True}],
    ids=["mixed bias", "another activation", "silu(g) * g", "different inputs"],
)
def test_stays(tools, change):
    before = swiglu(tools, **change)
    after = fuse_gate_up(before, always)
    tools.same(after, before)


@pytest.mark.parametrize("swapped", [False, True])
def test_gate_up_of(tools, swapped):
    """silu(first half) * second half is a gate; the other way round it is not."""

    def body(builder, x):
        split = builder.emit(relax.op.split(x, 2, axis=1))
        gate, up = (builder.emit(relax.TupleGetItem(split, i)) for i in ((1, 0) if swapped else (0, 1)))
        return relax.op.multiply(builder.emit(relax.op.nn.silu(gate)), up)

    mod = tools.forward([tools.var("x", tools.n, 2 * INNER)], body)
    values = bindings(mod)
    found = gate_up_of(lambda expr: values.get(expr, expr), values[mod["forward"].body.body])
    assert found is None if swapped else found.same_as(mod["forward"].params[0])


def test_formats_that_cannot_stack_stay(tools):
    tools.same(fuse_gate_up(swiglu(tools), lambda names: False), swiglu(tools))


@pytest.mark.parametrize("biases", [(), ("gate", "up")])
def test_same_result(tools, rng, biases):
    before = swiglu(tools, biases)
    shapes = [(5, HIDDEN), (INNER, HIDDEN), (INNER, HIDDEN), *((INNER,) for _ in biases)]
    arrays = [rng.normal(size=shape).astype("f4") for shape in shapes]
    after = fuse_gate_up(before, always)
    np.testing.assert_allclose(tools.run(after, *arrays), tools.run(before, *arrays), rtol=1e-4, atol=1e-5)

import numpy as np
import pytest
from tvm import relax

from mlcgen.passes.fuse_qkv import fuse_qkv

HEADS, KV_HEADS, DIM, HIDDEN = 4, 2, 16, 32
Q, KV = HEADS * DIM, KV_HEADS * DIM


def always(names):
    return True


def params(tools, biases="qkv"):
    x = tools.var("x", tools.n, HIDDEN)
    cos, sin = (tools.var(name, tools.n, DIM // 2) for name in ("cos", "sin"))
    sizes = {"q": Q, "k": KV, "v": KV}
    weights = [tools.var(f"{name}_weight", size, HIDDEN) for name, size in sizes.items()]
    return [x, cos, sin, *weights, *(tools.var(f"{b}_bias", sizes[b]) for b in biases)]


def finish(tools, builder, q, k, v, cos, sin):
    q, k, v = (tools.heads(builder, a, h, DIM) for a, h in ((q, HEADS), (k, KV_HEADS), (v, KV_HEADS)))
    q, k = (builder.emit(tools.rope(a, cos, sin)) for a in (q, k))
    return tools.attention(q, k, v)


def projected(tools, biases="qkv", other_input=False):
    """Attention over three projections of x; `other_input`: v is one of 2 x."""

    def body(builder, x, cos, sin, *weights):
        named = dict(zip(biases, weights[3:], strict=True))
        inputs = [x, x, builder.emit(relax.op.add(x, x)) if other_input else x]
        q, k, v = (
            tools.linear(builder, i, w, named.get(name)) for i, w, name in zip(inputs, weights[:3], "qkv", strict=True)
        )
        return finish(tools, builder, q, k, v, cos, sin)

    return tools.forward(params(tools, biases), body, 3)


def stacked(tools, biases):
    def body(builder, x, cos, sin, *weights):
        weight = builder.emit(relax.op.concat(list(weights[:3]), axis=0))
        out = builder.emit(relax.op.matmul(x, builder.emit(relax.op.permute_dims(weight))))
        if biases:
            out = builder.emit(relax.op.add(out, builder.emit(relax.op.concat(list(weights[3:]), axis=0))))
        split = builder.emit(relax.op.split(out, [Q, Q + KV], axis=1))
        q, k, v = (builder.emit(relax.TupleGetItem(split, i)) for i in range(3))
        return finish(tools, builder, q, k, v, cos, sin)

    return tools.forward(params(tools, biases), body, 3)


@pytest.mark.parametrize("biases", ["", "qkv"])
def test_three_projections_become_one(tools, biases):
    tools.same(fuse_qkv(projected(tools, biases), always), stacked(tools, biases))


@pytest.mark.parametrize("change", [{"other_input": True}, {"biases": "qk"}, {"biases": "v"}])
def test_different_inputs_or_mixed_bias_stay(tools, change):
    tools.same(fuse_qkv(projected(tools, **change), always), projected(tools, **change))


def test_formats_that_cannot_stack_stay(tools):
    asked = []
    tools.same(fuse_qkv(projected(tools), lambda names: asked.append(names)), projected(tools))
    assert asked == [["q_weight", "k_weight", "v_weight"]] * len(asked)
    assert asked


def test_same_result(tools, rng):
    before = projected(tools)
    arrays = [rng.normal(size=s).astype("f4") for s in [(5, HIDDEN), (5, 8), (5, 8), (Q, HIDDEN), (KV, HIDDEN)]]
    arrays += [rng.normal(size=s).astype("f4") for s in [(KV, HIDDEN), (Q,), (KV,), (KV,)]]
    plain, fused = (tools.run(tools.reference(m), *arrays) for m in (before, fuse_qkv(before, always)))
    np.testing.assert_allclose(fused, plain, rtol=1e-4, atol=1e-4)

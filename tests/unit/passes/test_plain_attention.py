import numpy as np
import pytest
from tvm import relax

from mlcgen.passes.plain_attention import plain_attention

DIM = 8


def attended(tools, heads, kv_heads):
    params = [tools.var(a, tools.n, h, DIM) for a, h in (("q", heads), ("k", kv_heads), ("v", kv_heads))]
    return tools.forward(params, lambda builder, q, k, v: tools.attention(q, k, v), 3)


def written_out(tools, heads, kv_heads):
    op = relax.op

    def body(builder, *qkv):
        emit = builder.emit
        q, k, v = (emit(op.permute_dims(x, [1, 0, 2])) for x in qkv)
        if heads != kv_heads:
            k, v = (emit(op.repeat(x, heads // kv_heads, axis=0)) for x in (k, v))
        scores = emit(op.matmul(q, emit(op.permute_dims(k, [0, 2, 1]))))
        scores = emit(op.multiply(scores, relax.const(DIM**-0.5, "float32")))
        allowed = emit(op.tril(emit(op.ones((tools.n, tools.n), "float32"))))
        below = emit(op.subtract(allowed, relax.const(1.0, "float32")))
        masked = emit(op.add(scores, emit(op.multiply(below, relax.const(1e30, "float32")))))
        out = emit(op.matmul(emit(op.nn.softmax(masked, axis=-1)), v))
        return op.permute_dims(out, [1, 0, 2])

    params = [tools.var(a, tools.n, h, DIM) for a, h in (("q", heads), ("k", kv_heads), ("v", kv_heads))]
    return tools.forward(params, body, 3)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
def test_attention_is_written_out(tools, heads, kv_heads):
    tools.same(plain_attention(attended(tools, heads, kv_heads)), written_out(tools, heads, kv_heads))


def test_other_packed_calls_stay(tools):
    def body(builder, q):
        return relax.call_pure_packed("another.attention", q, ty_args=q.ty)

    mod = tools.forward([tools.var("q", tools.n, 4, DIM)], body)
    tools.same(plain_attention(mod), mod)


@pytest.mark.parametrize(("heads", "kv_heads", "tokens"), [(4, 4, 6), (6, 2, 5), (2, 1, 1)])
def test_against_numpy(tools, rng, heads, kv_heads, tokens):
    q, k, v = (rng.normal(size=(tokens, h, DIM)).astype("f4") for h in (heads, kv_heads, kv_heads))
    found = tools.run(plain_attention(attended(tools, heads, kv_heads)), q, k, v)
    keys, values = (np.repeat(a, heads // kv_heads, axis=1) for a in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, keys) * DIM**-0.5
    weights = np.exp(np.where(np.tri(tokens, dtype=bool), scores, -np.inf))
    weights /= weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(found, np.einsum("hqk,khd->qhd", weights, values), rtol=1e-4, atol=1e-5)

import numpy as np
import pytest
from tvm import relax

from mlcgen.passes.fuse_rope import fuse_rope, write_out_rope
from mlcgen.passes.paged_attention import KvLayout, index_inputs, paged_attention, pages_type
from mlcgen.targets.base import Attention

HEADS, KV_HEADS, DIM = 4, 2, 16
SIZES = [HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM]
LAYOUT = KvLayout(KV_HEADS, DIM, 4, "float32")


def tables(tools):
    return [tools.var(name, tools.n, DIM // 2) for name in ("cos", "sin")]


def positions(tools):
    return tools.var("positions", tools.n, dtype="int32")


def split_qkv(tools, order=(0, 1, 2), other_angles=False):
    """Paged attention over the parts of one projection."""

    def body(builder, qkv, positions, cos, sin):
        ends = [SIZES[0], SIZES[0] + SIZES[1]]
        split = builder.emit(relax.op.split(qkv, ends, axis=1))
        parts = [builder.emit(relax.TupleGetItem(split, i)) for i in order]
        q, k, v = (tools.heads(builder, p, h, DIM) for p, h in zip(parts, (HEADS, KV_HEADS, KV_HEADS), strict=True))
        q = builder.emit(tools.rope(q, cos, sin))
        k = builder.emit(tools.rope(k, sin, cos) if other_angles else tools.rope(k, cos, sin))
        return tools.attention(q, k, v)

    params = [tools.var("qkv", tools.n, sum(SIZES)), positions(tools), *tables(tools)]
    return paged_attention(tools.forward(params, body, 4), LAYOUT, tools.target)


def unsplit_qkv(tools):
    def body(builder, q, positions, k, v, cos, sin):
        q, k = (builder.emit(tools.rope(a, cos, sin)) for a in (q, k))
        return tools.attention(q, k, v)

    q, k, v = (tools.var(a, tools.n, h, DIM) for a, h in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)))
    mod = tools.forward([q, positions(tools), k, v, *tables(tools)], body, 6)
    return paged_attention(mod, LAYOUT, tools.target)


def fused(tools):
    ty = pages_type(LAYOUT)

    def body(builder, qkv, positions, cos, sin, slots, table, lens, starts, masks, pages):
        kernels = tools.target.kernels
        rope_append = kernels.rope_append(HEADS, KV_HEADS, DIM, LAYOUT.page_size, LAYOUT.dtype)
        gv = builder.add_func(rope_append.without_attr("global_symbol"), "rope_append")
        q_ty = relax.TensorType((tools.n, HEADS, DIM), "float32")
        pair = builder.emit(relax.call_tir_inplace(gv, [qkv, cos, sin, slots, pages], [-1, 4], [q_ty, pages.ty]))
        q, appended = (builder.emit(relax.TupleGetItem(pair, i)) for i in range(2))
        spec = Attention(HEADS, KV_HEADS, DIM, LAYOUT.page_size, LAYOUT.dtype, DIM**-0.5, 0)
        kernel = kernels.paged_attention(spec)
        attend = builder.add_func(kernel.without_attr("global_symbol"), "paged_attention")
        return relax.call_tir(attend, [q, appended, table, lens, starts, masks, positions], q_ty)

    inputs = [tools.var("qkv", tools.n, sum(SIZES)), positions(tools), *tables(tools), *index_inputs(tools.n)]
    inputs.append(relax.Var("pages_0", ty))
    return tools.forward(inputs, body, len(inputs))


def test_rope_and_append_become_one_kernel(tools):
    tools.same(fuse_rope(split_qkv(tools), LAYOUT, tools.target), fused(tools))


@pytest.mark.parametrize(
    "change", [{"order": (0, 2, 1)}, {"other_angles": True}], ids=["parts in another order", "different angles"]
)
def test_other_splits_keep_the_plain_append(tools, change):
    ops = tools.ops(fuse_rope(split_qkv(tools, **change), LAYOUT, tools.target))
    assert "append" in ops
    assert "rope_append" not in ops
    assert "mlcgen.rope" not in ops


def test_separate_projections_keep_the_plain_append(tools):
    before = unsplit_qkv(tools)
    tools.same(fuse_rope(before, LAYOUT, tools.target), write_out_rope(before))


def test_written_out_form(tools):
    op = relax.op

    def expected(builder, x, cos, sin):
        emit = builder.emit
        halves = emit(op.split(x, 2, axis=2))
        first, second = (emit(relax.TupleGetItem(halves, i)) for i in range(2))
        turned = emit(op.concat([emit(op.negative(second)), first], axis=2))
        kept, moved = (
            emit(op.multiply(a, emit(op.expand_dims(emit(op.concat([table, table], axis=1)), 1))))
            for a, table in ((x, cos), (turned, sin))
        )
        return op.add(kept, moved)

    params = [tools.var("x", tools.n, HEADS, DIM), *tables(tools)]
    before = tools.forward(params, lambda builder, x, cos, sin: tools.rope(x, cos, sin), 3)
    tools.same(write_out_rope(before), tools.forward(params, expected, 3))


def rotate(x, cos, sin):
    a, b = np.split(x, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def angles(rng, n):
    table = rng.uniform(0, 6, (n, DIM // 2)).astype("f4")
    return np.cos(table), np.sin(table)


def test_written_out_rope_against_numpy(tools, rng):
    params = [tools.var("x", tools.n, HEADS, DIM), *tables(tools)]
    mod = tools.forward(params, lambda builder, x, cos, sin: tools.rope(x, cos, sin), 3)
    x, (cos, sin) = rng.normal(size=(5, HEADS, DIM)).astype("f4"), angles(rng, 5)
    np.testing.assert_allclose(tools.run(write_out_rope(mod), x, cos, sin), rotate(x, cos, sin), rtol=1e-5, atol=1e-6)


def test_both_forms_agree(tools, rng):
    """The fused kernel, and the plain append with rope written out: the same output and the same pages."""
    tables = rng.permutation(5)[:4].reshape(2, 2)
    step = tools.batch(tables, [0, 0], [6, 3], LAYOUT.page_size)
    step["slots"][4] = -1  # one token is not kept, nor seen: attention still reads zeros there
    qkv, (cos, sin) = rng.normal(size=(9, sum(SIZES))).astype("f4"), angles(rng, 9)
    q, k, v = (a.reshape(9, -1, DIM) for a in np.split(qkv, np.cumsum(SIZES[:2]), axis=1))
    indices = [step[name] for name in ("slots", "tables", "lens", "starts", "masks")]
    pages = [tools.tensor(np.zeros((5, 2, KV_HEADS, LAYOUT.page_size, DIM), "f4")) for _ in range(2)]
    one = fuse_rope(split_qkv(tools), LAYOUT, tools.target)
    two = fuse_rope(unsplit_qkv(tools), LAYOUT, tools.target)
    found = tools.run(one, qkv, step["positions"], cos, sin, *indices, pages[0])
    wanted = tools.run(two, q, step["positions"], k, v, cos, sin, *indices, pages[1])
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(pages[0].numpy(), pages[1].numpy(), rtol=1e-5, atol=1e-6)
    kept = step["slots"] >= 0
    slots = step["slots"][kept]
    keys = pages[0].numpy()[slots // LAYOUT.page_size, 0, :, slots % LAYOUT.page_size]
    np.testing.assert_allclose(keys, rotate(k, cos, sin)[kept], rtol=1e-5, atol=1e-6)

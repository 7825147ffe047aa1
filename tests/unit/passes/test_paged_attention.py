import ml_dtypes
import numpy as np
import pytest
import tvm
from tvm import relax

from mlcgen.models.layers import export
from mlcgen.passes.paged_attention import KvLayout, append_kernel, index_inputs, paged_attention, pages_type
from mlcgen.targets.base import Attention

HEADS, KV_HEADS, DIM = 4, 2, 16
LAYOUT = KvLayout(KV_HEADS, DIM, 4, "float32")


def params(tools):
    q = tools.var("q", tools.n, HEADS, DIM)
    return [q, tools.var("positions", tools.n, dtype="int32"), *(tools.var(a, tools.n, KV_HEADS, DIM) for a in "kv")]


def attended(tools):
    return tools.forward(params(tools), lambda builder, q, positions, k, v: tools.attention(q, k, v), 4)


def paged(tools, layout):
    ty = pages_type(layout)

    def body(builder, q, positions, k, v, slots, table, lens, starts, masks, pages):
        append = builder.add_func(append_kernel(layout).without_attr("global_symbol"), "append")
        appended = builder.emit(relax.call_tir_inplace(append, [k, v, slots, pages], 3, ty))
        spec = Attention(HEADS, KV_HEADS, DIM, layout.page_size, layout.dtype, DIM**-0.5, 0)
        kernel = tools.target.kernels.paged_attention(spec).without_attr("global_symbol")
        gv = builder.add_func(kernel, "paged_attention")
        return relax.call_tir(gv, [q, appended, table, lens, starts, masks, positions], q.ty)

    inputs = [*params(tools), *index_inputs(tools.n), relax.Var("pages_0", ty)]
    return tools.forward(inputs, body, len(inputs))


@pytest.mark.parametrize("layout", [LAYOUT, KvLayout(KV_HEADS, DIM, 16, "float16")], ids=["f32", "f16"])
def test_attention_appends_to_pages_and_reads_them(tools, layout):
    tools.same(paged_attention(attended(tools), layout, tools.target), paged(tools, layout))


def test_without_attention_only_the_inputs_change(tools):
    def body(builder, q, positions, k, v):
        return relax.op.add(k, v)

    def expected(builder, q, positions, k, v, *indices):
        return relax.op.add(k, v)

    inputs = [*params(tools), *index_inputs(tools.n)]
    found = paged_attention(tools.forward(params(tools), body, 4), LAYOUT, tools.target)
    tools.same(found, tools.forward(inputs, expected, len(inputs)))


def test_every_layer_has_its_own_pages_and_one_kernel(tools):
    mod, _ = export(tools.config(num_layers=3))
    new = paged_attention(mod, LAYOUT, tools.target)
    assert [p.name for p in new["forward"].params if p.name.startswith("pages_")] == ["pages_0", "pages_1", "pages_2"]
    assert [gv.name_hint for gv in new.functions if gv.name_hint != "forward"].count("append") == 1
    assert tools.ops(new).count("append") == tools.ops(new).count("paged_attention") == 3


def from_pages(pages, slots, size):
    """(n, kv_heads, dim) keys and values at the slots."""
    rows = pages.astype("f4")[slots // size, :, :, slots % size]
    return rows[:, 0], rows[:, 1]


@pytest.mark.parametrize(
    "dtype",
    [
        "float32",
        "float16",
        "bfloat16",
    ],
)
def test_append_writes_slots_and_skips_negative_ones(tools, rng, dtype):
    layout = KvLayout(KV_HEADS, DIM, 4, dtype)
    ty = pages_type(layout)

    def body(builder, k, v, slots, pages):
        gv = builder.add_func(append_kernel(layout).without_attr("global_symbol"), "append")
        return builder.emit(relax.call_tir_inplace(gv, [k, v, slots, pages], 3, ty))

    shapes = [tools.var(a, tools.n, KV_HEADS, DIM) for a in "kv"]
    inputs = [*shapes, tools.var("slots", tools.n, dtype="int32"), relax.Var("pages", ty)]
    k, v = (rng.normal(size=(5, KV_HEADS, DIM)).astype("f4") for _ in "kv")
    slots = np.array([7, -1, 0, 11, -5], "i4")
    cache = tools.tensor(np.full((3, 2, KV_HEADS, 4, DIM), 9, layout.storage))
    tools.run(tools.forward(inputs, body, 4), k, v, slots, cache)
    storage = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    pages = cache.numpy()
    written = slots[slots >= 0]
    for found, wanted in zip(from_pages(pages.view(storage), written, 4), (k, v), strict=True):
        np.testing.assert_array_equal(found, wanted[slots >= 0].astype(storage).astype("f4"))
    rest = np.ones((3, 4), bool)
    rest[written // 4, written % 4] = False
    assert (pages.transpose(0, 3, 1, 2, 4)[rest] == 9).all()


def kv_pages(config, count, size):
    shape = (count, 2, config.num_kv_heads, size, config.head_dim)
    return [tvm.runtime.tensor(np.zeros(shape, "f4")) for _ in range(config.num_layers)]


@pytest.mark.parametrize(("model_type", "page_size"), [("llama", 1), ("qwen2", 16)])
def test_whole_model_equals_the_reference(tools, rng, model_type, page_size):
    """A ragged prefill, a step that mixes a decode with the rest of a prompt, and one more decode."""
    config = tools.config(model_type)
    mod, _ = export(config)
    weights = tools.weights(mod, rng)
    tokens = [rng.integers(0, config.vocab_size, length).astype("i4") for length in (21, 7)]
    reference = tools.build(tools.reference(mod))
    wanted = [tools.call(reference, t, np.arange(len(t), dtype="i4"), *weights) for t in tokens]
    vm = tools.build(tools.optimised(config, tools.layout(config, page_size)))
    blocks = -(-21 // page_size)
    tables = rng.permutation(2 * blocks + 3)[: 2 * blocks].reshape(2, blocks)
    pages = kv_pages(config, 2 * blocks + 3, page_size)
    before = [0, 0]
    for counts in ([12, 6], [8, 1], [1, 0]):
        step = tools.batch(tables, before, counts, page_size)
        ids = np.concatenate([t[b : b + c] for t, b, c in zip(tokens, before, counts, strict=True)])
        rows = rng.permutation(len(ids)).astype("i4")
        indices = [step[name] for name in ("positions", "slots", "tables", "lens", "starts", "masks")]
        logits = tools.call(vm, ids, indices[0], rows, *indices[1:], *pages, *weights)
        expected = np.concatenate([w[b : b + c] for w, b, c in zip(wanted, before, counts, strict=True)])
        np.testing.assert_allclose(logits, expected[rows], rtol=1e-4, atol=1e-4)
        before = [b + c for b, c in zip(before, counts, strict=True)]

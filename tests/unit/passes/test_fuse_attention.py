"""Rotation, append and attention in one kernel, for targets that have it."""

from dataclasses import replace

import pytest
from tvm import relax

from mlcgen.passes.fuse_attention import fuse_attention
from mlcgen.passes.paged_attention import KvLayout, index_inputs, pages_type
from mlcgen.targets import resolve
from mlcgen.targets.base import Attention

HEADS, KV_HEADS, DIM = 4, 2, 64
LAYOUT = KvLayout(KV_HEADS, DIM, 16, "float16")
SPEC = Attention(HEADS, KV_HEADS, DIM, LAYOUT.page_size, LAYOUT.dtype, DIM**-0.5, 0)


@pytest.fixture
def cuda(tools):
    return replace(tools, target=resolve("cuda:sm_80"))


def forward(cuda, body):
    """body(builder, the arguments of rope_append, those of attention after queries and pages) -> the result."""
    angles = [cuda.var(name, cuda.n, DIM // 2) for name in ("cos", "sin")]
    qkv = cuda.var("qkv", cuda.n, (HEADS + 2 * KV_HEADS) * DIM)
    positions = cuda.var("positions", cuda.n, dtype="int32")
    slots, *indices = index_inputs(cuda.n)
    pages = relax.Var("pages_0", pages_type(LAYOUT))
    params = [qkv, positions, *angles, slots, *indices, pages]
    return cuda.forward(
        params, lambda builder, *_: body(builder, [qkv, *angles, slots, pages], [*indices, positions]), len(params)
    )


def out_type(cuda):
    return relax.TensorType((cuda.n, HEADS, DIM), "float32")


def in_place(cuda, builder, kernel, args):
    gv = builder.add_func(kernel.without_attr("global_symbol"), str(kernel.attrs["global_symbol"]))
    return builder.emit(relax.call_tir_inplace(gv, args, [-1, 4], [out_type(cuda), args[4].ty]))


def separate(cuda, result=lambda q, pages, out: out):
    def body(builder, rope_args, indices):
        kernels = cuda.target.kernels
        rope_append = kernels.rope_append(HEADS, KV_HEADS, DIM, LAYOUT.page_size, LAYOUT.dtype)
        pair = in_place(cuda, builder, rope_append, rope_args)
        q, pages = (builder.emit(relax.TupleGetItem(pair, i)) for i in range(2))
        out = cuda.call_kernel(builder, kernels.paged_attention(SPEC), [q, pages, *indices], out_type(cuda))
        return result(q, pages, out)

    return forward(cuda, body)


def test_two_kernels_become_one(cuda):
    def fused(builder, rope_args, indices):
        pair = in_place(cuda, builder, cuda.target.kernels.rope_attention(SPEC), [*rope_args, *indices])
        return relax.op.exp(builder.emit(relax.TupleGetItem(pair, 0)))

    before = separate(cuda, lambda q, pages, out: relax.op.exp(out))
    cuda.same(fuse_attention(before, cuda.target), forward(cuda, fused))


@pytest.mark.parametrize("read", [lambda q, pages: q, lambda q, pages: pages], ids=["queries", "pages"])
def test_what_something_else_reads_stays(cuda, read):
    before = separate(
        cuda, lambda q, pages, out: relax.op.add(out, relax.op.astype(relax.op.max(read(q, pages)), "float32"))
    )
    after = fuse_attention(before, cuda.target)
    assert cuda.ops(after)[:2] == ["rope_append", "paged_attention"]


def test_other_targets_keep_two_kernels(cuda):
    before = separate(cuda)
    assert fuse_attention(before, replace(cuda.target, turns_in_attention=False)) is before


@pytest.mark.parametrize("change", [{"window": 20}, {"scale": 0.5}, {"kv_dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("name", ["paged_attention", "rope_attention"])
def test_layers_that_differ_have_kernels_of_their_own(cuda, name, change):
    """Shapes alone do not tell them apart."""
    kernels, specs = cuda.target.kernels, [SPEC, replace(SPEC, **change)]
    placeholders = [getattr(kernels, name)(spec) for spec in specs]
    assert [kernels.device_kernel(placeholder).spec for placeholder in placeholders] == specs

"""Attention over one contiguous sequence becomes attention over KV pages for a ragged batch of sequences.

Every `mlcgen.attention(q, k, v)` turns into: append k and v to the layer's pages, in place, then attend over the
pages (PagedAttention, Kwon et al. 2023). The function gains the inputs

  slot_mapping (n,) int32           page * page_size + offset of each token
  block_table  (seqs, blocks) int32 pages of each sequence, in order
  seq_lens     (seqs,) int32        tokens in the cache after this step
  query_start  (seqs + 1,) int32    rows of each sequence among the n tokens
  tree_masks   (n,) int32           0, or of a token in a tree, which of the step's tokens it sees
  pages_<layer> (num_pages, 2, kv_heads, page_size, head_dim)

Trees of guessed tokens are verified in one step (SpecInfer, Miao et al. 2023). Let base be the tokens that a sequence
had in the cache before the step. A token with a tree mask sees the keys before base, those of its window alone where
there is one, and of its sequence's tokens in this step, at most 32, the i-th one where bit i is set; its own bit always
is. Their keys lie in the cache in the step's order, from base on, while a token's position is base plus its depth in
the tree. Tokens without a mask come before those with one, and are as ever.
"""

from dataclasses import dataclass

from tvm import IRModule, relax, tirx
from tvm.script import tirx as T  # noqa: N812

from mlcgen.models.layers import ATTENTION
from mlcgen.passes.packing import bfloat16_bits
from mlcgen.passes.rewrite import FORWARD, Rewriter, bindings, is_marked, rewrite
from mlcgen.targets.base import Attention, Target


@dataclass(frozen=True)
class KvLayout:
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: str  # float32, float16 or bfloat16

    @property
    def storage(self) -> str:
        """bfloat16 is kept as its bits."""
        return "uint16" if self.dtype == "bfloat16" else self.dtype


def paged_attention(mod: IRModule, layout: KvLayout, target: Target) -> IRModule:
    layers = sum(is_marked(value, ATTENTION) for value in bindings(mod).values())
    n = mod[FORWARD].params[0].ty.shape[0]
    slot_mapping, *indices = index_inputs(n)
    pages_ty = pages_type(layout)
    pages = [relax.Var(f"pages_{layer}", pages_ty) for layer in range(layers)]
    positions = mod[FORWARD].params[1]
    append = append_kernel(layout)

    def rule(rewriter: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        if not is_marked(value, ATTENTION):
            return None
        q, k, v = value.args[1:4]
        layer, window = int(value.args[4].value), int(value.args[6].value)
        args = [k, v, slot_mapping, pages[layer]]
        appended = rewriter.emit(relax.call_tir_inplace(rewriter.add_kernel(append), args, 3, pages_ty), "appended")
        _, heads, head_dim = q.ty.shape
        sizes = (int(heads), layout.num_kv_heads, layout.head_dim, layout.page_size)
        kernel = target.kernels.paged_attention(Attention(*sizes, layout.dtype, int(head_dim) ** -0.5, window))
        args = [q, appended, *indices, rewriter.visit_expr(positions)]
        return rewriter.call_kernel(kernel, args, q.ty)

    return rewrite(mod, rule, new_inputs=[slot_mapping, *indices, *pages])


def index_inputs(n: tirx.Var) -> list[relax.Var]:
    """slot_mapping, block_table, seq_lens, query_start, tree_masks."""
    seqs, blocks = tirx.Var("seqs", "int64"), tirx.Var("blocks", "int64")
    shapes = {"slot_mapping": (n,), "block_table": (seqs, blocks), "seq_lens": (seqs,), "query_start": (seqs + 1,)}
    shapes["tree_masks"] = (n,)
    return [relax.Var(name, relax.TensorType(shape, "int32")) for name, shape in shapes.items()]


def pages_type(layout: KvLayout) -> relax.TensorType:
    shape = (tirx.Var("num_pages", "int64"), 2, layout.num_kv_heads, layout.page_size, layout.head_dim)
    return relax.TensorType(shape, layout.storage)


def append_kernel(layout: KvLayout) -> tirx.PrimFunc:
    """Writes k and v (n, kv_heads, head_dim) into the slots of each token; a negative slot is skipped.

    The plain form, for models that put something between the projections and the cache; `fuse_rope` replaces it.
    """
    heads, size, dim, dtype = layout.num_kv_heads, layout.page_size, layout.head_dim, layout.storage

    def stored(value: tirx.Expr) -> tirx.Expr:
        return bfloat16_bits(value) if dtype == "uint16" else T.Cast(dtype, value)

    @T.prim_func(s_tir=True, private=True)  # type: ignore[untyped-decorator]
    def append(k_: T.handle, v_: T.handle, slots_: T.handle, pages_: T.handle):  # type: ignore[no-untyped-def]
        T.func_attr({"tirx.noalias": True, "op_pattern": 8})
        n = T.int64()
        num_pages = T.int64()
        k = T.match_buffer(k_, (n, heads, dim), "float32")
        v = T.match_buffer(v_, (n, heads, dim), "float32")
        slots = T.match_buffer(slots_, (n,), "int32")
        pages = T.match_buffer(pages_, (num_pages, 2, heads, size, dim), dtype)
        for t in T.parallel(n):
            for h, d in T.grid(heads, dim):
                with T.sblock("append"):
                    T.reads()
                    T.writes()
                    if slots[t] >= 0:
                        page = T.Cast("int64", slots[t] // size)
                        row = T.Cast("int64", slots[t] % size)
                        pages[page, 0, h, row, d] = stored(k[t, h, d])
                        pages[page, 1, h, row, d] = stored(v[t, h, d])

    return append.with_attr("global_symbol", "append")

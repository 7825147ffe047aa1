"""Attention over paged keys and values, softmax computed online (Milakov and Gimelshein, 2018; FlashAttention).

A task is (split of the keys, kv head, block of consecutive tokens). Within its block it takes one sequence after the
other; the query heads of a kv head share its keys and values. Two ways, by the number of query rows (tokens x heads):
- few rows (decode): dot products straight from the pages, V keys at a time, V being the vector length;
- many rows (prefill): keys (transposed) and values of a block are staged in cache, in the words of the best unit; one
  register tile of rows after the other then goes through scores, softmax and outputs.
Few tasks with a long context are split over the keys; a second pass then combines the parts.
"""

from tvm import tirx
from tvm.tirx.script import builder as T  # noqa: N812

from .attention_decode import Decode
from .attention_parts import MIN_TASKS, Cache, Following, Output, Segment, Shape
from .attention_prefill import prefill_for
from .isa import Isa
from .rope import STORAGE
from .units import bf16_scope
from .vector import Buffer, Expr, Register, bind, ceildiv, i64, kernel, load, view

SPLIT_UNIT = 64  # keys; a split begins at a multiple of the vector length
MIN_SPLIT = 64  # keys


def paged_attention(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    kv_dtype: str,
    scale: float,
    window: int,
    isa: Isa,
) -> tirx.PrimFunc:
    """Causal attention of n new tokens to the cached positions of their sequences, their own included.

    PrimFunc(q (n, H, D) f32; pages (num_pages, 2, KV, page_size, D) kv_dtype, keys at [:, 0]; block_table (seqs,
    max_blocks) int32; seq_lens (seqs,) int32; query_start (seqs + 1,) int32; tree_masks, positions (n,) int32;
    out (n, H, D) f32).
    Tokens query_start[s] … query_start[s + 1] belong to sequence s, with ascending positions. A token at position p
    attends to max(0, p - window + 1) … p, or to 0 … p without a window (0); one with a tree mask as
    passes/paged_attention.py says. head_dim is a multiple of 16.
    """
    with kernel("paged_attention") as k:
        n, num_pages = k.symbol("n"), k.symbol("num_pages")
        seqs, max_blocks = k.symbol("seqs"), k.symbol("max_blocks")
        q = k.arg("q", (n, num_heads, head_dim), "float32")
        pages = k.arg("pages", (num_pages, 2, num_kv_heads, page_size, head_dim), STORAGE[kv_dtype])
        block_table = k.arg("block_table", (seqs, max_blocks), "int32")
        seq_lens = k.arg("seq_lens", (seqs,), "int32")
        query_start = k.arg("query_start", (seqs + 1,), "int32")
        tree_masks, positions = k.arg("tree_masks", (n,), "int32"), k.arg("positions", (n,), "int32")
        out = k.arg("out", (n, num_heads, head_dim), "float32")
        cells = view(pages, (num_pages * (2 * num_kv_heads * page_size * head_dim),), STORAGE[kv_dtype])
        cache = Cache(isa, cells, block_table, num_kv_heads, page_size, head_dim)
        shape = Shape(isa, num_heads // num_kv_heads, head_dim, kv_dtype, scale, window)

        with bf16_scope(shape.unit != "float32"):
            num_blocks = bind(ceildiv(n, shape.block_tokens))
            num_splits, split_keys = _splits(num_blocks * num_kv_heads, seqs, seq_lens)
            output = Output(isa, out, n, num_heads, num_splits, MIN_TASKS * shape.block_rows)

            with T.parallel(num_splits * num_kv_heads * num_blocks) as task:
                head = bind(task // num_blocks % num_kv_heads)
                split = bind(task // num_blocks // num_kv_heads)
                first_token = bind(_alternate(task % num_blocks, num_blocks) * shape.block_tokens)
                with T.serial(seqs) as seq:
                    own = (bind(i64(load(query_start, seq))), bind(i64(load(query_start, seq + 1))))
                    start = bind(tirx.max(own[0], first_token))
                    end = bind(tirx.min(own[1], first_token + shape.block_tokens))
                    with T.If(start < end), T.Then():
                        length = bind(i64(load(seq_lens, seq)))
                        sequence = (seq, bind(length - (own[1] - own[0])), length)
                        keys = (bind(split * split_keys), split_keys)
                        following = _following(seq, seq_lens, head, num_kv_heads, *keys)
                        arrays = (q, tree_masks, positions, output)
                        segment = Segment(shape, cache, *arrays, *sequence, head, split, *keys, following)
                        _attend(segment, start, end)
            output.combine()
    return k.func


def _splits(tasks: Expr, seqs: Expr, seq_lens: Buffer) -> tuple[Expr, Expr]:
    """(number of splits, keys of each): at most as many as give MIN_TASKS tasks, none shorter than MIN_SPLIT.

    The split depends on the batch, not on the number of threads, so results do not either.
    """
    longest = Register(T.int64(1))
    with T.serial(seqs) as seq:
        longest.set(tirx.max(longest.get(), i64(load(seq_lens, seq))))
    most = bind(tirx.max(MIN_TASKS // tirx.max(tasks, i64(1)), i64(1)))
    keys = bind((longest.get() + most - 1) // most)
    # A whole number of key blocks: a split begins at a multiple of the vector length.
    keys = bind(tirx.max(ceildiv(keys, SPLIT_UNIT) * SPLIT_UNIT, i64(MIN_SPLIT)))
    return bind((longest.get() + keys - 1) // keys), keys


def _following(
    seq: Expr, seq_lens: Buffer, head: Expr, num_kv_heads: int, first_key: Expr, num_keys: Expr
) -> Following:
    """The order of tasks where one block holds all tokens: sequences, then kv heads, then splits."""
    next_seq, next_head = bind((seq + 1) % seq_lens.ty.shape[0]), bind((head + 1) % num_kv_heads)
    first = T.Select(tirx.And(next_seq == 0, next_head == 0), first_key + num_keys, first_key)
    next_head = T.Select(next_seq == 0, next_head, head)
    return Following(next_seq, bind(next_head), bind(first), bind(i64(load(seq_lens, next_seq))))


def _alternate(i: Expr, count: Expr) -> Expr:
    """0, last, 1, last - 1, …: threads take consecutive tasks, and later tokens attend to more keys."""
    return T.Select(i % 2 == 0, i // 2, count - 1 - i // 2)


def _attend(segment: Segment, start: Expr, end: Expr) -> None:
    shape = segment.shape
    few_tokens = max(1, 7 // shape.group)
    with T.If(end - start <= few_tokens):
        with T.Then(), T.serial(end - start) as t, T.serial(i64(shape.group // shape.heads)) as chunk:
            first_head = bind(segment.query_head(chunk * shape.heads))
            Decode(segment, bind(start + t), first_head).attend()
        with T.Else():
            prefill_for(segment, start, end).attend()

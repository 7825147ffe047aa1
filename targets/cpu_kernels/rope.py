"""Rotary position embedding (Su et al., 2021) of queries and keys; keys and values appended to the KV pages."""

from collections.abc import Callable

from tvm import tirx
from tvm.tirx.script import builder as T  # noqa: N812

from .isa import Isa
from .vector import Buffer, Expr, bind, blocks, i64, kernel, load, parallel_for, store, store_f32

LANES = 16
STORAGE = {"float32": "float32", "float16": "float16", "bfloat16": "uint16"}  # a KV dtype's dtype in memory


def rope_append(
    num_heads: int, num_kv_heads: int, head_dim: int, page_size: int, kv_dtype: str, isa: Isa
) -> tirx.PrimFunc:
    """Rotate q and k, write k and v to their slots in place, and return the rotated q.

    PrimFunc(qkv (n, (H + 2*KV) * D) f32: q heads, k heads, v heads; cos, sin (n, D/2) f32; slot_mapping (n,) int32;
    pages (num_pages, 2, KV, page_size, D) kv_dtype, keys at [:, 0]; q_out (n, H, D) f32).
    The pairs (i, i + D/2) rotate together. A token whose slot is negative is not written.
    For `relax.call_tir_inplace(f, [qkv, cos, sin, slot_mapping, pages], [-1, 4], [q_out type, pages type])`.
    """
    with kernel("rope_append") as k:
        n, num_pages = k.symbol("n"), k.symbol("num_pages")
        qkv = k.arg("qkv", (n, (num_heads + 2 * num_kv_heads) * head_dim), "float32")
        cos = k.arg("cos", (n, head_dim // 2), "float32")
        sin = k.arg("sin", (n, head_dim // 2), "float32")
        slot_mapping = k.arg("slot_mapping", (n,), "int32")
        pages = k.arg("pages", (num_pages, 2, num_kv_heads, page_size, head_dim), STORAGE[kv_dtype])
        q_out = k.arg("q_out", (n, num_heads, head_dim), "float32")

        def token(t: Expr) -> None:
            with T.serial(i64(num_heads)) as head:
                _rotate(qkv, head * head_dim, cos, sin, t, lambda v, i: store(q_out, v, t, head, i))
            slot = bind(i64(load(slot_mapping, t)))
            with T.If(slot >= 0), T.Then():
                page, offset = bind(slot // page_size), bind(slot % page_size)
                with T.serial(i64(num_kv_heads)) as head:
                    key = (num_heads + head) * head_dim
                    _rotate(qkv, key, cos, sin, t, lambda v, i: store_f32(isa, pages, v, page, i64(0), head, offset, i))
                    value = (num_heads + num_kv_heads + head) * head_dim
                    for start, lanes in blocks(head_dim, LANES):
                        v = load(qkv, t, value + start, lanes=lanes)
                        store_f32(isa, pages, v, page, i64(1), head, offset, i64(start))

        parallel_for(n, token)
    return k.func


def _rotate(qkv: Buffer, first: Expr, cos: Buffer, sin: Buffer, t: Expr, write: Callable[[Expr, Expr], None]) -> None:
    """Rotate the head that begins at column `first` of token t; write(vector, index within the head)."""
    half = int(cos.ty.shape[1])
    for start, lanes in blocks(half, LANES):
        a = bind(load(qkv, t, first + start, lanes=lanes))
        b = bind(load(qkv, t, first + half + start, lanes=lanes))
        c, s = bind(load(cos, t, start, lanes=lanes)), bind(load(sin, t, start, lanes=lanes))
        write(a * c - b * s, i64(start))
        write(b * c + a * s, i64(half + start))

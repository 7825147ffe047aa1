"""y += f(x) A^T B^T with each token's own A and B: the path of low-rank adapters (Punica, Chen et al. 2023).

Two products, each by tiles of 16 rows of its matrix, as linear.py's of few rows: first all h = f(x) A^T, then y += h
B^T. A block of tokens of one adapter, as a prompt's are, reads a tile once; others read theirs token by token.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from operator import add

from tvm import tirx
from tvm.tirx.script import builder as T  # noqa: N812

from ...adapter_layout import SLOTS, ProjectionGroup, num_tiles
from ...formats import TILE
from ..base import LowRank
from .activation import Rows, rms_norm, silu_mul
from .isa import Isa
from .vector import (
    Buffer,
    Expr,
    Register,
    bind,
    ceildiv,
    for_each_block,
    i64,
    kernel,
    load,
    load_f32,
    narrow,
    parallel_for,
    splat,
    store,
    widen,
)

UNROLL = 8  # columns of A or B
SMALL = 1 << 16  # products that one thread makes in the time of waking the others

Tokens = Callable[[Sequence[Expr], Expr], None]  # (tokens of one adapter, its slot)


def low_rank(spec: LowRank, isa: Isa) -> tirx.PrimFunc:
    """PrimFunc(x (n, K) f32, [norm weight (K,) f32], adapter_slots (n,) int32, lora_a, lora_b, y (n, sum of N) f32).

    With a gate x is (n, 2 * K). y is added to, in place; a token whose slot is negative is left alone.
    """
    assert not spec.gates_result, "Target.gates_results"
    group = ProjectionGroup(("",) * len(spec.out_features), spec.in_features, spec.out_features)
    width, dtype = spec.in_features, spec.limits.dtype
    with kernel(spec.name) as k:
        n = k.symbol("n")
        x = k.arg("x", (n, 2 * width if spec.is_gated else width), "float32")
        norm_weight = k.arg("norm_weight", (width,), "float32") if spec.norm_eps is not None else None
        slots = k.arg(SLOTS, (n,), "int32")
        a = k.arg("lora_a", group.a_shape(spec.limits), dtype)
        b = k.arg("lora_b", group.b_shape(spec.limits), dtype)
        y = k.arg("y", (n, sum(spec.out_features)), "float32")
        values = _values(spec, isa, x, norm_weight, slots)
        inner = T.alloc_buffer((n, i64(int(a.ty.shape[1]) * TILE)), "float32")
        _shrink(isa, values, a, slots, inner)
        _expand(isa, spec, inner, b, slots, y)
    return k.func


def _values(spec: LowRank, isa: Isa, x: Buffer, norm_weight: Buffer | None, slots: Buffer) -> Buffer:
    """f(x), (n, K), of the tokens that have an adapter."""
    if spec.norm_eps is None and not spec.is_gated:
        return x
    n = slots.ty.shape[0]
    rows: Rows = silu_mul(isa, x) if spec.is_gated else rms_norm(x, norm_weight, spec.norm_eps or 0.0)
    values = T.alloc_buffer((n, i64(spec.in_features)), "float32")

    def write(t: Expr) -> None:
        with T.If(load(slots, t) >= 0), T.Then():
            row = rows(t)
            for_each_block(spec.in_features, TILE, lambda k, lanes: store(values, row(k, lanes), t, k))

    parallel_for(n, write)
    return values


def _shrink(isa: Isa, x: Buffer, a: Buffer, slots: Buffer, inner: Buffer) -> None:
    """inner (n, tiles * 16) = x (n, K) A^T"""
    tiles, width = int(a.ty.shape[1]), int(a.ty.shape[2])
    height, n = _height(isa), slots.ty.shape[0]

    def task(index: Expr) -> None:
        tile = bind(index % tiles)

        def product(tokens: Sequence[Expr], slot: Expr) -> None:
            sums = _product(
                width,
                len(tokens),
                height // len(tokens),
                lambda r, k: load(x, tokens[r], k),
                lambda k: load_f32(isa, a, slot, tile, k, 0, lanes=TILE),
            )
            for t, total in zip(tokens, sums, strict=True):
                store(inner, total, t, tile * TILE)

        _for_each_adapter(slots, index // tiles * height, height, product)

    _run_tasks(n, tiles, height, tiles * TILE * width, task)


def _expand(isa: Isa, spec: LowRank, inner: Buffer, b: Buffer, slots: Buffer, y: Buffer) -> None:
    """y (n, sum of N) += inner B^T, part by part."""
    rank, tiles = spec.limits.rank, int(b.ty.shape[1])
    height, n = _height(isa), slots.ty.shape[0]

    def task(index: Expr) -> None:
        tile, first = bind(index % tiles), bind(index // tiles * height)
        tile_start = column_start = 0
        for part, features in enumerate(spec.out_features):
            end = tile_start + num_tiles(features)

            def product(tokens: Sequence[Expr], slot: Expr, part: int = part) -> list[Expr]:
                return _product(
                    rank,
                    len(tokens),
                    height // len(tokens),
                    lambda r, k: load(inner, tokens[r], part * rank + k),
                    lambda k: load_f32(isa, b, slot, tile, k, 0, lanes=TILE),
                )

            def add_part(lanes: int, column: Expr, product: Callable[..., list[Expr]] = product) -> None:
                def update(tokens: Sequence[Expr], slot: Expr) -> None:
                    for t, total in zip(tokens, product(tokens, slot), strict=True):
                        before = widen(load(y, t, column, lanes=lanes), TILE)
                        store(y, narrow(bind(before + total), lanes), t, column)

                _for_each_adapter(slots, first, height, update)

            column = column_start + (tile - tile_start) * TILE
            last = features % TILE
            whole_end = end - 1 if last else end
            if whole_end > tile_start:
                with T.If(tirx.And(tile >= tile_start, tile < whole_end)), T.Then():
                    add_part(TILE, column)
            if last:
                with T.If(tile == end - 1), T.Then():
                    add_part(last, column)
            tile_start, column_start = end, column_start + features

    _run_tasks(n, tiles, height, tiles * TILE * rank, task)


def _run_tasks(n: Expr, tiles: int, height: int, work: int, task: Callable[[Expr], None]) -> None:
    """task(block of tokens * tiles + tile) on all threads, or on this one where waking them costs more than the work.

    work: products for each token.
    """
    count = bind(ceildiv(n, height) * tiles)
    with T.If(n * work <= SMALL):
        with T.Then(), T.serial(count) as index:
            task(index)
        with T.Else(), T.parallel(count) as index:
            task(index)


def _for_each_adapter(slots: Buffer, first: Expr, height: int, body: Tokens) -> None:
    """body(tokens, slot) for `height` tokens from `first` on: all at once if they share an adapter, else one by one."""
    n, first = slots.ty.shape[0], bind(first)
    last = i64(n) - 1
    slot = bind(i64(load(slots, first)))
    same = [i64(load(slots, tirx.min(first + r, last))) == slot for r in range(1, height)]
    is_uniform = reduce(tirx.And, same, first + (height - 1) <= last)
    with T.If(is_uniform):
        with T.Then(), T.If(slot >= 0), T.Then():
            body([first + r for r in range(height)], slot)
        with T.Else(), T.serial(tirx.min(i64(height), n - first)) as r:
            its_slot = bind(i64(load(slots, first + r)))
            with T.If(its_slot >= 0), T.Then():
                body([first + r], its_slot)


def _product(
    width: int, count: int, chains: int, x: Callable[[int, Expr], Expr], column: Callable[[Expr], Expr]
) -> list[Expr]:
    """sum over k < width of x(r, k) * column(k), 16 float32 for each r < count.

    In `chains` independent sums, which hide the latency of the additions.
    """
    sums = [[Register(splat(0.0, TILE)) for _ in range(chains)] for _ in range(count)]

    def add_column(k: Expr, chain: int) -> None:
        value = bind(column(k))
        for r, registers in enumerate(sums):
            register = registers[chain % chains]
            register.set(register.get() + value * splat(x(r, k), TILE))

    with T.serial(i64(width // UNROLL)) as block:
        for at in range(UNROLL):
            add_column(block * UNROLL + at, at)
    for k in range(width // UNROLL * UNROLL, width):
        add_column(i64(k), 0)
    return [bind(reduce(add, [register.get() for register in registers])) for registers in sums]


def _height(isa: Isa) -> int:
    """Tokens of a block: a power of two whose sums fit the registers, beside a column and its source."""
    most = max(1, (isa.registers - 2 * isa.registers_per_tile) // isa.registers_per_tile)
    return min(8, 1 << (most.bit_length() - 1))

"""Attention over paged keys and values, softmax computed online (Milakov and Gimelshein, 2018; FlashAttention).

A task is (split of the keys, kv head, block of consecutive tokens). Within its block it takes one sequence after the
other; the query heads of a kv head share its keys and values. Two ways, by the number of query rows (tokens x heads):
- few rows (decode): dot products straight from the pages, V keys at a time, V being the vector length;
- many rows (prefill): keys (transposed) and values of a block are staged as float32, and two register-tiled products
  compute scores and outputs for all rows.
Few tasks with a long context are split over the keys; a second pass then combines the parts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import gcd

from tvm import tirx
from tvm.tirx.script import builder as T  # noqa: N812

from .gemm import multiply_tile, tile_rows
from .isa import Isa
from .rope import STORAGE
from .vector import (
    Buffer,
    Expr,
    LaneSums,
    Register,
    bind,
    ceildiv,
    exp,
    i64,
    kernel,
    largest_divisor,
    load,
    load_f32,
    prefetch,
    reduce_max,
    reduce_sum,
    splat,
    store,
    transpose,
    view,
)

LANES = 16  # where a vector need not be as long as the machine's
LOWEST = -1e30  # a score that no key has; finite, because TVM compiles with fast-math flags
KEY_BLOCK = 64  # keys staged at a time for many rows
SCORE_BLOCK = 256  # keys scored at a time for few rows
MIN_TASKS = 64  # with fewer tasks, split the keys
MIN_SPLIT = 128  # keys


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
    max_blocks) int32; seq_lens (seqs,) int32; query_start (seqs + 1,) int32; positions (n,) int32; out (n, H, D) f32).
    Tokens query_start[s] … query_start[s + 1] belong to sequence s, with ascending positions. A token at position p
    attends to max(0, p - window + 1) … p, or to 0 … p without a window (0). head_dim is a multiple of 16.
    """
    with kernel("paged_attention") as k:
        n, num_pages = k.symbol("n"), k.symbol("num_pages")
        seqs, max_blocks = k.symbol("seqs"), k.symbol("max_blocks")
        q = k.arg("q", (n, num_heads, head_dim), "float32")
        pages = k.arg("pages", (num_pages, 2, num_kv_heads, page_size, head_dim), STORAGE[kv_dtype])
        block_table = k.arg("block_table", (seqs, max_blocks), "int32")
        seq_lens = k.arg("seq_lens", (seqs,), "int32")
        query_start = k.arg("query_start", (seqs + 1,), "int32")
        positions = k.arg("positions", (n,), "int32")
        out = k.arg("out", (n, num_heads, head_dim), "float32")
        cells = view(pages, (num_pages * (2 * num_kv_heads * page_size * head_dim),), STORAGE[kv_dtype])
        cache = _Cache(isa, cells, block_table, num_kv_heads, page_size, head_dim)
        shape = _Shape(isa, num_heads // num_kv_heads, head_dim, scale, window)

        num_blocks = bind(ceildiv(n, shape.block_tokens))
        num_splits, split_keys = _splits(num_blocks * num_kv_heads, seqs, seq_lens)
        output = _Output(out, n, num_heads, num_splits, MIN_TASKS * shape.block_rows)

        with T.parallel(num_splits * num_kv_heads * num_blocks) as task:
            head = bind(task // num_blocks % num_kv_heads)
            split = bind(task // num_blocks // num_kv_heads)
            first_token = bind(_alternate(task % num_blocks, num_blocks) * shape.block_tokens)
            with T.serial(seqs) as seq:
                start = bind(tirx.max(i64(load(query_start, seq)), first_token))
                end = bind(tirx.min(i64(load(query_start, seq + 1)), first_token + shape.block_tokens))
                segment = _Segment(shape, cache, q, positions, output, seq, head, split, split * split_keys, split_keys)
                with T.If(start < end), T.Then():
                    segment.attend(start, end)
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
    keys = bind(tirx.max(ceildiv(keys, KEY_BLOCK) * KEY_BLOCK, i64(MIN_SPLIT)))
    return bind((longest.get() + keys - 1) // keys), keys


def _alternate(i: Expr, count: Expr) -> Expr:
    """0, last, 1, last - 1, …: threads take consecutive tasks, and later tokens attend to more keys."""
    return T.Select(i % 2 == 0, i // 2, count - 1 - i // 2)


@dataclass(frozen=True)
class _Shape:
    isa: Isa
    group: int  # query heads of one kv head
    head_dim: int
    scale: float
    window: int

    @property
    def lanes(self) -> int:
        return self.isa.lanes

    @property
    def vectors(self) -> int:
        """Vectors of a head."""
        return self.head_dim // self.lanes

    @property
    def heads(self) -> int:
        """Query heads that a decoding token handles together."""
        return largest_divisor(self.group, 7)

    @property
    def tile_rows(self) -> int:
        return tile_rows(self.isa, 2)

    @property
    def block_tokens(self) -> int:
        """Tokens of a task: about 60 query rows, a whole number of register tiles."""
        return max(1, 60 // self.tile_rows * self.tile_rows // self.group)

    @property
    def block_rows(self) -> int:
        """Their query rows, rounded up to register tiles."""
        return -(-self.block_tokens * self.group // self.tile_rows) * self.tile_rows


@dataclass(frozen=True)
class _Cache:
    """Addresses in the pages. `run` keys that begin at a multiple of `run` lie together in a page."""

    isa: Isa
    cells: Buffer  # the pages, flat
    block_table: Buffer
    num_kv_heads: int
    page_size: int
    head_dim: int

    @property
    def run(self) -> int:
        return gcd(self.page_size, self.isa.lanes)

    @property
    def to_values(self) -> int:
        """Cells from a key to the value of the same position."""
        return self.num_kv_heads * self.page_size * self.head_dim

    def key(self, seq: Expr, head: Expr, position: Expr) -> Expr:
        page = i64(load(self.block_table, seq, position // self.page_size))
        row = (page * (2 * self.num_kv_heads) + head) * self.page_size + position % self.page_size
        return bind(row * self.head_dim)

    def keys(self, seq: Expr, head: Expr, first: Expr, end: Expr) -> list[Expr]:
        """Cells of `lanes` keys from `first` (a multiple of lanes); runs past `end` repeat the last one before it."""
        last_run = (end - 1) // self.run * self.run
        starts = [
            self.key(seq, head, tirx.min(first + offset, last_run)) for offset in range(0, self.isa.lanes, self.run)
        ]
        return [starts[i // self.run] + i % self.run * self.head_dim for i in range(self.isa.lanes)]

    def prefetch(self, cell: Expr) -> None:
        """Ask for a whole key or value: hardware prefetching does not find the next page."""
        line = 64 // self.cells.ty.dtype.dtype.itemsize
        for i in range(0, self.head_dim, line):
            prefetch(self.cells, cell + i)

    def load(self, cell: Expr) -> Expr:
        return bind(load_f32(self.isa, self.cells, cell, lanes=self.isa.lanes))


class _Output:
    """Where rows go: to `out`, or with more than one split to a workspace of parts that `combine` adds up."""

    def __init__(self, out: Buffer, n: Expr, num_heads: int, num_splits: Expr, max_parts: int) -> None:
        self.out, self.rows, self.num_heads = out, n * num_heads, num_heads
        self.head_dim = int(out.ty.shape[2])
        self.num_splits = num_splits
        parts = i64(max_parts)  # splits * rows of any batch that is split; TVM takes no bound variable as an extent
        self.parts = T.alloc_buffer((parts, i64(self.head_dim)), "float32")  # sum of exp(score - top) * value
        self.tops = T.alloc_buffer((parts,), "float32")
        self.sums = T.alloc_buffer((parts,), "float32")  # sum of exp(score - top); 0: no key in this split

    def write(self, split: Expr, token: Expr, head: Expr, top: Expr, total: Expr, row: Callable[..., Expr]) -> None:
        """row(i, lanes=…): the unnormalized output from column i."""
        with T.If(self.num_splits == 1):
            with T.Then():
                factor = bind(T.float32(1.0) / total)
                self._store(self.out, row, factor, token, head)
            with T.Else():
                part = bind(split * self.rows + token * self.num_heads + head)
                store(self.tops, top, part)
                store(self.sums, total, part)
                with T.If(total > T.float32(0.0)), T.Then():
                    self._store(self.parts, row, T.float32(1.0), part)

    def _store(self, buffer: Buffer, row: Callable[..., Expr], factor: Expr, *index: Expr) -> None:
        with T.serial(i64(self.head_dim // LANES)) as v:
            store(buffer, row(v * LANES, lanes=LANES) * splat(factor, LANES), *index, v * LANES)

    def combine(self) -> None:
        with T.If(self.num_splits > 1), T.Then(), T.parallel(self.rows) as row:
            self._combine_row(row)

    def _combine_row(self, row: Expr) -> None:
        top, total = Register(T.float32(LOWEST)), Register(T.float32(0.0))
        with T.serial(self.num_splits) as split:
            top.set(tirx.max(top.get(), load(self.tops, split * self.rows + row)))
        sums = [Register(splat(0.0, LANES)) for _ in range(self.head_dim // LANES)]
        with T.serial(self.num_splits) as split:
            part = bind(split * self.rows + row)
            with T.If(load(self.sums, part) > T.float32(0.0)), T.Then():
                weight = exp(load(self.tops, part) - top.get())
                total.set(total.get() + load(self.sums, part) * weight)
                for i, register in enumerate(sums):
                    partial_row = load(self.parts, part, i * LANES, lanes=LANES)
                    register.set(register.get() + splat(weight, LANES) * partial_row)
        factor = bind(T.float32(1.0) / total.get())
        for i, register in enumerate(sums):
            value = register.get() * splat(factor, LANES)
            store(self.out, value, row // self.num_heads, row % self.num_heads, i64(i * LANES))


@dataclass(frozen=True)
class _Segment:
    """Tokens of one sequence, one kv head, one split of the keys."""

    shape: _Shape
    cache: _Cache
    q: Buffer
    positions: Buffer
    output: _Output
    seq: Expr
    head: Expr  # kv head
    split: Expr
    first_key: Expr  # of the split
    num_keys: Expr

    def attend(self, start: Expr, end: Expr) -> None:
        few_tokens = max(1, 7 // self.shape.group)
        with T.If(end - start <= few_tokens):
            with T.Then(), T.serial(end - start) as t, T.serial(i64(self.shape.group // self.shape.heads)) as chunk:
                first_head = bind(self.query_head(chunk * self.shape.heads))
                _Decode(self, bind(start + t), first_head).attend()
            with T.Else():
                _Prefill(self, start, end).attend()

    def key_range(self, first_token: Expr, last_token: Expr) -> tuple[Expr, Expr]:
        """[first, end) of the split's keys that these tokens see."""
        end = bind(tirx.min(i64(load(self.positions, last_token)) + 1, self.first_key + self.num_keys))
        return bind(tirx.max(self.first_visible(first_token), self.first_key)), end

    def first_visible(self, token: Expr) -> Expr:
        if not self.shape.window:
            return i64(0)
        return tirx.max(i64(load(self.positions, token)) - (self.shape.window - 1), i64(0))

    def query_head(self, g: Expr) -> Expr:
        return self.head * self.shape.group + g


class _Decode:
    """Some query heads of one kv head, for one token. scores and weights: (heads, SCORE_BLOCK); outputs: (heads, D)."""

    def __init__(self, segment: _Segment, token: Expr, first_head: Expr) -> None:
        self.segment, self.shape, self.cache = segment, segment.shape, segment.cache
        self.token, self.first_head = token, first_head
        self.first, self.end = segment.key_range(token, token)
        self.heads = range(self.shape.heads)

    def attend(self) -> None:
        lanes = self.shape.lanes
        scores = T.alloc_buffer((i64(len(self.heads)), i64(SCORE_BLOCK)), "float32")
        outputs = T.alloc_buffer((i64(len(self.heads)), i64(self.shape.head_dim)), "float32")
        tops = [Register(T.float32(LOWEST)) for _ in self.heads]
        totals = [Register(T.float32(0.0)) for _ in self.heads]
        with T.serial(i64(self.shape.vectors)) as v:
            for h in self.heads:
                store(outputs, splat(0.0, lanes), h, v * lanes)
        with T.If(self.first < self.end), T.Then():
            aligned = bind(self.first // lanes * lanes)
            with T.serial(ceildiv(self.end - aligned, SCORE_BLOCK)) as block:
                start = bind(aligned + block * SCORE_BLOCK)
                stop = bind(tirx.min(start + SCORE_BLOCK, self.end))
                block_tops = self._score(scores, start, stop)
                shrinks = [
                    self._exponentiate(scores, h, start, stop, block_tops[h], tops[h], totals[h]) for h in self.heads
                ]
                self._add_values(scores, outputs, shrinks, start, stop)
        for h in self.heads:
            row = partial(load, outputs, h)
            self.segment.output.write(
                self.segment.split, self.token, self.first_head + h, tops[h].get(), totals[h].get(), row
            )

    def _score(self, scores: Buffer, start: Expr, stop: Expr) -> list[Register]:
        """scores[h, i] = scale * q[h] . key[start + i], LOWEST outside the range; returns the maxima per lane."""
        lanes = self.shape.lanes
        tops = [Register(splat(LOWEST, lanes)) for _ in self.heads]
        with T.serial(ceildiv(stop - start, lanes)) as block:
            first = bind(start + block * lanes)
            valid = self._valid(first, stop)
            for cell in self.cache.keys(self.segment.seq, self.segment.head, first + 2 * lanes, self.end):
                self.cache.prefetch(cell)
            dots = self._dot_products(self.cache.keys(self.segment.seq, self.segment.head, first, stop))
            for h in self.heads:
                score = bind(T.Select(valid, dots[h] * splat(self.shape.scale, lanes), splat(LOWEST, lanes)))
                tops[h].set(tirx.max(tops[h].get(), score))
                store(scores, score, h, block * lanes)
        return tops

    def _valid(self, first: Expr, stop: Expr) -> Expr:
        lanes = self.shape.lanes
        key = T.ramp(T.cast(first, "int32"), T.int32(1), lanes)
        inside = key < splat(T.cast(stop, "int32"), lanes)
        return tirx.And(inside, key >= splat(T.cast(self.first, "int32"), lanes)) if self.shape.window else inside

    def _dot_products(self, cells: list[Expr]) -> list[Expr]:
        """For each head a vector whose lane i is q . key i."""
        lanes = self.shape.lanes
        unroll = largest_divisor(self.shape.vectors, 5)
        sums = [LaneSums() for _ in self.heads]
        for cell in cells:
            dots = [Register(splat(0.0, lanes)) for _ in self.heads]
            with T.serial(i64(self.shape.vectors // unroll)) as chunk:
                for v in range(unroll):
                    at = (chunk * unroll + v) * lanes
                    key = self.cache.load(cell + at)
                    for h, dot in enumerate(dots):
                        query = load(self.segment.q, self.token, self.first_head + h, at, lanes=lanes)
                        dot.set(dot.get() + query * key)
            for lane_sums, dot in zip(sums, dots, strict=True):
                lane_sums.add(bind(dot.get()))
        return [lane_sums.result() for lane_sums in sums]

    def _exponentiate(
        self, scores: Buffer, h: int, start: Expr, stop: Expr, block_tops: Register, top: Register, total: Register
    ) -> Expr:
        """scores -> weights exp(score - top); returns the factor by which earlier sums shrink."""
        lanes = self.shape.lanes
        new_top = bind(tirx.max(top.get(), reduce_max(block_tops.get())))
        shrink = exp(top.get() - new_top)
        sums = Register(splat(0.0, lanes))
        with T.serial(ceildiv(stop - start, lanes)) as block:
            weight = exp(load(scores, h, block * lanes, lanes=lanes) - splat(new_top, lanes))
            weight = bind(T.Select(self._valid(start + block * lanes, stop), weight, splat(0.0, lanes)))
            store(scores, weight, h, block * lanes)
            sums.set(sums.get() + weight)
        total.set(total.get() * shrink + reduce_sum(sums.get()))
        top.set(new_top)
        return shrink

    def _add_values(self, weights: Buffer, outputs: Buffer, shrinks: list[Expr], start: Expr, stop: Expr) -> None:
        """outputs[h] = outputs[h] * shrink[h] + sum of weights[h, i] * value[start + i].

        Where the outputs do not fit in registers, some columns at a time, for one run of keys after the other: values
        are then read from memory in their order.
        """
        lanes = self.shape.lanes
        vectors = largest_divisor(self.shape.vectors, max(1, self.shape.isa.registers * 3 // 4 // len(self.heads)))
        with T.serial(i64(self.shape.vectors)) as v:
            for h, shrink in enumerate(shrinks):
                store(outputs, load(outputs, h, v * lanes, lanes=lanes) * splat(shrink, lanes), h, v * lanes)
        runs = ceildiv(stop - start, self.cache.run)
        if vectors == self.shape.vectors:
            with self._accumulate(outputs, [i64(v * lanes) for v in range(vectors)]) as sums, T.serial(runs) as run:
                self._add_run(weights, sums, start, stop, run)
            return
        with T.serial(runs) as run, T.serial(i64(self.shape.vectors // vectors)) as chunk:
            columns = [bind((chunk * vectors + v) * lanes) for v in range(vectors)]
            with self._accumulate(outputs, columns) as sums:
                self._add_run(weights, sums, start, stop, run)

    @contextmanager
    def _accumulate(self, outputs: Buffer, columns: list[Expr]) -> Iterator[list[tuple[Expr, list[Register]]]]:
        """(column, one register for each head) for each of the columns: read before, stored after."""
        lanes = self.shape.lanes
        sums = [(column, [Register(load(outputs, h, column, lanes=lanes)) for h in self.heads]) for column in columns]
        yield sums
        for column, registers in sums:
            for h, register in zip(self.heads, registers, strict=True):
                store(outputs, register.get(), h, column)

    def _add_run(
        self, weights: Buffer, sums: list[tuple[Expr, list[Register]]], start: Expr, stop: Expr, run: Expr
    ) -> None:
        lanes, length = self.shape.lanes, self.cache.run
        first = bind(start + run * length)
        cell = bind(self.cache.key(self.segment.seq, self.segment.head, first) + self.cache.to_values)
        ahead = bind(tirx.min(first + 4 * length, (self.end - 1) // length * length))
        cell_ahead = bind(self.cache.key(self.segment.seq, self.segment.head, ahead) + self.cache.to_values)
        skip = bind(tirx.max(self.first - first, i64(0)))
        with T.serial(skip, tirx.max(tirx.min(stop - first, i64(length)), skip)) as i:
            self.cache.prefetch(cell_ahead + i * self.shape.head_dim)
            weight = [bind(splat(load(weights, h, run * length + i), lanes)) for h in self.heads]
            for column, registers in sums:
                value = self.cache.load(cell + i * self.shape.head_dim + column)
                for h, register in zip(self.heads, registers, strict=True):
                    register.set(register.get() + weight[h] * value)


class _Prefill:
    """Several tokens of a sequence; row r is token start + r // group, query head r % group of the kv head."""

    def __init__(self, segment: _Segment, start: Expr, end: Expr) -> None:
        self.segment, self.shape, self.cache = segment, segment.shape, segment.cache
        self.start = start
        self.rows = bind((end - start) * self.shape.group)
        self.first, self.end = segment.key_range(start, end - 1)

    def attend(self) -> None:
        rows, head_dim, lanes = self.shape.block_rows, self.shape.head_dim, self.shape.lanes
        self.q = _scratch(rows, head_dim)
        self.keys = _scratch(head_dim, KEY_BLOCK)
        self.values = _scratch(KEY_BLOCK, head_dim)
        self.scores = _scratch(rows, KEY_BLOCK)
        self.outputs = _scratch(rows, head_dim)
        self.tops, self.totals, self.shrinks = (_scratch(rows) for _ in range(3))
        with T.serial(self.rows) as row:
            self._start_row(row)
        with T.If(self.first < self.end), T.Then():
            aligned = bind(self.first // lanes * lanes)
            with T.serial(ceildiv(self.end - aligned, KEY_BLOCK)) as block:
                self._attend_to(bind(aligned + block * KEY_BLOCK))
        with T.serial(self.rows) as row:
            token, head = self._token(row), bind(self.segment.query_head(row % self.shape.group))
            top, total = bind(load(self.tops, row)), bind(load(self.totals, row))
            self.segment.output.write(self.segment.split, token, head, top, total, partial(load, self.outputs, row))

    def _token(self, row: Expr) -> Expr:
        return bind(self.start + row // self.shape.group)

    def _start_row(self, row: Expr) -> None:
        lanes, token = self.shape.lanes, self._token(row)
        head = bind(self.segment.query_head(row % self.shape.group))
        with T.serial(i64(self.shape.vectors)) as v:
            query = load(self.segment.q, token, head, v * lanes, lanes=lanes)
            store(self.q, query * splat(self.shape.scale, lanes), row, v * lanes)
            store(self.outputs, splat(0.0, lanes), row, v * lanes)
        store(self.tops, T.float32(LOWEST), row)
        store(self.totals, T.float32(0.0), row)

    def _attend_to(self, first: Expr) -> None:
        """One block of keys. Rows of the last register tile that do not exist hold anything and are never read."""
        lanes, tile_rows = self.shape.lanes, self.shape.tile_rows
        with T.serial(i64(KEY_BLOCK // lanes)) as group:
            self._stage_keys(first, bind(group * lanes))
        with T.serial(i64(KEY_BLOCK // self.cache.run)) as group:
            self._stage_values(first, bind(group * self.cache.run))
        with T.serial(ceildiv(self.rows, tile_rows)) as tile, T.serial(i64(KEY_BLOCK // (2 * lanes))) as pair:
            self._score(bind(tile * tile_rows), bind(pair * (2 * lanes)))
        with T.serial(self.rows) as row:
            self._exponentiate(row, first)
        with T.serial(ceildiv(self.rows, tile_rows)) as tile:
            with T.serial(i64(self.shape.vectors // 2)) as pair:
                self._add_values(bind(tile * tile_rows), [bind((pair * 2 + c) * lanes) for c in range(2)])
            if self.shape.vectors % 2:
                self._add_values(bind(tile * tile_rows), [i64(self.shape.head_dim - lanes)])

    def _stage_keys(self, first: Expr, at: Expr) -> None:
        """keys[d, at + i] = key first + at + i; what lies past the end is masked later."""
        lanes = self.shape.lanes
        cells = self.cache.keys(self.segment.seq, self.segment.head, first + at, self.end)
        with T.serial(i64(self.shape.vectors)) as v:
            for d, row in enumerate(transpose([self.cache.load(cell + v * lanes) for cell in cells])):
                store(self.keys, row, v * lanes + d, at)

    def _stage_values(self, first: Expr, at: Expr) -> None:
        """values[at + i] = value first + at + i; zeros past the end, since the page may hold anything there."""
        lanes, run = self.shape.lanes, self.cache.run
        present = bind(tirx.max(tirx.min(self.end - first - at, i64(run)), i64(0)))
        with T.If(present > 0), T.Then():
            cell = bind(self.cache.key(self.segment.seq, self.segment.head, first + at) + self.cache.to_values)
            with T.serial(present) as i, T.serial(i64(self.shape.vectors)) as v:
                store(self.values, self.cache.load(cell + i * self.shape.head_dim + v * lanes), at + i, v * lanes)
        with T.serial(present, i64(run)) as i, T.serial(i64(self.shape.vectors)) as v:
            store(self.values, splat(0.0, lanes), at + i, v * lanes)

    def _score(self, row: Expr, column: Expr) -> None:
        """scores[row + r, column …] = q[row + r] . keys, for a register tile."""
        lanes = self.shape.lanes
        sums = multiply_tile(
            i64(self.shape.head_dim),
            [[splat(0.0, lanes)] * 2 for _ in range(self.shape.tile_rows)],
            lambda r, k: load(self.q, row + r, k),
            lambda k, c: load(self.keys, k, column + c * lanes, lanes=lanes),
        )
        for r, registers in enumerate(sums):
            for c, register in enumerate(registers):
                store(self.scores, register.get(), row + r, column + c * lanes)

    def _exponentiate(self, row: Expr, first: Expr) -> None:
        """scores -> weights exp(score - top), 0 for keys that the row's token does not see."""
        lanes, token = self.shape.lanes, self._token(row)
        last = bind(tirx.min(i64(load(self.segment.positions, token)), self.end - 1))
        lowest = bind(tirx.max(self.segment.first_visible(token), self.first))

        def visible(v: Expr) -> Expr:
            key = T.ramp(T.cast(first + v * lanes, "int32"), T.int32(1), lanes)
            above = key >= splat(T.cast(lowest, "int32"), lanes)
            return tirx.And(above, key <= splat(T.cast(last, "int32"), lanes))

        tops = Register(splat(LOWEST, lanes))
        with T.serial(i64(KEY_BLOCK // lanes)) as v:
            score = load(self.scores, row, v * lanes, lanes=lanes)
            tops.set(tirx.max(tops.get(), T.Select(visible(v), score, splat(LOWEST, lanes))))
        top = bind(tirx.max(load(self.tops, row), reduce_max(tops.get())))
        sums = Register(splat(0.0, lanes))
        with T.serial(i64(KEY_BLOCK // lanes)) as v:
            weight = exp(load(self.scores, row, v * lanes, lanes=lanes) - splat(top, lanes))
            weight = bind(T.Select(visible(v), weight, splat(0.0, lanes)))
            store(self.scores, weight, row, v * lanes)
            sums.set(sums.get() + weight)
        shrink = exp(load(self.tops, row) - top)
        store(self.totals, load(self.totals, row) * shrink + reduce_sum(sums.get()), row)
        store(self.tops, top, row)
        store(self.shrinks, shrink, row)

    def _add_values(self, row: Expr, columns: list[Expr]) -> None:
        """outputs[row + r] = outputs[row + r] * shrink + weights[row + r] . values, for a register tile."""
        lanes, rows = self.shape.lanes, range(self.shape.tile_rows)

        def shrunk(r: int, column: Expr) -> Expr:
            return load(self.outputs, row + r, column, lanes=lanes) * splat(load(self.shrinks, row + r), lanes)

        sums = multiply_tile(
            i64(KEY_BLOCK),
            [[shrunk(r, column) for column in columns] for r in rows],
            lambda r, k: load(self.scores, row + r, k),
            lambda k, c: load(self.values, k, columns[c], lanes=lanes),
        )
        for r, registers in enumerate(sums):
            for column, register in zip(columns, registers, strict=True):
                store(self.outputs, register.get(), row + r, column)


def _scratch(*shape: int) -> Buffer:
    return T.alloc_buffer([i64(extent) for extent in shape], "float32")

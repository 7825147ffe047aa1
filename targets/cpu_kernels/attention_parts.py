"""What both ways of attention share: sizes, addresses in the pages, where results go, and the part of a sequence that a
task takes."""

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd

from tvm import tirx
from tvm.tirx.script import builder as T  # noqa: N812

from . import amx
from .gemm import tile_rows
from .isa import Isa
from .vector import Buffer, Expr, Register, bind, exp, i64, largest_divisor, load, load_f32, prefetch, splat, store

LANES = 16  # where a vector need not be as long as the machine's
LOWEST = -1e30  # a score that no key has; finite, because TVM compiles with fast-math flags
FEW_PARTS = 64  # combining fewer costs less than waking the threads
MIN_TASKS = 64  # with fewer tasks, split the keys


@dataclass(frozen=True)
class Shape:
    isa: Isa
    group: int  # query heads of one kv head
    head_dim: int
    kv_dtype: str
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
    def unit(self) -> str:
        """What many rows are multiplied with: a cache of float32 asks for float32."""
        if self.kv_dtype == "float32" or self.isa.lanes != LANES or self.head_dim % 32:
            return "float32"
        return "amx" if self.isa.has_amx_bf16 else "bf16" if self.isa.has_bf16_dot else "float32"

    @property
    def tile_rows(self) -> int:
        return amx.BLOCK_ROWS if self.unit == "amx" else tile_rows(self.isa, 2)

    @property
    def block_tokens(self) -> int:
        """Tokens of a task: a whole number of register tiles of query rows, more where staging keys weighs more."""
        rows = 60 if self.unit == "float32" else 128
        return max(1, rows // self.tile_rows * self.tile_rows // self.group)

    @property
    def block_rows(self) -> int:
        """Their query rows, rounded up to register tiles."""
        return -(-self.block_tokens * self.group // self.tile_rows) * self.tile_rows


@dataclass(frozen=True)
class Cache:
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

    def keys(self, seq: Expr, head: Expr, first: Expr, end: Expr, count: int) -> list[Expr]:
        """Cells of `count` keys from `first`, a multiple of it; runs past `end` repeat the last one before it."""
        run = gcd(self.run, count)
        last_run = (end - 1) // run * run
        starts = [self.key(seq, head, tirx.min(first + offset, last_run)) for offset in range(0, count, run)]
        return [starts[i // run] + i % run * self.head_dim for i in range(count)]

    def prefetch(self, cell: Expr) -> None:
        """Ask for a whole key or value: hardware prefetching does not find the next page."""
        line = 64 // self.cells.ty.dtype.dtype.itemsize
        for i in range(0, self.head_dim, line):
            prefetch(self.cells, cell + i)

    def load(self, cell: Expr) -> Expr:
        return bind(load_f32(self.isa, self.cells, cell, lanes=self.isa.lanes))


class Output:
    """Where rows go: to `out`, or with more than one split to a workspace of parts that `combine` adds up."""

    def __init__(self, isa: Isa, out: Buffer, n: Expr, num_heads: int, num_splits: Expr, max_parts: int) -> None:
        self.isa = isa
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
        with T.If(self.num_splits > 1), T.Then(), T.If(self.rows * self.num_splits <= FEW_PARTS):
            with T.Then(), T.serial(self.rows) as row:
                self._combine_row(row)
            with T.Else(), T.parallel(self.rows) as row:
                self._combine_row(row)

    def _combine_row(self, row: Expr) -> None:
        top, total = Register(T.float32(LOWEST)), Register(T.float32(0.0))
        with T.serial(self.num_splits) as split:
            top.set(tirx.max(top.get(), load(self.tops, split * self.rows + row)))
        sums = [Register(splat(0.0, LANES)) for _ in range(self.head_dim // LANES)]
        with T.serial(self.num_splits) as split:
            part = bind(split * self.rows + row)
            with T.If(load(self.sums, part) > T.float32(0.0)), T.Then():
                weight = exp(self.isa, load(self.tops, part) - top.get())
                total.set(total.get() + load(self.sums, part) * weight)
                for i, register in enumerate(sums):
                    partial_row = load(self.parts, part, i * LANES, lanes=LANES)
                    register.set(register.get() + splat(weight, LANES) * partial_row)
        factor = bind(T.float32(1.0) / total.get())
        for i, register in enumerate(sums):
            value = register.get() * splat(factor, LANES)
            store(self.out, value, row // self.num_heads, row % self.num_heads, i64(i * LANES))


@dataclass(frozen=True)
class Following:
    """What a thread most likely attends to next; only prefetching relies on it."""

    seq: Expr
    head: Expr
    first_key: Expr
    end: Expr  # of the sequence


@dataclass(frozen=True)
class Segment:
    """Tokens of one sequence, one kv head, one split of the keys.

    Tokens of a tree are a sequence's last, so where the last token is of none, no other is.
    """

    shape: Shape
    cache: Cache
    q: Buffer
    tree_masks: Buffer
    positions: Buffer
    output: Output
    seq: Expr
    base: Expr  # tokens of the sequence before this step, and with it
    length: Expr
    head: Expr  # kv head
    split: Expr
    first_key: Expr  # of the split
    num_keys: Expr
    following: Following

    def key_range(self, first: Expr, last_token: Expr) -> tuple[Expr, Expr]:
        """[first, end) of the split's keys, `first` being the first key that is seen."""
        end = bind(tirx.min(self.last_visible(last_token) + 1, self.first_key + self.num_keys))
        return bind(tirx.max(first, self.first_key)), end

    def first_seen(self, first_token: Expr, last_token: Expr) -> Expr:
        """The first key that some of these tokens see: positions ascend, but for those in a tree."""
        first = self.first_visible(first_token)
        if not self.shape.window:
            return first
        of_base = tirx.max(self.base - (self.shape.window - 1), i64(0))
        return T.Select(self.is_in_tree(last_token), of_base, first)

    def first_visible(self, token: Expr) -> Expr:
        if not self.shape.window:
            return i64(0)
        first = bind(i64(load(self.positions, token)) - (self.shape.window - 1))
        of_tree = tirx.min(first, self.base)  # a window is not held against the tree's own tokens
        return tirx.max(T.Select(self.is_in_tree(token), of_tree, first), i64(0))

    def last_visible(self, token: Expr) -> Expr:
        return T.Select(self.is_in_tree(token), self.length - 1, i64(load(self.positions, token)))

    def is_in_tree(self, token: Expr) -> Expr:
        return tirx.NE(load(self.tree_masks, token), T.int32(0))

    def branch(self, token: Expr) -> Expr:
        """For `on_branch`: bit V + i tells of the key base + i; below are V ones, V being the vector length.

        Ones throughout for a token of no tree.
        """
        lanes = self.shape.lanes
        mask = i64(load(self.tree_masks, token)) & i64(0xFFFFFFFF)
        return bind(T.Select(self.is_in_tree(token), (mask << i64(lanes)) | i64((1 << lanes) - 1), i64(-1)))

    def on_branch(self, branch: Expr, key: Expr) -> Expr:
        """Of a vector of keys, those before base and those in the token's mask."""
        lanes = self.shape.lanes
        shift = tirx.max(tirx.min(key - self.base + lanes, i64(63)), i64(0))
        bits = splat(T.cast(branch >> shift, "int32"), lanes)
        each = splat(T.int32(1), lanes) << T.ramp(T.int32(0), T.int32(1), lanes)
        return tirx.NE(bits & each, splat(T.int32(0), lanes))

    def query_head(self, g: Expr) -> Expr:
        return self.head * self.shape.group + g

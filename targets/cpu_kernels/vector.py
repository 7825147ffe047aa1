"""The vocabulary of the CPU kernels: building a PrimFunc, vectors of float32, and what TIR lacks on vectors.

A kernel is a Python function that runs once and emits TIR through TVM's IRBuilder, so Python's loops are unrolled loops
and `T.serial` is a loop that remains. Index arithmetic is int64 throughout.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T  # noqa: N812

from .isa import Isa

Expr: TypeAlias = Any  # tvm.ir.Expr, or a Python number where an operator takes one
Buffer: TypeAlias = Any  # tvm.tirx.Buffer


class Kernel:
    """A PrimFunc under construction: declare the arguments in order, then emit the body."""

    func: tirx.PrimFunc

    def symbol(self, name: str) -> Expr:
        return tirx.Var(name, "int64")

    def arg(self, name: str, shape: Sequence[Expr], dtype: str) -> Buffer:
        return T.arg(name, T.buffer([i64(extent) for extent in shape], dtype, buffer_name=name))


@contextmanager
def kernel(name: str) -> Iterator[Kernel]:
    """`with kernel("f") as k:` emits arguments and body; `k.func` is the PrimFunc afterwards.

    op_pattern 8 (opaque) keeps Relax from fusing into it; noalias holds because no two arguments share memory.
    """
    built = Kernel()
    with IRBuilder() as ib, T.prim_func():
        T.func_name(name)
        T.func_attr({"global_symbol": name, "tirx.noalias": True, "op_pattern": 8})
        yield built
    built.func = ib.get()


def i64(value: Expr) -> Expr:
    return tirx.IntImm("int64", value) if isinstance(value, int) else T.cast(value, "int64")


def ceildiv(value: Expr, divisor: int) -> Expr:
    return (value + (divisor - 1)) // divisor


def largest_divisor(extent: int, most: int) -> int:
    """How many iterations of a static loop to unroll, at most `most`, so that none remain."""
    return max(i for i in range(1, most + 1) if extent % i == 0)


def bind(value: Expr) -> Expr:
    """Evaluate once, here. (An unbound expression is evaluated wherever it is used.)

    The value goes through memory, which LLVM undoes, to hide its origin from TVM's analyzer: that substitutes bound
    expressions into each other, which takes exponential time in a chain of them.
    """
    return T.bind(Register(value).get())


def view(buffer: Buffer, shape: Sequence[Expr], dtype: str) -> Buffer:
    """The same memory under another shape or type."""
    return T.decl_buffer([i64(extent) for extent in shape], dtype, data=buffer.data)


# Vectors -------------------------------------------------------------------------------------------------------------


def lanes_of(value: Expr) -> int:
    return int(value.ty.dtype.lanes)


def splat(value: Expr, lanes: int) -> Expr:
    if isinstance(value, float):
        value = T.float32(value)
    return T.broadcast(value, lanes) if lanes > 1 else value


def _span(start: Expr, lanes: int) -> Expr:
    return T.ramp(i64(start), i64(1), lanes) if lanes > 1 else i64(start)


def load(buffer: Buffer, *index: Expr, lanes: int = 1) -> Expr:
    """`lanes` consecutive elements, the first at `index`."""
    return tirx.BufferLoad(buffer, [*map(i64, index[:-1]), _span(index[-1], lanes)])


def store(buffer: Buffer, value: Expr, *index: Expr) -> None:
    """Store a vector (or a scalar) to consecutive elements, the first at `index`."""
    T.buffer_store(buffer, value, [*map(i64, index[:-1]), _span(index[-1], lanes_of(value))])


def prefetch(buffer: Buffer, *index: Expr) -> None:
    """Ask for the cache line of an element, which may lie past the end of the buffer."""
    read, keep, data = T.int32(0), T.int32(3), T.int32(1)
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch.p0", T.address_of(load(buffer, *index)), read, keep, data))


class Register:
    """A variable that loops update: LLVM keeps it in a register (its own buffer of less than 1 KB is promoted)."""

    def __init__(self, initial: Expr) -> None:
        self.lanes = lanes_of(initial)
        self.buffer = T.alloc_buffer((i64(self.lanes),), str(initial.ty.dtype.with_lanes(1)))
        self.set(initial)

    def get(self) -> Expr:
        return load(self.buffer, 0, lanes=self.lanes)

    def set(self, value: Expr) -> None:
        store(self.buffer, value, 0)


def blocks(extent: int, lanes: int) -> list[tuple[int, int]]:
    """(start, lanes) of the vectors that cover a static extent; the last may be narrower."""
    return [(start, min(lanes, extent - start)) for start in range(0, extent, lanes)]


def shuffle(vectors: Sequence[Expr], indices: Sequence[int]) -> Expr:
    return T.Shuffle(list(vectors), list(indices))


def widen(vector: Expr, lanes: int) -> Expr:
    """Append zeros up to `lanes`."""
    have = lanes_of(vector)
    return vector if have == lanes else shuffle([vector, splat(0.0, lanes)], range(lanes))


def narrow(vector: Expr, lanes: int) -> Expr:
    """The first `lanes` lanes."""
    return vector if lanes_of(vector) == lanes else shuffle([vector], range(lanes))


def _fold(vector: Expr, combine: Callable[[Expr, Expr], Expr]) -> Expr:
    """Combine a power of two of lanes in a tree (LLVM's own float reductions run lane by lane)."""
    while (lanes := lanes_of(vector)) > 1:
        low, high = range(lanes // 2), range(lanes // 2, lanes)
        vector = bind(combine(shuffle([vector], low), shuffle([vector], high)))
    return vector


def reduce_sum(vector: Expr) -> Expr:
    return _fold(vector, lambda a, b: a + b)


def reduce_max(vector: Expr) -> Expr:
    return _fold(vector, tirx.max)


class LaneSums:
    """V vectors of V lanes, added one by one -> one vector whose lane i is the sum of vector i.

    Vectors merge in pairs as in a binary counter, so that few are alive at a time. Two levels add neighbours inside
    128-bit blocks, the others add neighbouring blocks: all are one-instruction shuffles on x86.
    """

    def __init__(self, merged: int = 1) -> None:
        """merged: of how many (1 or 4) vectors each added one is already the result."""
        self.pending: list[Expr] = []
        self.count = 0
        self.first_level = 0 if merged == 1 else 2

    def add(self, vector: Expr) -> None:
        count, level = self.count, self.first_level
        while count & 1:
            vector = _add_neighbours(self.pending.pop(), vector, lanes_of(vector), 1 if level < 2 else 4)
            count, level = count >> 1, level + 1
        self.pending.append(vector)
        self.count += 1

    def result(self) -> Expr:
        (total,) = self.pending
        return total


def _add_neighbours(a: Expr, b: Expr, lanes: int, unit: int) -> Expr:
    """Sums of neighbouring units of `a`, then of `b`: within each 128-bit block if a unit is one lane."""
    span = 4 if unit == 1 else lanes
    even = [
        source + block + at + lane
        for block in range(0, lanes, span)
        for source in (0, lanes)
        for at in range(0, span, 2 * unit)
        for lane in range(unit)
    ]
    return bind(shuffle([a, b], even) + shuffle([a, b], [index + unit for index in even]))


def transpose(rows: Sequence[Expr]) -> list[Expr]:
    """V vectors of V lanes, transposed: exchange blocks of V/2, then V/4, … lanes between rows that far apart."""
    rows, lanes = list(rows), len(rows)
    half = lanes // 2
    while half:
        keep = [lane if not lane & half else lanes + lane - half for lane in range(lanes)]
        move = [lane + half if not lane & half else lanes + lane for lane in range(lanes)]
        for i in (i for i in range(lanes) if not i & half):
            a, b = rows[i], rows[i + half]
            rows[i], rows[i + half] = bind(shuffle([a, b], keep)), bind(shuffle([a, b], move))
        half //= 2
    return rows


# Storage types -------------------------------------------------------------------------------------------------------


def load_f32(isa: Isa, buffer: Buffer, *index: Expr, lanes: int = 1) -> Expr:
    """Load float32, float16, or bfloat16 (as uint16 bit patterns) as float32."""
    return to_f32(isa, load(buffer, *index, lanes=lanes))


def store_f32(isa: Isa, buffer: Buffer, value: Expr, *index: Expr) -> None:
    """Store float32 as float32, float16, or bfloat16 (as uint16 bit patterns), rounding to nearest even."""
    store(buffer, _from_f32(isa, value, str(buffer.ty.dtype)), *index)


def to_f32(isa: Isa, value: Expr) -> Expr:
    lanes, dtype = lanes_of(value), str(value.ty.dtype.with_lanes(1))
    if dtype == "float32":
        return value
    if dtype == "uint16":
        return _as_f32(_u32(value) << splat(T.uint32(16), lanes))
    if isa.has_f16_convert:
        return T.cast(value, _vector("float32", lanes))
    # Move exponent and mantissa into place, then correct the exponent's bias by a multiplication (also right for
    # subnormals; infinities and NaN become large numbers, which no weight or cache entry is).
    bits = bind(_u32(T.reinterpret(_vector("uint16", lanes), value)))
    magnitude = _as_f32((bits & splat(T.uint32(0x7FFF), lanes)) << splat(T.uint32(13), lanes)) * splat(2.0**112, lanes)
    sign = (bits & splat(T.uint32(0x8000), lanes)) << splat(T.uint32(16), lanes)
    return _as_f32(_as_u32(bind(magnitude)) | sign)


def _from_f32(isa: Isa, value: Expr, dtype: str) -> Expr:
    lanes = lanes_of(value)
    if dtype == "float32":
        return value
    if dtype == "uint16":
        return T.cast(_round_shift(bind(_as_u32(value)), 16), _vector("uint16", lanes))
    if isa.has_f16_convert:
        return T.cast(value, _vector("float16", lanes))
    return T.reinterpret(_vector("float16", lanes), T.cast(_f16_bits(bind(value)), _vector("uint16", lanes)))


def _f16_bits(value: Expr) -> Expr:
    """float32 -> float16 bit patterns with integer instructions. Out of range saturates to the largest float16."""
    lanes = lanes_of(value)
    bits = bind(_as_u32(value))
    magnitude = bind(tirx.min(_as_f32(bits & splat(T.uint32(0x7FFFFFFF), lanes)), splat(65504.0, lanes)))
    normal = _round_shift(bind(_as_u32(magnitude) - splat(T.uint32(112 << 23), lanes)), 13)
    # Adding 0.5 puts the float16 subnormal's unit, 2**-24, at the last place of the float32 mantissa.
    subnormal = _as_u32(magnitude + splat(0.5, lanes)) - splat(T.uint32(0x3F000000), lanes)
    absolute = T.Select(magnitude < splat(2.0**-14, lanes), subnormal, normal)
    return absolute | ((bits >> splat(T.uint32(16), lanes)) & splat(T.uint32(0x8000), lanes))


def _round_shift(bits: Expr, shift: int) -> Expr:
    """bits >> shift, rounded to nearest even."""
    lanes = lanes_of(bits)
    kept = (bits >> splat(T.uint32(shift), lanes)) & splat(T.uint32(1), lanes)
    return (bits + splat(T.uint32((1 << (shift - 1)) - 1), lanes) + kept) >> splat(T.uint32(shift), lanes)


def _vector(dtype: str, lanes: int) -> str:
    return f"{dtype}x{lanes}" if lanes > 1 else dtype


def _u32(value: Expr) -> Expr:
    return T.cast(value, _vector("uint32", lanes_of(value)))


def _as_u32(value: Expr) -> Expr:
    return T.reinterpret(_vector("uint32", lanes_of(value)), value)


def _as_f32(value: Expr) -> Expr:
    return T.reinterpret(_vector("float32", lanes_of(value)), value)


# Elementary functions ------------------------------------------------------------------------------------------------

# exp(r) on |r| <= ln(2)/2: the Cephes library's expf coefficients, highest power first.
EXP_POLYNOMIAL = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
    1.0,
    1.0,
)
LOG2_E = 1.44269504088896341
LN_2 = (0.693359375, -2.12194440e-4)  # in two parts: a whole number times the first is exact
# Adding 1.5 * 2**23 rounds to an integer, which then stands in the low mantissa bits: no rounding instruction needed.
ROUND = 12582912.0


def round_to_int32(x: Expr) -> Expr:
    """The nearest integers, ties to even, of |x| < 2**22."""
    return T.reinterpret(_vector("int32", lanes_of(x)), _shifted(x) - _as_u32(splat(ROUND, lanes_of(x))))


def _shifted(x: Expr) -> Expr:
    # Subtract as integers: TVM compiles with fast-math flags, under which LLVM cancels ROUND - ROUND.
    return bind(_as_u32(x + splat(ROUND, lanes_of(x))))


def exp(isa: Isa, x: Expr) -> Expr:
    """exp(x), relative error below 3e-7, saturating below -87.3; above 88 saturating or infinite.

    (TIR's own exp calls libm for each lane.)
    """
    lanes = lanes_of(x)
    x = tirx.max(x, splat(-87.3, lanes))
    if lanes == isa.lanes == 16:  # AVX-512 rounds, and multiplies with a power of two, in one instruction each
        x = bind(x)
        n = bind(T.call_llvm_pure_intrin("float32x16", "llvm.nearbyint.v16f32", x * splat(LOG2_E, lanes)))
        exponential = _exp_remainder(x, n)
        scale, one = "llvm.x86.avx512.mask.scalef.ps.512", T.int16(-1)
        return bind(T.call_llvm_pure_intrin("float32x16", scale, exponential, n, exponential, one, T.int32(4)))
    x = bind(tirx.min(x, splat(88.0, lanes)))
    shifted = _shifted(x * splat(LOG2_E, lanes))
    n = T.reinterpret(_vector("int32", lanes), shifted - _as_u32(splat(ROUND, lanes)))
    n = bind(T.cast(n, _vector("float32", lanes)))
    power = _as_f32((shifted << splat(T.uint32(23), lanes)) + splat(T.uint32(0x3F800000), lanes))  # 2**n
    return bind(_exp_remainder(x, n) * power)


def _exp_remainder(x: Expr, n: Expr) -> Expr:
    """exp(x - n * ln(2)) for the whole number n nearest to x / ln(2)."""
    lanes = lanes_of(x)
    r = x
    for part in LN_2:
        r = bind(r - n * splat(part, lanes))
    p = splat(EXP_POLYNOMIAL[0], lanes)
    for coefficient in EXP_POLYNOMIAL[1:]:
        p = bind(p * r + splat(coefficient, lanes))
    return p


# Loops ---------------------------------------------------------------------------------------------------------------


def parallel_for(extent: Expr, body: Callable[[Expr], None]) -> None:
    """Run body(i) for i < extent on all threads; inline if extent is 1, where waking them costs more than the work."""
    with T.If(extent == 1):
        with T.Then():
            body(i64(0))
        with T.Else(), T.parallel(extent) as i:
            body(i)


def for_each_block(extent: int, lanes: int, body: Callable[[Expr, int], None]) -> None:
    """body(start, lanes) over a static extent: a loop over whole vectors, then one narrower vector."""
    if extent >= lanes:
        with T.serial(i64(extent // lanes)) as block:
            body(block * lanes, lanes)
    if extent % lanes:
        body(i64(extent // lanes * lanes), extent % lanes)

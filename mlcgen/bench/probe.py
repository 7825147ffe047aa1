"""The machine's peaks: how fast all threads together read memory and multiply-add. Kernels compiled for this CPU."""

import os
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import numpy as np
import tvm
from tvm.runtime import tensor
from tvm.tirx.script import builder as T  # noqa: N812

from mlcgen.targets.cpu import cpu_target
from mlcgen.targets.cpu_kernels import Isa
from mlcgen.targets.cpu_kernels.vector import Expr, Register, bind, i64, kernel, load, splat, store

REGISTERS = 12  # independent sums: enough to hide the latency of a multiply-add
STEPS = 1 << 17
ROW = 128  # float32 values that one step of the reading loop takes
SECONDS = 0.1  # to spend on each figure

Step = Callable[[Expr, Expr], Expr]  # (sums, 64 bytes or less of input) -> sums


def multiply_add(isa: Isa, threads: int) -> Any:
    """PrimFunc(x (16,) float32, out (threads, 16)): float32 multiply-adds in registers."""
    return _in_registers(threads, isa.lanes, "float32", lambda total, x: total * x + x)


def dot_int8(threads: int) -> Any:
    """AVX-512 VNNI: each lane adds four products of 8-bit integers."""

    def step(total: Expr, x: Expr) -> Expr:
        operands = T.reinterpret("uint8x64", x), T.reinterpret("int8x64", x)
        return T.call_llvm_pure_intrin("int32x16", "llvm.x86.avx512.vpdpbusd.512", total, *operands)

    return _in_registers(threads, 16, "int32", step)


def _in_registers(threads: int, lanes: int, dtype: str, step: Step) -> Any:
    one = {"float32": T.float32, "int32": T.int32}[dtype]
    with kernel("in_registers") as k:
        x, out = k.arg("x", (16,), "float32"), k.arg("out", (threads, 16), dtype)
        with T.parallel(i64(threads)) as i:
            value = bind(load(x, 0, lanes=lanes))
            sums = [Register(splat(one(j), lanes)) for j in range(REGISTERS)]
            with T.serial(i64(STEPS)):
                for register in sums:
                    register.set(step(register.get(), value))
            _store_total(out, sums, i)
    return k.func


def read(threads: int) -> Any:
    """PrimFunc(x (threads, rows, ROW) float32, out (threads, 16)): a sum over memory, a contiguous part per thread."""
    with kernel("read") as k:
        rows = k.symbol("rows")
        x, out = k.arg("x", (threads, rows, ROW), "float32"), k.arg("out", (threads, 16), "float32")
        with T.parallel(i64(threads)) as i:
            sums = [Register(splat(0.0, 16)) for _ in range(ROW // 16)]
            with T.serial(rows) as row:
                for j, register in enumerate(sums):
                    register.set(register.get() + load(x, i, row, j * 16, lanes=16))
            _store_total(out, sums, i)
    return k.func


def _store_total(out: Any, sums: Sequence[Register], thread: Expr) -> None:
    """Without a use of the sums there would be nothing to compute."""
    for register in sums[1:]:
        sums[0].set(sums[0].get() + register.get())
    store(out, sums[0].get(), thread, 0)


class Peaks:
    """The kernels, compiled for `target`."""

    def __init__(self, threads: int, target: Any, features: Sequence[str] = ()) -> None:
        isa = Isa.from_target(target)
        self.threads = threads
        self._read = _build(read(threads), target)
        kernels = {"float32": (multiply_add(isa, threads), 2 * isa.lanes)}  # name: (kernel, operations per register)
        if "avx512vnni" in features:
            kernels["int8"] = (dot_int8(threads), 2 * 4 * 16)
        self._compute = {name: (_build(func, target), flops) for name, (func, flops) in kernels.items()}
        self._memory: dict[int, Any] = {}  # size -> what is read

    def bytes_per_s(self, size: int, seconds: float = SECONDS) -> float:
        """Read bandwidth over about `size` bytes, again and again: from the caches as far as they hold them."""
        if size not in self._memory:
            rows = max(1, size // self.threads // (4 * ROW))
            self._memory[size] = tensor(np.ones((self.threads, rows, ROW), np.float32))
        x, out = self._memory[size], tensor(np.zeros((self.threads, 16), np.float32))
        return float(np.prod(x.shape)) * 4 / best_seconds(lambda: self._read(x, out), seconds)

    def ops_per_s(self, dtype: str, seconds: float = SECONDS) -> float:
        """Multiplications and additions of one of `dtypes`."""
        run, ops = self._compute[dtype]
        x = tensor(np.full(16, 0.5, np.float32))
        out = tensor(np.zeros((self.threads, 16), "int32" if dtype == "int8" else "float32"))
        return self.threads * STEPS * REGISTERS * ops / best_seconds(lambda: run(x, out), seconds)

    @property
    def dtypes(self) -> list[str]:
        """Of the factors: float32, and int8 (summed in int32) where the CPU has instructions for it."""
        return list(self._compute)


def _build(func: Any, target: Any) -> Callable[..., None]:
    main = func.with_attr("global_symbol", "main")
    return tvm.compile(tvm.IRModule({"main": main}), target=target)["main"]


def best_seconds(run: Callable[[], None], seconds: float) -> float:
    """The fastest of the runs that fit into `seconds`, at least three."""
    best, rounds, end = float("inf"), 0, perf_counter() + seconds
    while rounds < 3 or perf_counter() < end:
        start = perf_counter()
        run()
        best, rounds = min(best, perf_counter() - start), rounds + 1
    return best


def open_probe(threads: int) -> Callable[..., dict[str, Any]]:
    """Compile the kernels for this machine; the answer measures them all: sizes in bytes -> the peaks."""
    os.environ["TVM_NUM_THREADS"] = str(threads)  # read when the first kernel runs
    target = cpu_target()
    peaks = Peaks(threads, tvm.target.Target(target.tvm), target.features)

    def measure(sizes: Sequence[int]) -> dict[str, Any]:
        return {
            "bytes_per_s": {str(size): peaks.bytes_per_s(size) for size in sizes},
            "ops_per_s": {dtype: peaks.ops_per_s(dtype) for dtype in peaks.dtypes},
        }

    return measure

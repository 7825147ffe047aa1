"""Time the CPU kernels at a model's sizes, against the measured multiply-add and memory peaks of this machine.

Warm: the same arguments again and again. Cold: arguments that rotate over more memory than the caches hold, as the
layers of a model do.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from time import perf_counter

import numpy as np
import tvm
from tvm.runtime import tensor

from mlcgen.bench.probe import Peaks
from mlcgen.formats import BF16, F16, F32, Q4, Q8, WeightFormat, grouped
from mlcgen.targets.cpu_kernels import (
    Isa,
    add_rms_norm,
    embedding,
    linear,
    paged_attention,
    rms_norm,
    rope_append,
    silu_mul,
)

FORMATS = {fmt.name: fmt for fmt in (F32, F16, BF16, Q8, Q4, grouped(4, has_minimum=True))}
COLD_BYTES = 128 << 20


@dataclass(frozen=True)
class Model:
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    layers: int


MODELS = {
    "smollm2-135m": Model(576, 1536, 9, 3, 64, 49152, 30),
    "llama-3.2-1b": Model(2048, 8192, 32, 8, 64, 128256, 16),
    "qwen3-0.6b": Model(1024, 3072, 16, 8, 128, 151936, 28),
}


@dataclass(frozen=True)
class Case:
    """One kernel with what it does once: bytes that come from memory (weights, cache) and floating-point operations."""

    name: str
    make: Callable[[Isa], tvm.tirx.PrimFunc]
    args: list[np.ndarray]
    bytes: int
    flops: int
    calls: int = 1  # for each forward pass


def linear_cases(fmt: WeightFormat, model: Model, n: int) -> Iterator[Case]:
    head_dim = model.head_dim
    shapes = {
        "qkv": ((model.heads + 2 * model.kv_heads) * head_dim, model.hidden, model.layers),
        "o": (model.hidden, model.heads * head_dim, model.layers),
        "gate_up": (2 * model.intermediate, model.hidden, model.layers),
        "down": (model.hidden, model.intermediate, model.layers),
    }
    if n == 1:
        shapes["lm_head"] = (model.vocab, model.hidden, 1)
    for name, (rows, columns, calls) in shapes.items():
        parts = random_parts(fmt, rows, columns)
        yield Case(
            f"linear {fmt.name} {name} {rows}x{columns}, n={n}",
            lambda isa, rows=rows, columns=columns: linear(fmt, rows, columns, isa),
            [f32(n, columns), *parts, f32(n, rows)],
            sum(part.nbytes for part in parts),
            2 * n * rows * columns,
            calls,
        )


def attention_case(model: Model, kv_dtype: str, page_size: int, cached: int, new: int) -> Case:
    num_pages = -(-(cached + new) // page_size)
    cell = (2, model.kv_heads, page_size, model.head_dim)
    pages = np.random.default_rng(0).standard_normal((num_pages, *cell), np.float32)
    pages = pages.view(np.uint32).astype(np.uint16) if kv_dtype == "bfloat16" else pages.astype(kv_dtype)
    sizes = (model.heads, model.kv_heads, model.head_dim, page_size, kv_dtype, model.head_dim**-0.5, 0)
    block_table = np.arange(num_pages, dtype=np.int32)[None]
    lengths, starts = np.int32([cached + new]), np.int32([0, new])
    positions = np.arange(cached, cached + new, dtype=np.int32)
    q = f32(new, model.heads, model.head_dim)
    return Case(
        f"attention {kv_dtype}, {new} new after {cached}",
        lambda isa: paged_attention(*sizes, isa),
        [q, pages, block_table, lengths, starts, positions, np.zeros_like(q)],
        pages.nbytes,
        4 * model.heads * model.head_dim * int((positions + 1).sum()),
        model.layers,
    )


def other_cases(fmt: WeightFormat, model: Model, kv_dtype: str, page_size: int, n: int) -> Iterator[Case]:
    hidden, features, half = model.hidden, model.intermediate, model.head_dim // 2
    x, weight = f32(n, hidden), f32(hidden)
    qkv = f32(n, (model.heads + 2 * model.kv_heads) * model.head_dim)
    pages = np.zeros((-(-n // page_size), 2, model.kv_heads, page_size, model.head_dim), storage(kv_dtype))
    slots, ids = np.arange(n, dtype=np.int32), np.zeros(n, np.int32)
    sizes = (model.heads, model.kv_heads, model.head_dim, page_size, kv_dtype)
    q_out = f32(n, model.heads, model.head_dim)
    rope_args = [qkv, f32(n, half), f32(n, half), slots, pages, q_out]
    table = random_parts(fmt, model.vocab, hidden)

    def case(name: str, make: Callable[[Isa], tvm.tirx.PrimFunc], args: list[np.ndarray], calls: int) -> Case:
        return Case(f"{name}, n={n}", make, args, sum(a.nbytes for a in args), 0, calls)

    yield case("rms_norm", lambda isa: rms_norm(hidden, 1e-5, isa), [x, weight, x.copy()], 1)
    add_args = [x, x.copy(), weight, x.copy(), x.copy()]
    yield case("add_rms_norm", lambda isa: add_rms_norm(hidden, 1e-5, isa), add_args, 2 * model.layers)
    yield case("silu_mul", lambda isa: silu_mul(features, isa), [f32(n, 2 * features), f32(n, features)], model.layers)
    yield case("rope_append", lambda isa: rope_append(*sizes, isa), rope_args, model.layers)
    embed = Case(f"embedding, n={n}", lambda isa: embedding(fmt, model.vocab, hidden, isa), [], 2 * x.nbytes, 0)
    yield Case(embed.name, embed.make, [ids, *table, x.copy()], embed.bytes, 0)


def f32(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def storage(kv_dtype: str) -> str:
    return "uint16" if kv_dtype == "bfloat16" else kv_dtype


def random_parts(fmt: WeightFormat, n: int, k: int) -> list[np.ndarray]:
    """Stored tensors of a random matrix: only their sizes and that they are ordinary numbers matter."""
    rng = np.random.default_rng(0)
    parts = []
    for _, shape, dtype in fmt.parts(n, k):
        floats = dtype.startswith("float")
        random = rng.standard_normal(shape, np.float32) if floats else rng.integers(0, 256, shape, np.uint8)
        parts.append(random.astype(dtype))
    return parts


class Timer:
    def __init__(self, target: tvm.target.Target, threads: int) -> None:
        self.target, self.isa = target, Isa.from_target(target)
        peaks = Peaks(threads, target)
        self.peak_flops, self.peak_bytes = peaks.ops_per_s("float32", 0.3), peaks.bytes_per_s(COLD_BYTES, 0.5)

    def build(self, make: Callable[[Isa], tvm.tirx.PrimFunc]) -> Callable[..., None]:
        func = make(self.isa).with_attr("global_symbol", "main")
        return tvm.compile(tvm.IRModule({"main": func}), target=self.target)["main"]

    def best(self, run: Callable[..., None], arg_sets: list[list[np.ndarray]], seconds: float) -> float:
        """The fastest of several rounds, per call."""
        sets = [[tensor(a) for a in args] for args in arg_sets]
        args, best, end = cycle(sets), float("inf"), perf_counter() + seconds
        calls, rounds = len(sets), 0
        while rounds < 3 or perf_counter() < end:
            start = perf_counter()
            for _ in range(calls):
                run(*next(args))
            elapsed = perf_counter() - start
            best, rounds = min(best, elapsed / calls), rounds + 1
            if elapsed < 1e-3 and len(sets) == 1:
                calls *= 2
        return best

    def report(self, case: Case, seconds: float) -> float:
        """Print one line; return the cold time of all calls of a forward pass."""
        run = self.build(case.make)
        copies = max(2, COLD_BYTES // sum(a.nbytes for a in case.args))
        warm = self.best(run, [case.args], seconds)
        cold = self.best(run, [case.args] * min(copies, 256), seconds)
        flops, bandwidth = case.flops / warm, case.bytes / cold
        print(
            f"{case.name:48s} {warm * 1e6:10.1f} {cold * 1e6:10.1f}"
            f" {bandwidth / 1e9:7.1f} {100 * bandwidth / self.peak_bytes:4.0f}%"
            f" {flops / 1e9:7.1f} {100 * flops / self.peak_flops:4.0f}%",
            flush=True,
        )
        return cold * case.calls


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smollm2-135m", help="whose sizes")
    parser.add_argument("--format", choices=FORMATS, default="q4", help="of the weights")
    parser.add_argument("--kv-dtype", choices=["float32", "float16", "bfloat16"], default="float16")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--mcpu", default="x86-64-v4", help="LLVM's name of the CPU to compile for")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prefill")
    parser.add_argument("--context", type=int, default=512, help="cached tokens of the decode step")
    parser.add_argument("--seconds", type=float, default=0.3, help="to spend on each figure")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    os.environ["TVM_NUM_THREADS"] = str(args.threads)  # read when the first kernel runs
    model, fmt = MODELS[args.model], FORMATS[args.format]
    timer = Timer(tvm.target.Target({"kind": "llvm", "mcpu": args.mcpu}), args.threads)
    print(f"{args.mcpu}, {args.threads} threads, TVM {tvm.__version__}")
    print(f"peaks: {timer.peak_flops / 1e9:.0f} GFLOP/s, {timer.peak_bytes / 1e9:.1f} GB/s from memory")
    print(f"{'':48s} {'warm us':>10s} {'cold us':>10s} {'GB/s':>7s} {'':5s} {'GFLOP/s':>7s}")
    for n, cached in ((1, args.context - 1), (args.prompt, 0)):
        linears = sum(timer.report(case, args.seconds) for case in linear_cases(fmt, model, n))
        attention = timer.report(attention_case(model, args.kv_dtype, args.page_size, cached, n), args.seconds)
        others = [timer.report(c, args.seconds) for c in other_cases(fmt, model, args.kv_dtype, args.page_size, n)]
        total = linears + attention + sum(others)
        print(
            f"n={n}: {1e3 * total:.2f} ms a forward pass, {n / total:.0f} tokens/s: linears {1e3 * linears:.2f}, "
            f"attention {1e3 * attention:.2f}, others {1e3 * sum(others):.2f} ms\n"
        )


if __name__ == "__main__":
    main()

"""The CUDA target's attention alone: decoding against the card's copy bandwidth, prompts against PyTorch's SDPA.

    python benchmarks/attention_cuda.py build DIR      # anywhere: needs the compiler, no GPU
    python benchmarks/attention_cuda.py run DIR        # on the GPU: needs neither

Llama-3-8B's heads (32 query, 8 key/value, 128 values each), pages of 16 tokens, float16. Decoding is rotation, append
and attention in one kernel. A time is that of one launch in a graph of many; those take turns with caches that together
exceed the second-level cache.
"""

import argparse
import base64
import ctypes
import dataclasses
import json
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from mlcgen.bench.cuda_probe import open_cuda_probe
from mlcgen.runtime.cuda import CudaDevice
from mlcgen.runtime.sizes import evaluate

HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 32, 8, 128, 16
TOKEN_BYTES = 2 * KV_HEADS * HEAD_DIM * 2  # keys and values of a token
DECODE = [(1, 512), (1, 4096), (16, 512), (16, 4096), (64, 512), (64, 1024)]  # sequences, cached tokens
PREFILL = [(1, 512), (1, 1024), (1, 4096), (8, 512)]  # sequences, tokens of each
CACHE_BYTES = 400 << 20  # of the caches that launches take turns with
LAUNCHES = 24


def build(folder: Path) -> None:
    """Machine code for an H100, and the launches as a plan would hold them."""
    from mlcgen.nvrtc import compile_cuda
    from mlcgen.targets.base import Attention as Spec
    from mlcgen.targets.cuda_kernels import paged_attention, rope_attention

    spec = Spec(HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, "float16", HEAD_DIM**-0.5, 0)
    kernels = {"decode": rope_attention(spec, "sm_90"), "prefill": paged_attention(spec, "sm_90")}
    codes = {
        name: kernel.generate(["float16" if p.narrow else p.dtype for p in kernel.params])
        for name, kernel in kernels.items()
    }
    functions = {name: text for code in codes.values() for name, text in code.functions.items()}
    includes = "".join(f'#include "{name}"\n' for name in codes["decode"].includes)
    module, _ = compile_cuda(includes + "".join(functions.values()), "sm_90")
    made: dict[str, Any] = {"module": base64.b64encode(module).decode(), "functions": list(functions)}
    for name, code in codes.items():
        variants = [dataclasses.asdict(variant) for variant in code.variants]
        made[name] = {"variants": variants, "scratch": code.scratch}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "attention.json").write_text(json.dumps(made))


class Attention:
    """The kernel on a batch of sequences of one length, each with `new` tokens at its end, which in decoding are turned
    and appended, too."""

    def __init__(self, device: CudaDevice, plan: dict[str, Any], sequences: int, length: int, new: int) -> None:
        self.device, self.plan = device, plan["decode" if new == 1 else "prefill"]
        blocks = -(-length // PAGE_SIZE)
        pages = sequences * blocks
        self.symbols = {"n": sequences * new, "seqs": sequences, "blocks": blocks, "num_pages": pages}
        self.symbols |= {"is_decode": int(new == 1), "has_trees": 0, "longest": 1 << (length - 1).bit_length()}
        turns = max(1, CACHE_BYTES // (pages * PAGE_SIZE * TOKEN_BYTES))
        rng = np.random.default_rng(0)
        cache = rng.standard_normal(pages * PAGE_SIZE * TOKEN_BYTES // 2, np.float32).astype(np.float16)
        self.caches = [self.uploaded(cache) for _ in range(turns)]
        heads = HEADS + 2 * KV_HEADS if new == 1 else HEADS
        queries = rng.standard_normal((sequences * new, heads, HEAD_DIM), np.float32).astype(np.float16)
        table = rng.permutation(pages).reshape(sequences, blocks)
        lengths, starts = np.full(sequences, length), np.arange(sequences + 1) * new
        positions = np.tile(np.arange(length - new, length), sequences)
        no_trees = np.zeros(sequences * new)
        integers = [self.uploaded(a.astype(np.int32)) for a in (table, lengths, starts, no_trees, positions)]
        given = [self.uploaded(queries)]
        if new == 1:
            angles = [self.uploaded(np.full((sequences, HEAD_DIM // 2), a, np.float32)) for a in (0.6, 0.8)]
            slots = table[:, -1] * PAGE_SIZE + (length - 1) % PAGE_SIZE
            given += [*angles, self.uploaded(slots.astype(np.int32))]
        self.arguments = [[*given, cache, *integers, self.uploaded(queries)] for cache in self.caches]
        self.scratch = device.allocate(max(evaluate(self.plan["scratch"], self.symbols), 1), "partial results")
        self.counters = device.allocate(1 << 16, "counters")

    def uploaded(self, array: np.ndarray) -> int:
        address = self.device.allocate(array.nbytes, "attention")
        self.device.upload(address, array)
        self.device.synchronize()
        return address

    def seconds(self) -> float:
        """Of one launch: the best of several replays."""
        with self.device.capture() as graph:
            for turn in range(LAUNCHES):
                self.start(self.arguments[turn % len(self.arguments)])
        self.device.launch_graph(graph)
        self.device.synchronize()
        times = []
        for _ in range(7):
            begin = perf_counter()
            self.device.launch_graph(graph)
            self.device.synchronize()
            times.append((perf_counter() - begin) / LAUNCHES)
        return min(times)

    def start(self, tensors: list[int]) -> None:
        variant = next(v for v in self.plan["variants"] if evaluate(v["when"], self.symbols))
        for launch in variant["launches"]:
            grid = [evaluate(size, self.symbols) for size in launch["grid"]]
            shared = evaluate(launch["shared"], self.symbols)
            args = [self.argument(kind, value, tensors) for kind, value in launch["args"]]
            self.device.launch(launch["function"], grid, launch["block"], shared, args, launch["overlaps"])

    def argument(self, kind: str, value: Any, tensors: list[int]) -> Any:
        if kind == "float32":
            return ctypes.c_float(value)
        if kind == "int32":
            return ctypes.c_int32(evaluate(value, self.symbols))
        if kind == "tensor":
            return ctypes.c_uint64(tensors[value])
        return ctypes.c_uint64(self.scratch if kind == "scratch" else self.counters)


def sdpa_seconds(sequences: int, tokens: int) -> float:
    """PyTorch's attention on the same shapes, keys and values repeated for the queries that share them."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    shape = (sequences, HEADS, tokens, HEAD_DIM)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.float16) for _ in range(3))
    backend = torch.nn.attention.SDPBackend.FLASH_ATTENTION
    with torch.nn.attention.sdpa_kernel(backend):
        times = []
        for _ in range(7):
            torch.cuda.synchronize()
            begin = perf_counter()
            for _ in range(LAUNCHES):
                scaled_dot_product_attention(q, k, v, is_causal=True)
            torch.cuda.synchronize()
            times.append((perf_counter() - begin) / LAUNCHES)
    return min(times)


def run(folder: Path) -> None:
    plan = json.loads((folder / "attention.json").read_text())
    device = CudaDevice()
    device.load(base64.b64decode(plan["module"]), plan["functions"])
    copy = open_cuda_probe()(sizes=[0])["bytes_per_s"]["0"]
    print(f"{device.name}, copies {copy / 1e12:.2f} TB/s")
    for sequences, length in DECODE:
        seconds = Attention(device, plan, sequences, length, 1).seconds()
        rate = sequences * length * TOKEN_BYTES / seconds
        print(
            f"decode {sequences:3d} x {length:5d}: {seconds * 1e6:8.1f} us, {rate / 1e12:.2f} TB/s, {rate / copy:.0%}"
        )
    for sequences, tokens in PREFILL:
        seconds = Attention(device, plan, sequences, tokens, tokens).seconds()
        flops = 4 * HEADS * HEAD_DIM * sequences * tokens * (tokens + 1) // 2
        line = f"prefill {sequences} x {tokens:5d}: {seconds * 1e6:8.1f} us, {flops / seconds / 1e12:.0f} TFLOP/s"
        print(f"{line}, SDPA {sdpa_seconds(sequences, tokens) / seconds:.2f} times as long")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["build", "run"])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    (build if args.what == "build" else run)(args.folder)


if __name__ == "__main__":
    main()

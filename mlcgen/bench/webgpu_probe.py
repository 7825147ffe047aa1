"""The peaks of what WebGPU runs on: how fast it copies memory, and multiply-adds float32 in registers.

Not the tensor cores that a GPU may have: WGSL does not promise any.
"""

import ctypes
import json
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

from mlcgen.bench.cuda_probe import fastest
from mlcgen.runtime.webgpu import WebgpuDevice

SIZE = 1 << 30  # bytes of a copy, where a kernel reaches as many: more than a GPU's caches
THREADS = 256  # of a workgroup
COPY_GROUPS = 4096
MOST_GROUPS = 32768
STEPS = 256
SUMS = 8  # independent, of 4 lanes each: enough to hide the latency of a multiply-add
LONG_S = 5e-3  # of a call: far more than starting it takes

COPY = f"""
@group(0) @binding(0) var<storage, read_write> to: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> source: array<vec4<u32>>;

@compute @workgroup_size({THREADS})
fn copy(@builtin(global_invocation_id) id: vec3<u32>) {{
  for (var i = id.x; i < arrayLength(&source); i += {COPY_GROUPS * THREADS}u) {{
    to[i] = source[i];
  }}
}}
"""
_EACH = range(SUMS)
MULTIPLY_ADD = f"""
@group(0) @binding(0) var<storage, read_write> to: array<f32>;

@compute @workgroup_size({THREADS})
fn multiply_add(@builtin(local_invocation_index) thread: u32) {{
  let x = vec4<f32>(to[thread]);
  {" ".join(f"var a{i} = x * {i}.0;" for i in _EACH)}
  for (var step = 0u; step < {STEPS}u; step++) {{
    {" ".join(f"a{i} = fma(a{i}, x, x);" for i in _EACH)}
  }}
  to[thread] = dot({" + ".join(f"a{i}" for i in _EACH)}, x);  // without a use there would be nothing to compute
}}
"""


def open_webgpu_probe() -> Callable[..., dict[str, Any]]:
    """`sizes` are not looked at, as for CUDA."""
    device = WebgpuDevice()
    device.load(json.dumps({"copy": COPY, "multiply_add": MULTIPLY_ADD}).encode(), ["copy", "multiply_add"])
    size = min(SIZE, device.largest_binding)
    to, source = (ctypes.c_uint64(device.allocate(size, "the probe")) for _ in range(2))

    def copy() -> None:
        device.launch("copy", (COPY_GROUPS, 1, 1), THREADS, 0, (to, source))

    def multiply_add(groups: int) -> None:
        device.launch("multiply_add", (groups, 1, 1), THREADS, 0, (to,))

    groups = _groups(multiply_add, device.synchronize)
    ops = 2 * 4 * SUMS * STEPS * THREADS * groups

    def measure(sizes: Sequence[int]) -> dict[str, Any]:
        copied = 2 * size / fastest(copy, device.synchronize)
        computed = ops / fastest(lambda: multiply_add(groups), device.synchronize)
        return {"bytes_per_s": dict.fromkeys(map(str, sizes), copied), "ops_per_s": {"float32": computed}}

    return measure


def _groups(start: Callable[[int], None], wait: Callable[[], None]) -> int:
    """Workgroups that keep the device busy for a while: a GPU takes thousands, one in software few."""
    groups = 16
    start(groups)  # the first one compiles
    while groups < MOST_GROUPS:
        wait()
        begin = perf_counter()
        start(groups)
        wait()
        if perf_counter() - begin > LONG_S:
            break
        groups *= 2
    return groups

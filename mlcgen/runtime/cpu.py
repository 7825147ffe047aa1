"""What this machine's CPU can do, read from the CPU itself; no compiler needed."""

import ctypes
import functools
import os
import platform
from pathlib import Path

# /proc/cpuinfo's name of a feature -> LLVM's, where they differ
_LLVM_NAMES = {
    "abm": "lzcnt",
    "bmi1": "bmi",
    "sse4_2": "sse4.2",
    "avx512_vnni": "avx512vnni",
    "avx512_bf16": "avx512bf16",
    "avx_vnni": "avxvnni",
    "amx_tile": "amx-tile",
    "amx_int8": "amx-int8",
    "amx_bf16": "amx-bf16",
    "asimd": "neon",
    "asimddp": "dotprod",
    "asimdhp": "fullfp16",
}


@functools.cache
def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n")[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}


@functools.cache
def cpu_features() -> frozenset[str]:
    """LLVM's names of this CPU's features; empty where the system does not tell."""
    flags = (_cpuinfo().get("flags") or _cpuinfo().get("Features") or "").split()
    return frozenset(_LLVM_NAMES.get(flag, flag) for flag in flags)


def host_features() -> frozenset[str]:
    """Those that this process may use: the tile registers of AMX need the kernel's permission."""
    return cpu_features() if may_use_amx() else frozenset(f for f in cpu_features() if not f.startswith("amx-"))


@functools.cache
def may_use_amx() -> bool:
    """Asks Linux for AMX's tile data, once for this process and the threads that it starts later."""
    if "amx-tile" not in cpu_features():
        return False
    system_call, arch_prctl, request_permission, tile_data = ctypes.CDLL(None).syscall, 158, 0x1023, 18
    return int(system_call(arch_prctl, request_permission, tile_data)) == 0


def host_arch() -> str:
    """x86_64, aarch64, …: one name for each, whatever the system calls it."""
    machine = platform.machine()
    return {"arm64": "aarch64", "AMD64": "x86_64"}.get(machine, machine)


def host_cpu_name() -> str:
    return _cpuinfo().get("model name", "unknown CPU")


def usable_cores() -> int:
    """Cores that this process may run on: its affinity mask, and the container's CPU quota if there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores

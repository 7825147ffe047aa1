"""Which of an artifact's targets this machine runs, and why not the others."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mlcgen.errors import TargetError
from mlcgen.runtime import cuda, hip, metal, webgpu
from mlcgen.runtime.cpu import host_arch, host_features

TEGRA = (72, 87)  # small systems, whose machine code is another


def choose_target(entries: Sequence[Mapping[str, Any]], wanted: str) -> Mapping[str, Any]:
    """The entry for this machine that uses the most of it: of all, of a kind ("cuda"), or the named one."""
    problems = {str(e["name"]): cannot_run(e) for e in entries}
    meant = [e for e in entries if wanted in ("auto", e["name"], e.get("kind"))]
    if not meant:
        raise TargetError(f"target {wanted!r} is not in this artifact; it has: {', '.join(problems)}")
    able = [e for e in meant if problems[str(e["name"])] is None]
    if not able:
        reasons = "; ".join(f"{e['name']}: {problems[str(e['name'])]}" for e in meant)
        raise TargetError(f"this artifact has no target that runs here ({reasons}); compile it for this machine")
    # Of several for one GPU the newest machine code, for one CPU what uses most of it.
    return max(able, key=lambda e: (_speed(e), _generation(e), len(e.get("features", ()))))


# Kinds by what is expected of them. WebGPU comes before HIP and Metal until these have run on real hardware.
_SPEEDS = {"cuda": 3, "webgpu": 2, "rocm": 1, "metal": 1}


def _speed(entry: Mapping[str, Any]) -> int:
    """A GPU in software is slower than the CPU that it runs on."""
    kind = str(entry.get("kind"))
    if kind == "webgpu" and (adapter := webgpu.adapter()) is not None and adapter.is_software:
        return -1
    return _SPEEDS.get(kind, 0)


def cannot_run(entry: Mapping[str, Any]) -> str | None:
    """Why this machine cannot run a target's entry, or None."""
    if entry.get("kind") == "cuda":
        return _cannot_run_cuda(entry)
    if entry.get("kind") == "rocm":
        return hip.missing() or _other_gpu(entry)
    if entry.get("kind") in ("webgpu", "metal"):
        return webgpu.missing() if entry["kind"] == "webgpu" else metal.missing()
    machine = host_arch()
    if entry.get("executor") != "vm":
        return f"executor {entry.get('executor')!r} is not in this version"
    if entry.get("arch") != machine:
        return f"needs {entry.get('arch')}, this is {machine}"
    missing = sorted(set(entry.get("features", ())) - host_features())
    return f"this CPU has no {', '.join(missing)}" if missing else None


def not_taken(entries: Sequence[Mapping[str, Any]], taken: str) -> dict[str, str]:
    """Why the target named `taken` was chosen before each of the others."""
    others = [entry for entry in entries if entry["name"] != taken]
    return {str(entry["name"]): cannot_run(entry) or _slower(entry) for entry in others}


def _slower(entry: Mapping[str, Any]) -> str:
    return "a GPU in software" if _speed(entry) < 0 else "slower here, as a rule"


def _generation(entry: Mapping[str, Any]) -> int:
    """Machine code by its number, sm_90 -> 90; assembly (compute_80) and CPUs last."""
    kind, _, number = str(entry.get("arch")).partition("_")
    return int(number) if kind == "sm" and number.isdigit() else 0


def _cannot_run_cuda(entry: Mapping[str, Any]) -> str | None:
    if reason := cuda.missing():
        return reason
    found, arch = cuda.compute_capability(), str(entry.get("arch"))
    if found is None:
        return "the driver does not describe the GPU"
    known = re.fullmatch(r"(?:sm|compute)_(\d{2,3})", arch)
    if known is None:
        return f"needs {arch:.40}, which this version does not know"
    have, needed = int(found.removeprefix("sm_")), int(known[1])
    if arch.startswith("compute"):  # assembly, for this generation and all later ones
        runs = have >= needed
    else:  # machine code, for later members of a generation too, but for what Hopper and Blackwell have of their own
        same_kind = have // 10 == needed // 10 and have >= needed and have not in TEGRA
        runs = have == needed or (needed < 90 and same_kind)
    return None if runs else f"needs {arch}, this GPU is {found}"


def _other_gpu(entry: Mapping[str, Any]) -> str | None:
    """Why an AMD GPU does not run the entry's machine code, or None."""
    found = hip.architecture()
    return None if found == entry.get("arch") else f"needs {entry.get('arch')}, this GPU is {found}"

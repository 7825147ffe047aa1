"""What this machine can compile for and run; for each "no", what is missing and how to get it."""

import importlib.util
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from mlcgen.runtime.cpu import host_cpu_name, host_features

__all__ = ["Device", "devices"]


@dataclass(frozen=True)
class Missing:
    what: str
    remedy: str


@dataclass(frozen=True)
class Device:
    kind: str
    name: str
    can_compile: bool
    can_run: bool
    features: list[str] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


ABSENT = ("cuda", "rocm", "metal", "vulkan")  # target kinds that users may look for


def devices() -> list[Device]:
    """One entry per kind of target, what can be used first."""
    return [_cpu(), *(_absent(kind) for kind in ABSENT)]


def _cpu() -> Device:
    to_run = [] if _installed("tvm_ffi") else [Missing("the package apache-tvm-ffi", "pip install apache-tvm-ffi")]
    to_compile = [] if _installed("tvm") else [Missing("the package apache-tvm", "pip install apache-tvm")]
    if not _has_linker():
        to_compile.append(Missing("a linker", "pip install 'mlcgen[cross]', or install a C compiler"))
    missing = [*to_run, *to_compile]
    features = _used_features() if _installed("tvm") else host_features()
    return Device("cpu", host_cpu_name(), not missing, not to_run, sorted(features), missing)


def _used_features() -> Iterable[str]:
    """Those of this CPU's many features that our code is generated for."""
    from mlcgen.targets.cpu import cpu_target

    return cpu_target().features


def _has_linker() -> bool:
    return _installed("ziglang") or any(shutil.which(name) for name in ("cc", "gcc", "clang"))


def _absent(kind: str) -> Device:
    return Device(kind, "", False, False, [], [Missing(f"a {kind} target in this version of mlcgen", "use -t cpu")])


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None

"""Compile any LLM checkpoint once and run it anywhere."""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlcgen.compile import compile as compile
    from mlcgen.errors import MlcgenError as MlcgenError
    from mlcgen.runtime.grammar import StructuredOutput as StructuredOutput
    from mlcgen.runtime.llm import LLM as LLM
    from mlcgen.runtime.llm import AsyncEngine as AsyncEngine
    from mlcgen.runtime.options import EngineOptions as EngineOptions
    from mlcgen.runtime.sampler import SamplingParams as SamplingParams

    __version__: str

__all__ = [
    "LLM",
    "AsyncEngine",
    "EngineOptions",
    "MlcgenError",
    "SamplingParams",
    "StructuredOutput",
    "__version__",
    "compile",
]

# Loaded on first use (PEP 562): running an artifact must not import the compiler.
_HOMES = {
    "AsyncEngine": "mlcgen.runtime.llm",
    "EngineOptions": "mlcgen.runtime.options",
    "LLM": "mlcgen.runtime.llm",
    "MlcgenError": "mlcgen.errors",
    "SamplingParams": "mlcgen.runtime.sampler",
    "StructuredOutput": "mlcgen.runtime.grammar",
    "compile": "mlcgen.compile",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("mlcgen")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Python binds an imported submodule to its package, which would hide the function of the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value.compile if name == "compile" and isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Package

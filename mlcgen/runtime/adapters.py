"""Adapters that are loaded now: their names, slots and places in the prefix cache."""

from collections.abc import Iterator
from dataclasses import dataclass

from mlcgen.adapter_layout import AdapterLayout
from mlcgen.errors import RequestError, UnsupportedError
from mlcgen.runtime.executor import AdaptedExecutor, Executor
from mlcgen.runtime.peft import Matrices

__all__ = ["Adapter", "Adapters"]


@dataclass(frozen=True)
class Adapter:
    name: str
    slot: int
    cache_root: int  # never another's, so that no sequence reads what another adapter's weights computed


class Adapters:
    """Those of one executor."""

    def __init__(self, executor: Executor, roots: Iterator[int]) -> None:
        """roots: of trees in the prefix cache that nobody else has."""
        self._executor = executor if isinstance(executor, AdaptedExecutor) else None
        self._layout = self._executor.adapters if self._executor is not None else None
        self._loaded: dict[str, Adapter] = {}
        self._roots = roots

    def __len__(self) -> int:
        return len(self._loaded)

    @property
    def names(self) -> list[str]:
        return list(self._loaded)

    @property
    def layout(self) -> AdapterLayout:
        """Raises UnsupportedError where the artifact takes no adapters."""
        if self._layout is None:
            raise UnsupportedError("this artifact takes no adapters; compile it again with --lora-rank")
        return self._layout

    def load(self, name: str, matrices: Matrices) -> None:
        """matrices: what peft.read_adapter gives for the layout.

        Raises RequestError if the name is in use, or all slots are.
        """
        slots = set(range(self.layout.limits.slots)) - {adapter.slot for adapter in self._loaded.values()}
        if name in self._loaded:
            raise RequestError(f"an adapter {name!r} is loaded; unload it first, or choose another name")
        if not slots:
            raise RequestError(
                f"{len(self._loaded)} adapters are loaded, as many as there is room for; unload one of "
                f"{', '.join(self._loaded)[:200]}, or compile with a larger --adapters"
            )
        slot = min(slots)
        assert self._executor is not None
        self._executor.write_adapter(slot, matrices)
        self._loaded[name] = Adapter(name, slot, next(self._roots))

    def unload(self, name: str) -> None:
        """Its slot is free for another. Raises RequestError if there is no such adapter."""
        del self._loaded[self.find(name).name]

    def find(self, name: str) -> Adapter:
        """Raises RequestError, or UnsupportedError where the artifact takes no adapters."""
        if name not in self._loaded:
            have = ", ".join(self._loaded)[:200] if self.layout and self._loaded else "none"
            raise RequestError(f"no adapter {name!r:.80} is loaded; have: {have}")
        return self._loaded[name]

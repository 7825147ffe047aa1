"""Pages of preempted sequences, to the host and back, where that is sooner done than computing them anew."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby

from mlcgen.runtime.executor import Executor
from mlcgen.runtime.host_pages import FilePages, MemoryPages
from mlcgen.runtime.options import EngineOptions
from mlcgen.runtime.scheduler import Sequence, Transfer
from mlcgen.runtime.stats import Rates

__all__ = ["PageMover"]

SAVED_PER_PAGE = 8  # pages on the host for each on the device, at most


class PageMover:
    """Makes the scheduler's transfers. rates: what steps and transfers took so far."""

    def __init__(self, executor: Executor, options: EngineOptions) -> None:
        layers, layer_bytes = executor.page_shape
        # More would only be lists of numbers: what is preempted has been in the pages.
        self.num_host_pages = min(options.swap_bytes // (layers * layer_bytes), SAVED_PER_PAGE * executor.num_pages)
        self.rates = Rates()
        self.num_saved = self.num_loaded = 0
        self.seconds = 0.0  # that these took
        self._executor = executor
        self._host_pages: MemoryPages | FilePages = (
            MemoryPages(executor)
            if options.swap_file is None
            else FilePages(executor, self.num_host_pages, options.swap_file)
        )

    def move(self, transfers: list[Transfer]) -> None:
        """Copy pages on the device, to the host and back; those of a kind that follow each other together."""
        for kind, group in groupby(transfers, key=lambda transfer: transfer.kind):
            sources, targets = zip(*((transfer.source, transfer.to) for transfer in group), strict=True)
            if kind == "copy":
                for source, to in zip(sources, targets, strict=True):
                    self._executor.copy_page(source, to)
            elif kind == "save":
                self._host_pages.reserve(targets)
                with self._measured(len(sources)):
                    self._host_pages.save(sources, targets)
                self.num_saved += len(sources)
            else:
                with self._measured(len(sources)):
                    self._host_pages.load(sources, targets)
                self.num_loaded += len(sources)

    @contextmanager
    def _measured(self, num_pages: int) -> Iterator[None]:
        self._executor.synchronize()  # steps under way are not what is measured
        begun = time.perf_counter()
        yield
        seconds = time.perf_counter() - begun
        self.seconds += seconds
        self.rates.moved(num_pages, seconds)

    def prefers_saving(self, sequence: Sequence) -> bool:
        """Whether a sequence's pages are sooner saved and brought back than computed anew."""
        return 2 * len(sequence.table) * self.rates.page_seconds < sequence.num_computed * self.rates.token_seconds

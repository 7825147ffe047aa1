"""Pages of preempted sequences, to the host and back, where that is sooner done than computing them anew."""

import time

from mlcgen.runtime.executor import Executor
from mlcgen.runtime.host_pages import HostPages
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
        self._executor = executor
        self._host_pages = HostPages(self.num_host_pages, layers, layer_bytes, options.swap_file)

    def move(self, transfers: list[Transfer]) -> None:
        """Copy pages on the device, to the host and back."""
        begun, before = time.perf_counter(), self.num_saved + self.num_loaded
        for transfer in transfers:
            if transfer.kind == "copy":
                self._executor.copy_page(transfer.source, transfer.to)
            elif transfer.kind == "save":
                self._executor.read_page(transfer.source, self._host_pages[transfer.to])
                self.num_saved += 1
            else:
                self._executor.write_page(transfer.to, self._host_pages[transfer.source])
                self.num_loaded += 1
        if num_moved := self.num_saved + self.num_loaded - before:
            self.rates.moved(num_moved, time.perf_counter() - begun)

    def prefers_saving(self, sequence: Sequence) -> bool:
        """Whether a sequence's pages are sooner saved and brought back than computed anew."""
        return 2 * len(sequence.table) * self.rates.page_seconds < sequence.num_computed * self.rates.token_seconds

"""Texts without end: what stays of one that fills the window (StreamingLLM, Xiao et al., 2024; H2O)."""

from collections.abc import Iterator

import numpy as np

from mlcgen.errors import RequestError
from mlcgen.runtime.executor import Executor
from mlcgen.runtime.heavy_hitters import KeyLayout, heavy_hitters, key_norms, move_together
from mlcgen.runtime.options import EngineOptions
from mlcgen.runtime.request import Request
from mlcgen.runtime.scheduler import Scheduler

__all__ = ["TextWindow"]


class TextWindow:
    """Has requests go on with half of the window.

    roots: for prefixes of the cache that are nobody else's: what is kept of a longer text is not what its tokens alone
    would give.
    """

    def __init__(
        self,
        options: EngineOptions,
        executor: Executor,
        scheduler: Scheduler[Request],
        keys: KeyLayout | None,
        roots: Iterator[int],
    ) -> None:
        """keys: None: of a model whose keys cannot be moved. Raises RequestError where that is asked for."""
        assert options.window is not None
        self._window, self._sinks = options.window, options.sinks
        self._executor, self._scheduler, self._roots = executor, scheduler, roots
        self._keys = keys if options.window_keeps == "heavy" else None
        if options.window_keeps == "heavy" and (keys is None or scheduler.window):
            raise RequestError(
                "window_keeps='heavy' is not for this model, which has a window of its own or no rotary positions; "
                "use window_keeps='last'"
            )

    def is_full(self, request: Request) -> bool:
        """Whether it goes on with a part before its next step. Heavy hitters are chosen when all tokens are there."""
        if request.num_tokens < self._window or request.search is not None:
            return False
        return self._keys is None or (len(request.table) > 0 and request.is_decoding)

    def move(self, request: Request) -> None:
        """Raises what the executor raises, with the request's pages not to be relied on."""
        kept = self._window // 2
        if self._keys is not None and self._keep_heavy(request, kept, self._keys):
            return
        self._scheduler.restart_one(request)
        request.keep([*range(self._sinks), *range(request.num_tokens - kept + self._sinks, request.num_tokens)])

    def _keep_heavy(self, request: Request, kept: int, layout: KeyLayout) -> bool:
        """False where there are no pages for them, or no room in a small window; then nothing has changed."""
        computed, old_pages = request.num_computed, request.table.pages.tolist()
        uncomputed = range(computed, request.num_tokens)  # the last token, and what a draft had right elsewhere
        if kept - len(uncomputed) <= self._sinks:
            return False
        layers, layer_bytes = self._executor.page_shape
        raw = np.empty((layers, len(old_pages), layer_bytes), np.uint8)
        self._executor.read_pages(old_pages, raw, range(len(old_pages)))
        cells = layout.cells(raw)
        places = heavy_hitters(key_norms(cells, computed), kept - len(uncomputed), self._sinks)
        pages = self._scheduler.replace_pages(request, len(places), next(self._roots))
        if pages is None:
            return False
        request.keep([*places.tolist(), *uncomputed])
        moved = move_together(cells, places, layout)
        count = moved.shape[1]  # the rest is for tokens that are not computed
        raw = moved.view(np.uint8).reshape(layers, count, layer_bytes)
        self._executor.write_pages(pages[:count], raw, range(count))
        return True

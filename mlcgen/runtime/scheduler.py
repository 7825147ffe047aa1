"""Iteration-level continuous batching (Orca, OSDI '22) over paged sequences, with integers only.

A sequence is two numbers: tokens it has, and tokens whose keys and values are in the cache. A step computes some of the
difference, so a decode, a whole prompt, a chunk of a prompt and a recomputation after preemption are one case.
"""

from collections import deque
from typing import Generic, TypeVar

from mlcgen.errors import RequestError
from mlcgen.runtime.kv_cache import BlockTable, PagePool, num_pages_for

__all__ = ["Scheduler", "Sequence"]


class Sequence:
    """What the scheduler knows of a request. The engine raises `num_tokens` by one for each sampled token."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens  # prompt and generated so far
        self.num_computed = 0  # tokens in the KV cache
        self.num_scheduled = 0  # tokens of this step
        self.num_preemptions = 0
        self.is_ending = False  # the token that is being sampled is its last
        self.table = BlockTable()

    @property
    def num_uncomputed(self) -> int:
        return self.num_tokens - self.num_computed

    @property
    def reaches_end(self) -> bool:
        """Whether this step computes the sequence's last token, so that the next one can be sampled."""
        return self.num_computed + self.num_scheduled == self.num_tokens


S = TypeVar("S", bound=Sequence)


class Scheduler(Generic[S]):
    """First come, first served: every running sequence arrived before every waiting one.

    Both queues are in order of arrival, and preemption keeps them so: it moves the last of `running` to the front of
    `waiting`. The first sequence therefore always makes progress, and no sequence starves.
    """

    def __init__(self, pool: PagePool, page_size: int, max_batch: int, max_tokens_per_step: int) -> None:
        self.pool = pool
        self.page_size = page_size
        self.max_batch = max_batch
        self.max_tokens_per_step = max_tokens_per_step
        self.waiting: deque[S] = deque()
        self.running: list[S] = []

    def add(self, sequence: S) -> None:
        """Queue a sequence. Raises RequestError if its prompt and one more token can never fit the pool."""
        if self._pages_for(sequence.num_tokens + 1) > self.pool.num_pages:
            raise RequestError(
                f"prompt has {sequence.num_tokens} tokens but the KV cache holds {self.capacity} "
                f"({self.pool.num_pages} pages of {self.page_size}); shorten it or raise num_pages"
            )
        self.waiting.append(sequence)

    def remove(self, sequence: S) -> None:
        """Forget a finished or aborted sequence and free its pages."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._free(sequence)

    def schedule(self) -> tuple[list[S], list[S]]:
        """This step's batch, each with `num_scheduled` set, and the sequences that outgrew the whole pool.

        The batch has decodes first, then chunks of prompts: a long prompt slows the running ones but never stops them.
        """
        batch: list[S] = []
        failed: list[S] = []
        budget = self._schedule_decodes(batch, failed)
        budget = self._schedule_prompts(batch, budget)
        self._admit(batch, failed, budget)
        return batch, failed

    def advance(self, batch: list[S]) -> None:
        """Record that the batch's tokens are in the cache."""
        for sequence in batch:
            sequence.num_computed += sequence.num_scheduled

    def restart(self) -> None:
        """Have everything that runs computed anew: what is in the cache cannot be relied on."""
        while self.running:
            self._preempt_last()

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def capacity(self) -> int:
        """Tokens that the whole pool holds."""
        return self.pool.num_pages * self.page_size

    def _pages_for(self, num_tokens: int) -> int:
        return num_pages_for(num_tokens, self.page_size)

    def _schedule_decodes(self, batch: list[S], failed: list[S]) -> int:
        budget, index = self.max_tokens_per_step, 0
        while budget and index < len(self.running):
            sequence = self.running[index]
            if sequence.num_uncomputed > 1 or sequence.is_ending:
                index += 1
            elif self._reserve_next(sequence, failed):
                sequence.num_scheduled = 1
                batch.append(sequence)
                budget -= 1
                index += 1
            # otherwise the sequence has left `running`, and `index` is at the next one
        return budget

    def _schedule_prompts(self, batch: list[S], budget: int) -> int:
        for sequence in self.running:
            if not budget:
                break
            if sequence.num_uncomputed > 1:
                budget = self._schedule_chunk(sequence, batch, budget)
        return budget

    def _admit(self, batch: list[S], failed: list[S], budget: int) -> None:
        while budget and self.waiting and len(self.running) < self.max_batch:
            sequence = self.waiting[0]
            # All of the prompt's pages at once: two half-computed prompts can never wait for each other's pages.
            needed = self._pages_for(sequence.num_tokens)
            if needed > self.pool.num_pages:  # grew after it was added, then was preempted
                failed.append(self.waiting.popleft())
                continue
            if needed > self.pool.num_free:
                break  # those behind it wait too, or it might wait for ever
            self.waiting.popleft()
            self.running.append(sequence)
            sequence.table.extend(self.pool.allocate(needed))
            budget = self._schedule_chunk(sequence, batch, budget)

    def _schedule_chunk(self, sequence: S, batch: list[S], budget: int) -> int:
        sequence.num_scheduled = min(sequence.num_uncomputed, budget)
        batch.append(sequence)
        return budget - sequence.num_scheduled

    def _reserve_next(self, sequence: S, failed: list[S]) -> bool:
        """Have a page for a decode's token; if none is free, those who came last give theirs back."""
        if sequence.num_tokens <= len(sequence.table) * self.page_size:
            return True
        if self._pages_for(sequence.num_tokens) > self.pool.num_pages:
            self.remove(sequence)
            failed.append(sequence)
            return False
        while not self.pool.num_free:
            # Those after `sequence` are not in the batch yet, so preempting them takes nothing back.
            if self._preempt_last() is sequence:
                return False
        sequence.table.extend(self.pool.allocate())
        return True

    def _preempt_last(self) -> S:
        """By recomputation: drop the pages, and compute prompt and generated tokens anew when there is room."""
        victim = self.running.pop()
        self._free(victim)
        self.waiting.appendleft(victim)
        victim.num_preemptions += 1
        return victim

    def _free(self, sequence: S) -> None:
        self.pool.free(sequence.table.clear())
        sequence.num_computed = 0

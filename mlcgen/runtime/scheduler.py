"""Iteration-level continuous batching (Orca, OSDI '22) over paged sequences, with integers only.

A sequence is two numbers: tokens it has, and tokens whose keys and values are in the cache. A step computes some of the
difference, so a decode, a prompt, a chunk of a prompt, a draft to be verified and a recomputation after preemption are
one case.
"""

import bisect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from mlcgen.errors import RequestError
from mlcgen.runtime.draft import Draft
from mlcgen.runtime.kv_cache import BlockTable, PagePool, num_pages_for
from mlcgen.runtime.prefix_cache import ROOT, PrefixCache

__all__ = ["Scheduled", "Scheduler", "Sequence", "Transfer"]


class Sequence:
    """What the scheduler knows of a request. The engine raises `num_tokens` by one for each sampled token."""

    def __init__(self, tokens: Iterable[int], rank: float = 0.0) -> None:
        self.tokens = list(tokens)  # prompt and generated, as far as they are known
        self.rank = rank  # the lower, the sooner it is served; equal ones in the order in which they were added
        self.cache_root = ROOT  # sequences of one root have the same keys and values for the same tokens
        self.adapter_slot = -1  # of the adapter that its tokens go through; -1: none
        self.num_tokens = len(self.tokens)  # with those that are being sampled
        self.num_computed = 0  # tokens in the KV cache
        self.num_scheduled = 0  # tokens of this step
        self.draft = Draft()  # guesses at the tokens that follow; the scheduler may shorten it
        self.num_behind = 0  # tokens of its last draft that were right and not in their places in the cache
        self.num_cached = 0  # prompt tokens that were in the cache when it was first admitted
        self.num_preemptions = 0
        self.is_ending = False  # the token that is being sampled is its last
        self.table = BlockTable()
        self.num_shareable = 0  # pages at the table's front that the prefix cache knows
        self.num_dropped = 0  # pages at the table's front that it has no more, as they are behind the model's window
        self.saved: list[int] = []  # pages of the host that hold its first `num_saved` tokens while it waits,
        self.saved_from = 0  # but for so many pages that were dropped
        self.num_saved = 0
        self.order = (rank, 0)

    @property
    def num_uncomputed(self) -> int:
        return self.num_tokens - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Whether the next step, if there is room, computes all that it has."""
        return self.num_uncomputed <= 1 + self.num_behind

    @property
    def reaches_end(self) -> bool:
        """Whether this step computes the sequence's last token, so that the next one can be sampled."""
        return self.num_computed + self.num_scheduled >= self.num_tokens


S = TypeVar("S", bound=Sequence)


@dataclass(frozen=True)
class Transfer:
    """A page to be copied before the step: on the device, to the host, or back from there."""

    kind: Literal["copy", "save", "load"]
    source: int
    to: int


@dataclass
class Scheduled(Generic[S]):
    """One step."""

    batch: list[S] = field(default_factory=list)  # each with `num_scheduled`, its draft included
    outgrown: list[S] = field(default_factory=list)  # the whole pool does not hold them
    transfers: list[Transfer] = field(default_factory=list)  # in the order in which they must be made


class Scheduler(Generic[S]):
    """In the order of ranks: every running sequence comes before every waiting one, but where that needs room.

    Ranks never change, and preemption takes the last of `running`. The first sequence of all therefore always makes
    progress, and no sequence starves as long as only so many can come before it.

    window: last tokens that the model sees from a token, itself included; 0: all. Pages behind it are freed.
    prefers_saving(sequence): whether to save a preempted sequence's pages on the host rather than compute them anew.
    """

    def __init__(
        self,
        pool: PagePool,
        page_size: int,
        max_batch: int,
        max_tokens_per_step: int,
        *,
        prefix_cache: bool = True,
        chunked_prefill: bool = True,
        window: int = 0,
        host_pool: PagePool | None = None,
        prefers_saving: Callable[[S], bool] = lambda sequence: True,
    ) -> None:
        self.pool = pool
        self.page_size = page_size
        self.max_batch = max_batch
        self.max_tokens_per_step = max_tokens_per_step
        self.chunked_prefill = chunked_prefill
        self.window = window
        self.cache = PrefixCache(pool, page_size) if prefix_cache else None
        self.host_pool = host_pool or PagePool(0)
        self.waiting: list[S] = []  # both in order
        self.running: list[S] = []
        self.paused: list[S] = []  # they have pages for as long as nobody else needs them
        self._prefers_saving = prefers_saving
        self._num_added = 0
        self.num_prompt_tokens = 0  # of sequences that were admitted
        self.num_cached_tokens = 0  # of these, those that were in the cache

    def add(self, sequence: S) -> None:
        """Queue a sequence. Raises RequestError if its prompt and one more token can never fit the pool."""
        if self._pages_for(sequence.num_tokens + 1) > self.pool.num_pages:
            raise RequestError(
                f"prompt has {sequence.num_tokens} tokens but the KV cache holds {self.capacity} "
                f"({self.pool.num_pages} pages of {self.page_size}); shorten it or raise num_pages"
            )
        self._num_added += 1
        sequence.order = (sequence.rank, self._num_added)
        self._insert(self.waiting, sequence)

    def fork(self, sequence: S, parent: S) -> None:
        """Have a new sequence run that begins as a running one: they share its pages until one writes there.

        Where there is no room for it, it waits as others do.
        """
        self.add(sequence)
        shared = sequence.num_tokens - 1
        if 0 < shared <= parent.num_computed and len(self.running) < self.max_batch:
            dropped, held = parent.num_dropped, self._pages_for(shared)
            pages = parent.table.pages[dropped:held].tolist()
            needed = self._pages_for(sequence.num_tokens) - held
            if needed <= self.pool.num_free:
                self.pool.share(pages)
                sequence.table.extend([0] * dropped + pages + self.pool.allocate(needed))
                sequence.num_dropped = dropped
                sequence.num_computed = shared
                self._count(sequence)
                sequence.num_shareable = min(parent.num_shareable, shared // self.page_size)
                self.waiting.remove(sequence)
                self._insert(self.running, sequence)

    def pause(self, sequence: S) -> None:
        """Leave a running sequence out of all steps until it is resumed."""
        self.running.remove(sequence)
        self.paused.append(sequence)

    def resume(self, sequence: S) -> None:
        """Have a paused sequence run; where there is no room, or its pages are gone, it waits."""
        self.paused.remove(sequence)
        if len(sequence.table) and len(self.running) < self.max_batch:
            self._insert(self.running, sequence)
        else:
            self._drop(sequence)

    def remove(self, sequence: S) -> None:
        """Forget a finished or aborted sequence and free its pages."""
        next(queue for queue in (self.running, self.paused, self.waiting) if sequence in queue).remove(sequence)
        self._free(sequence)
        self._drop_saved(sequence)

    def schedule(self) -> Scheduled[S]:
        """This step's batch, each with `num_scheduled` set.

        The batch has decodes first, then chunks of prompts: a long prompt slows the running ones but never stops them.
        Without `chunked_prefill` decodes have a step only where no prompt can.
        """
        step: Scheduled[S] = Scheduled()
        self._make_way(step)
        budget = self.max_tokens_per_step
        if self.chunked_prefill:
            budget = self._schedule_decodes(step, budget)
        self._admit(step, self._schedule_prompts(step, budget))
        if not step.batch:
            self._schedule_decodes(step, budget)
        return step

    def advance(self, batch: list[S]) -> None:
        """Record that the batch's tokens are in the cache, but for drafts, which `accept` counts."""
        for sequence in batch:
            sequence.num_computed += sequence.num_scheduled - len(sequence.draft)
            self._share(sequence)
            self._drop_behind(sequence)

    def accept(self, sequence: S, num_tokens: int) -> None:
        """Record that so many of a draft's tokens are in the cache, as they were right and the first ones.

        Others that were right, of a tree's other branches, are where the cache has a wrong one: they are computed anew
        in the step that verifies the next draft.
        """
        sequence.num_computed += num_tokens
        sequence.num_behind = max(sequence.num_uncomputed - 1, 0)
        sequence.draft = Draft()

    def restart_one(self, sequence: S) -> None:
        """Have a sequence wait for its turn with none of its tokens computed; they may then be changed."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self._drop_saved(sequence)
        self._drop(sequence)

    def replace_pages(self, sequence: S, num_computed: int, cache_root: int) -> list[int] | None:
        """Other pages in place of those that a running sequence has: for so many computed tokens, and the others.

        What is written there goes by `cache_root`, see PrefixCache.add. None where too few are free.
        """
        needed, held = self._pages_for(num_computed + sequence.num_uncomputed), sequence.table.pages.tolist()
        own = sum(self.pool.num_references(page) == 1 for page in held)
        if not self._reclaim(needed - own):
            return None
        self.pool.free(sequence.table.clear())
        pages = self.pool.allocate(needed)
        sequence.table.extend(pages)
        sequence.num_tokens += num_computed - sequence.num_computed
        sequence.num_computed, sequence.num_shareable, sequence.cache_root = num_computed, 0, cache_root
        return pages

    def restart(self) -> None:
        """Have everything that runs computed anew: what is in the cache cannot be relied on."""
        for sequence in reversed(self.running):
            self._drop(sequence)
        self.running.clear()
        for sequence in self.paused:
            self._free(sequence)
        for sequence in self.waiting:
            self._drop_saved(sequence)
        if self.cache is not None:
            self.cache.clear()

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def outgrown_error(self, sequence: S) -> RequestError:
        """What to tell the one who asked for a sequence that has outgrown the pool."""
        return RequestError(
            f"the sequence has grown to {sequence.num_tokens} tokens but the KV cache holds {self.capacity}; "
            "lower max_tokens or raise num_pages"
        )

    @property
    def capacity(self) -> int:
        """Tokens that the whole pool holds."""
        return self.pool.num_pages * self.page_size

    def _pages_for(self, num_tokens: int) -> int:
        return num_pages_for(num_tokens, self.page_size)

    def _insert(self, queue: list[S], sequence: S) -> None:
        bisect.insort(queue, sequence, key=lambda other: other.order)

    # The three kinds of work, in this order

    def _make_way(self, step: Scheduled[S]) -> None:
        """Start those that wait and come before some that run, which are preempted where there is no room."""
        while self.waiting and self.running and self.waiting[0].order < self.running[-1].order:
            if len(self.running) == self.max_batch or not self._start_first(step):
                self._preempt_last(step)

    def _schedule_decodes(self, step: Scheduled[S], budget: int) -> int:
        index = 0
        while budget and index < len(self.running):
            sequence = self.running[index]
            if not sequence.is_decoding or sequence.is_ending:
                sequence.draft = Draft()
                index += 1
            elif self._reserve_next(sequence, step):
                known = min(sequence.num_uncomputed, budget)
                self._shorten_draft(sequence, budget - known if known == sequence.num_uncomputed else 0)
                sequence.num_scheduled = known + len(sequence.draft)
                step.batch.append(sequence)
                budget -= sequence.num_scheduled
                index += 1
            # otherwise the sequence has left `running`, and `index` is at the next one
        return budget

    def _schedule_prompts(self, step: Scheduled[S], budget: int) -> int:
        for sequence in self.running:
            if not budget:
                break
            if not sequence.is_decoding:
                budget = self._schedule_chunk(sequence, step, budget)
        return budget

    def _admit(self, step: Scheduled[S], budget: int) -> None:
        while budget and self.waiting and len(self.running) < self.max_batch:
            sequence = self.waiting[0]
            if not self._start_first(step):
                break  # those behind it wait too, or it might wait for ever
            if sequence not in step.outgrown:
                budget = self._schedule_chunk(sequence, step, budget)

    def _start_first(self, step: Scheduled[S]) -> bool:
        """Have the first that waits run, if there is room, or fail, if there never will be: it grew since it came."""
        sequence = self.waiting[0]
        if self._pages_for(sequence.num_tokens) - sequence.saved_from > self.pool.num_pages:
            self.remove(sequence)
            step.outgrown.append(sequence)
            return True
        # All of its pages at once: two half-computed prompts can never wait for each other's pages.
        if not self._take_pages(sequence, step):
            return False
        self.waiting.pop(0)
        self._insert(self.running, sequence)
        return True

    def _schedule_chunk(self, sequence: S, step: Scheduled[S], budget: int) -> int:
        sequence.draft = Draft()
        sequence.num_scheduled = min(sequence.num_uncomputed, budget)
        step.batch.append(sequence)
        return budget - sequence.num_scheduled

    # Pages

    def _take_pages(self, sequence: S, step: Scheduled[S]) -> bool:
        """Give a waiting sequence the pages of all its tokens: those that are there already, and others."""
        if sequence.saved_from:
            return self._take_saved(sequence, step)
        known = sequence.tokens[: sequence.num_tokens]
        shared = self.cache.find(known, sequence.cache_root) if self.cache is not None else []
        self.pool.share(shared)
        needed = self._pages_for(sequence.num_tokens) - len(shared)
        if len(shared) * self.page_size == sequence.num_tokens and needed + 1 > self.pool.num_free:
            # One token at least is computed, for its logits, in a copy of the page that has it. There is none.
            self.pool.free([shared.pop()])
            needed += 1
        if not self._reclaim(needed):
            self.pool.free(shared)
            return False
        sequence.table.extend(shared + self.pool.allocate(needed))
        sequence.num_shareable = len(shared)
        sequence.num_computed = min(len(shared) * self.page_size, sequence.num_tokens - 1)
        self._load_saved(sequence, step)
        self._make_writable(sequence, step)
        self._count(sequence)
        return True

    def _count(self, sequence: S) -> None:
        if not sequence.num_preemptions:
            sequence.num_cached = sequence.num_computed
            self.num_prompt_tokens += sequence.num_tokens
            self.num_cached_tokens += sequence.num_computed

    def _take_saved(self, sequence: S, step: Scheduled[S]) -> bool:
        """Likewise, where what is before the saved pages is behind the model's window."""
        needed = self._pages_for(sequence.num_tokens) - sequence.saved_from
        if not self._reclaim(needed):
            return False
        sequence.num_dropped = sequence.saved_from
        sequence.table.extend([0] * sequence.num_dropped + self.pool.allocate(needed))
        self._load_saved(sequence, step)
        return True

    def _load_saved(self, sequence: S, step: Scheduled[S]) -> None:
        """Bring back what was saved and is not in the cache."""
        if sequence.num_saved > sequence.num_computed:
            first = max(sequence.num_computed // self.page_size, sequence.saved_from)
            for block, saved in enumerate(sequence.saved, sequence.saved_from):
                if block >= first:
                    step.transfers.append(Transfer("load", saved, sequence.table[block]))
            sequence.num_computed = sequence.num_saved
        self._drop_saved(sequence)

    def _drop_saved(self, sequence: S) -> None:
        self.host_pool.free(sequence.saved)
        sequence.saved, sequence.num_saved, sequence.saved_from = [], 0, 0

    def _reserve_next(self, sequence: S, step: Scheduled[S]) -> bool:
        """Have a page for a decode's token; if none is free, those who came last give theirs back."""
        if self._has_next(sequence):
            return True
        if self._pages_for(sequence.num_tokens) - sequence.num_dropped > self.pool.num_pages:
            self.remove(sequence)
            step.outgrown.append(sequence)
            return False
        while not self._reclaim(1):
            # Those after `sequence` are not in the batch yet, so preempting them takes nothing back.
            if self._preempt_last(step) is sequence:
                return False
            if self._has_next(sequence):  # it shared a page with the one that was preempted
                return True
        if self._pages_for(sequence.num_tokens) > len(sequence.table):
            sequence.table.extend(self.pool.allocate())
        else:
            self._make_writable(sequence, step)
        return True

    def _has_next(self, sequence: S) -> bool:
        """Whether a decode's token has a page in which it may write."""
        block = (sequence.num_tokens - 1) // self.page_size
        return block < len(sequence.table) and not self.pool.is_shared(sequence.table[block])

    def _make_writable(self, sequence: S, step: Scheduled[S]) -> None:
        """Copy on write: a page of its own for a sequence's next token, where others need the one that is there."""
        block = sequence.num_computed // self.page_size
        page = sequence.table[block] if block < len(sequence.table) else None
        if page is None or not self.pool.is_shared(page):
            return
        (copy,) = self.pool.allocate()
        step.transfers.append(Transfer("copy", page, copy))
        sequence.table[block] = copy
        sequence.num_shareable = min(sequence.num_shareable, block)
        self.pool.free([page])

    def _shorten_draft(self, sequence: S, budget: int) -> None:
        """To what the budget and the free pages allow: no one is preempted for a guess."""
        if sequence.draft:
            missing = self._pages_for(sequence.num_tokens + len(sequence.draft)) - len(sequence.table)
            missing = min(max(missing, 0), self.pool.num_free)
            sequence.table.extend(self.pool.allocate(missing))
            room = len(sequence.table) * self.page_size - sequence.num_tokens
            sequence.draft.shorten(min(room, budget))

    def _share(self, sequence: S) -> None:
        """Put pages that have become full into the prefix cache."""
        if self.cache is None or sequence.num_dropped:  # who finds a page in the tree needs those before it
            return
        size, table = self.page_size, sequence.table
        num_full = min(sequence.num_computed, len(sequence.tokens)) // size
        for block in range(sequence.num_shareable, num_full):
            parent = table[block - 1] if block else sequence.cache_root
            page = self.cache.add(parent, sequence.tokens[block * size : (block + 1) * size], table[block])
            if page != table[block]:  # another sequence computed the same: one of the two is enough
                self.pool.share([page])
                self.pool.free([table[block]])
                table[block] = page
        sequence.num_shareable = max(sequence.num_shareable, num_full)

    def _drop_behind(self, sequence: S) -> None:
        """Free pages that no token to come will see."""
        if self.window:
            first_seen = max(sequence.num_computed - self.window + 1, 0)
            behind = range(sequence.num_dropped, first_seen // self.page_size)
            self.pool.free([sequence.table[block] for block in behind])
            for block in behind:
                sequence.table[block] = 0
            sequence.num_dropped += len(behind)

    def _preempt_last(self, step: Scheduled[S]) -> S:
        """Drop the last one's pages: save them on the host, or have them computed anew when there is room."""
        victim = self.running.pop()
        pages = victim.table.pages[victim.num_dropped : self._pages_for(victim.num_computed)].tolist()
        if pages and len(pages) <= self.host_pool.num_free and self._prefers_saving(victim):
            victim.saved, victim.num_saved = self.host_pool.allocate(len(pages)), victim.num_computed
            victim.saved_from = victim.num_dropped
            step.transfers += [Transfer("save", page, to) for page, to in zip(pages, victim.saved, strict=True)]
        self._drop(victim)
        return victim

    def _reclaim(self, needed: int) -> bool:
        """Whether so many pages are free, after paused sequences have given theirs where they must."""
        for sequence in reversed(self.paused):
            if needed <= self.pool.num_free:
                break
            self._free(sequence)
        return needed <= self.pool.num_free

    def _drop(self, sequence: S) -> None:
        """Have a sequence wait that is in no queue, without its pages."""
        self._free(sequence)
        sequence.num_preemptions += 1
        self._insert(self.waiting, sequence)

    def _free(self, sequence: S) -> None:
        self.pool.free(sequence.table.clear()[sequence.num_dropped :])
        sequence.num_computed = sequence.num_shareable = sequence.num_behind = sequence.num_dropped = 0
        sequence.draft = Draft()

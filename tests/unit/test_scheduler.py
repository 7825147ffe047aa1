"""Scheduling with plain integers: nothing leaks, nothing starves, every token sees the right keys and values."""

import random
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mlcgen.errors import RequestError
from mlcgen.runtime.draft import ROOT, Draft
from mlcgen.runtime.kv_cache import PagePool, num_pages_for
from mlcgen.runtime.prefix_cache import ROOT as TREE_ROOT
from mlcgen.runtime.scheduler import Scheduled, Scheduler, Sequence

VOCAB = 3  # few, so that prompts have beginnings in common


def next_token(tokens: list[int]) -> int:
    """The model: what comes next depends on all that was before."""
    return zlib.crc32(bytes(tokens)) % VOCAB


def completed(prompt: list[int], num_wanted: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + num_wanted:
        tokens.append(next_token(tokens))
    return tokens


class Job(Sequence):
    """A sequence that ends by itself after `num_wanted` tokens. prompt: its tokens, or how many that nobody shares."""

    def __init__(self, arrival: int, prompt: int | list[int], num_wanted: int, rank: float = 0.0) -> None:
        own = random.Random(arrival)
        super().__init__(prompt if isinstance(prompt, list) else [own.randrange(VOCAB) for _ in range(prompt)], rank)
        self.arrival = arrival
        self.prompt = list(self.tokens)
        self.num_wanted = num_wanted
        self.num_final = len(self.tokens) + num_wanted


class Memory:
    """The pages' contents: for each slot the tokens up to the one whose key and value it holds."""

    def __init__(self, scheduler: Scheduler[Job]) -> None:
        self.scheduler, self.size = scheduler, scheduler.page_size
        self.device: dict[int, list[bytes | None]] = {}
        self.host: dict[int, list[bytes | None]] = {}

    def transfer(self, step: Scheduled[Job]) -> None:
        for transfer in step.transfers:
            source = self.host if transfer.kind == "load" else self.device
            to = self.host if transfer.kind == "save" else self.device
            to[transfer.to] = list(source.get(transfer.source, [None] * self.size))

    def run(self, batch: list[Job]) -> None:
        """Write what the step computes, then check that each token sees all before it."""
        for job in batch:
            for at in range(job.num_computed, job.num_computed + job.num_scheduled):
                page = job.table[at // self.size]
                assert not self.scheduler.pool.is_shared(page), "a write into a page that others need"
                self.device.setdefault(page, [None] * self.size)[at % self.size] = seen_at(job, at)
        for job in batch:
            window = self.scheduler.window or job.num_computed + job.num_scheduled
            for at in range(max(job.num_computed - window + 1, 0), job.num_computed + job.num_scheduled):
                assert self.device[job.table[at // self.size]][at % self.size] == seen_at(job, at)


def seen_at(job: Job, at: int) -> bytes:
    """The tokens up to the one that is at a place of the cache, in which a draft's nodes come after the known ones."""
    node, root = at - job.num_tokens, f"{job.cache_root}: ".encode()
    if node < 0:
        return root + bytes(job.tokens[: at + 1])
    path = []
    while node != ROOT:
        path.append(job.draft.tokens[node])
        node = job.draft.parents[node]
    return root + bytes(job.tokens + path[::-1])


def make_scheduler(
    num_pages: int = 8, page_size: int = 4, max_batch: int = 4, max_tokens_per_step: int = 16, **options: object
) -> Scheduler[Job]:
    return Scheduler(PagePool(num_pages), page_size, max_batch, max_tokens_per_step, **options)  # type: ignore[arg-type]


def run_step(scheduler: Scheduler[Job], memory: Memory | None = None) -> tuple[list[Job], list[Job], list[Job]]:
    """One iteration as the engine does it: (batch, finished, outgrown)."""
    step = scheduler.schedule()
    check_batch(scheduler, step.batch)
    if memory is not None:
        memory.transfer(step)
        memory.run(step.batch)
    scheduler.advance(step.batch)
    finished = []
    for job in step.batch:
        if job.num_uncomputed == 0:
            draft, right = job.draft, []
            node: int | None = ROOT
            while node is not None:
                job.tokens.append(next_token(job.tokens))
                job.num_tokens += 1
                node = None if job.num_tokens >= job.num_final else draft.child(node, job.tokens[-1])
                right += [] if node is None else [node]
            scheduler.accept(job, next((i for i, node in enumerate(right) if node != i), len(right)))
            if job.num_tokens == job.num_final:
                assert job.tokens == completed(job.prompt, job.num_wanted)
                scheduler.remove(job)
                finished.append(job)
    return step.batch, finished, step.outgrown


def check_batch(scheduler: Scheduler[Job], batch: list[Job]) -> None:
    assert len(set(map(id, batch))) == len(batch)
    assert set(map(id, batch)) <= set(map(id, scheduler.running))
    assert sum(job.num_scheduled for job in batch) <= scheduler.max_tokens_per_step
    assert len(scheduler.running) <= scheduler.max_batch
    for job in batch:
        assert 1 <= job.num_scheduled <= job.num_uncomputed + len(job.draft)
        assert job.num_computed + job.num_scheduled <= len(job.table) * scheduler.page_size
    is_chunk = [not job.is_decoding for job in batch]
    first_chunk = is_chunk.index(True) if True in is_chunk else len(batch)
    decodes_later = [job for job in batch[first_chunk:] if job.is_decoding and job.draft]
    assert not decodes_later


def check_pages(scheduler: Scheduler[Job]) -> None:
    tables = [job.table.pages[job.num_dropped :] for job in scheduler.running + scheduler.paused]
    held = [page for table in tables for page in table.tolist()]
    for page in range(scheduler.pool.num_pages):
        assert scheduler.pool.num_references(page) == held.count(page)
    assert scheduler.pool.num_free == scheduler.pool.num_pages - len(set(held))
    assert all(len(job.table) == 0 and job.num_computed == 0 for job in scheduler.waiting)
    saved = [page for job in scheduler.waiting for page in job.saved]
    assert len(set(saved)) == len(saved) == scheduler.host_pool.num_pages - scheduler.host_pool.num_free
    assert not any(job.saved for job in scheduler.running + scheduler.paused)
    if scheduler.cache is not None:
        assert scheduler.pool.num_idle <= len(scheduler.cache) <= scheduler.pool.num_pages
        check_tree(scheduler)


def check_tree(scheduler: Scheduler[Job]) -> None:
    """Every page of the tree has its parent there."""
    assert scheduler.cache is not None
    keys = scheduler.cache._keys
    for page, key in keys.items():
        assert scheduler.cache._pages[key] == page
        assert key[0] <= TREE_ROOT or key[0] in keys


def drafted(tokens: list[int], wrong: set[int], is_tree: bool) -> Draft:
    """A draft of right tokens but at the places `wrong`, where others are in their stead or, in a tree, before them."""
    draft, node = Draft(), ROOT
    for place, token in enumerate(tokens):
        other = draft.add(node, (token + 1) % VOCAB) if place in wrong else None
        if is_tree and other is not None and place % 2:
            draft.add(other, token)
        node = other if other is not None and not is_tree else draft.add(node, token)
    return draft


class SchedulerMachine(RuleBasedStateMachine):
    """All that happens to a scheduler: arrivals, forks, aborts, failures, drafts right and wrong, and steps."""

    @initialize(
        num_pages=st.integers(1, 40),
        page_size=st.sampled_from([1, 2, 2, 4, 4, 5, 16, 256]),
        max_batch=st.integers(1, 6),
        max_tokens=st.integers(1, 64),
        host_pages=st.sampled_from([0, 3, 100]),
        options=st.fixed_dictionaries(
            {
                "prefix_cache": st.booleans(),
                "chunked_prefill": st.sampled_from([True, True, False]),
                "window": st.sampled_from([0, 0, 1, 5, 16]),
            }
        ),
    )
    def create(
        self, num_pages: int, page_size: int, max_batch: int, max_tokens: int, host_pages: int, options: dict[str, int]
    ) -> None:
        page_size = min(page_size, max(1, 400 // num_pages)) if num_pages > 4 else page_size
        host_pool = PagePool(host_pages)
        self.scheduler = make_scheduler(num_pages, page_size, max_batch, max_tokens, host_pool=host_pool, **options)
        self.memory = Memory(self.scheduler)
        self.alive: list[Job] = []
        self.arrivals = 0
        self.roots = TREE_ROOT
        self.prompts: list[list[int]] = [[0]]

    def arrived(self, prompt: list[int], num_wanted: int, rank: float) -> Job:
        self.arrivals += 1
        self.prompts.append(prompt)
        return Job(self.arrivals, prompt, num_wanted, rank)

    @rule(
        data=st.data(),
        num_own=st.integers(1, 60),
        num_wanted=st.integers(1, 60),
        rank=st.sampled_from([0, 0, 0, -1, 1]),
    )
    def arrive(self, data: st.DataObject, num_own: int, num_wanted: int, rank: int) -> None:
        """With the beginning of an earlier prompt."""
        shared = data.draw(st.sampled_from(self.prompts))
        if num_own:
            shared = shared[: data.draw(st.integers(0, len(shared)))]
        own = random.Random(self.arrivals)
        prompt = shared + [own.randrange(VOCAB) for _ in range(num_own)]
        job = self.arrived(prompt, num_wanted, rank)
        if num_pages_for(job.num_tokens + 1, self.scheduler.page_size) > self.scheduler.pool.num_pages:
            with pytest.raises(RequestError, match="KV cache holds"):
                self.scheduler.add(job)
        else:
            self.scheduler.add(job)
            self.alive.append(job)

    @precondition(lambda self: self.scheduler.running)
    @rule(data=st.data())
    def pause(self, data: st.DataObject) -> None:
        self.scheduler.pause(data.draw(st.sampled_from(self.scheduler.running)))

    @precondition(lambda self: self.scheduler.paused)
    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        self.scheduler.resume(data.draw(st.sampled_from(self.scheduler.paused)))

    @precondition(lambda self: self.scheduler.running)
    @rule(data=st.data(), num_wanted=st.integers(1, 30))
    def fork(self, data: st.DataObject, num_wanted: int) -> None:
        parent = data.draw(st.sampled_from(self.scheduler.running + self.scheduler.paused))
        job = self.arrived(list(parent.tokens), num_wanted, parent.rank)
        job.cache_root = parent.cache_root
        if num_pages_for(job.num_tokens + 1, self.scheduler.page_size) <= self.scheduler.pool.num_pages:
            self.scheduler.fork(job, parent)
            self.alive.append(job)

    @precondition(lambda self: self.scheduler.running and not self.scheduler.window)
    @rule(data=st.data())
    def keep_a_part(self, data: st.DataObject) -> None:
        """Of a sequence's tokens, with other pages, as if they were all."""
        job = data.draw(st.sampled_from(self.scheduler.running))
        places = data.draw(st.sets(st.integers(0, max(job.num_computed - 1, 0)), min_size=1))
        if not job.num_computed:
            return
        before, num_wanted = (
            (job.table.pages.tolist(), job.num_computed, job.cache_root),
            job.num_final - job.num_tokens,
        )
        self.roots -= 1
        pages = self.scheduler.replace_pages(job, len(places), self.roots)
        if pages is None:
            assert (job.table.pages.tolist(), job.num_computed, job.cache_root) == before
            return
        job.tokens = [job.tokens[place] for place in sorted(places)] + job.tokens[before[1] :]
        job.num_wanted, job.prompt = num_wanted, list(job.tokens)
        assert job.num_tokens == len(job.tokens)
        job.num_final = job.num_tokens + num_wanted
        job.draft = Draft()
        for at in range(len(places)):
            self.memory.device.setdefault(pages[at // self.memory.size], [None] * self.memory.size)
            self.memory.device[pages[at // self.memory.size]][at % self.memory.size] = seen_at(job, at)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.alive))
        self.scheduler.remove(job)
        self.alive.remove(job)

    @rule(happens=st.sampled_from([False] * 5 + [True]))
    def fail(self, happens: bool) -> None:
        """The device has lost its memory."""
        if not happens:
            return
        self.scheduler.restart()
        self.memory.device.clear()
        self.memory.host.clear()

    @rule(data=st.data())
    def guess(self, data: st.DataObject) -> None:
        for job in self.scheduler.running:
            length = data.draw(st.integers(0, 9))
            if job.is_decoding:
                wrong = data.draw(st.sets(st.integers(0, 9)))
                job.draft = drafted(completed(job.tokens, length)[len(job.tokens) :], wrong, data.draw(st.booleans()))

    @rule(count=st.integers(1, 12))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def step(self) -> None:
        able = [job for job in self.alive if job not in self.scheduler.paused]
        first = min(able, key=lambda job: job.order, default=None)
        before = first.num_computed if first else 0
        batch, finished, outgrown = run_step(self.scheduler, self.memory)
        if first and first not in outgrown:
            is_full = sum(job.num_scheduled for job in batch) == self.scheduler.max_tokens_per_step
            assert first in batch or is_full or not self.scheduler.chunked_prefill
            assert first in finished or first.num_computed > before or first not in batch
        for job in outgrown:
            assert num_pages_for(job.num_tokens, self.scheduler.page_size) > self.scheduler.pool.num_pages
        self.alive = [job for job in self.alive if job not in finished and job not in outgrown]

    @invariant()
    def queues_are_in_order(self) -> None:
        for queue in (self.scheduler.running, self.scheduler.waiting):
            assert [job.order for job in queue] == sorted(job.order for job in queue)
        queues = self.scheduler.running + self.scheduler.waiting + self.scheduler.paused
        assert sorted(map(id, queues)) == sorted(map(id, self.alive))

    @invariant()
    def pages_add_up(self) -> None:
        check_pages(self.scheduler)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for job in list(self.scheduler.paused):
            self.scheduler.resume(job)
        for _ in range(20_000):
            if not self.alive:
                break
            self.step()
        assert not self.alive, "a request starved"
        assert not self.scheduler.has_work
        assert self.scheduler.pool.num_free == self.scheduler.pool.num_pages
        assert self.scheduler.host_pool.num_free == self.scheduler.host_pool.num_pages


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(deadline=None, max_examples=200, stateful_step_count=40)


def test_a_step_mixes_decodes_and_prompts_of_different_lengths() -> None:
    scheduler = make_scheduler(num_pages=20)
    first, second, third = Job(0, 3, 5), Job(1, 7, 5), Job(2, 2, 5)
    scheduler.add(first)
    run_step(scheduler)
    scheduler.add(second)
    scheduler.add(third)
    batch, _, _ = run_step(scheduler)
    assert [(job.arrival, job.num_scheduled) for job in batch] == [(0, 1), (1, 7), (2, 2)]


def test_a_long_prompt_is_computed_in_chunks_beside_decodes() -> None:
    scheduler = make_scheduler(num_pages=20, max_tokens_per_step=8)
    short, long = Job(0, 2, 50), Job(1, 20, 5)
    scheduler.add(short)
    scheduler.add(long)
    chunks = []
    for _ in range(3):
        batch, _, _ = run_step(scheduler)
        chunks.append([job.num_scheduled for job in batch])
    assert chunks == [[2, 6], [1, 7], [1, 7]]


def test_the_latest_is_preempted_and_recomputes_all_its_tokens() -> None:
    scheduler = make_scheduler(num_pages=4, page_size=2)
    first, second = Job(0, 3, 5), Job(1, 3, 2)
    scheduler.add(first)
    scheduler.add(second)
    run_step(scheduler)  # both now have 4 tokens and 2 pages: the pool is full
    run_step(scheduler)
    assert second.num_tokens == 5  # finished on its last slot
    scheduler.add(third := Job(2, 3, 5))
    batch, _, _ = run_step(scheduler)
    assert batch == [first]  # took a third page; one is left, and the newcomer needs two
    assert list(scheduler.waiting) == [third]


def test_preempted_goes_to_the_front_and_comes_back() -> None:
    scheduler = make_scheduler(num_pages=4, page_size=2)
    jobs = [Job(0, 3, 5), Job(1, 3, 5), Job(2, 1, 1)]
    for job in jobs:
        scheduler.add(job)
    run_step(scheduler)
    run_step(scheduler)
    run_step(scheduler)
    assert scheduler.running == jobs[:1]
    assert list(scheduler.waiting) == jobs[1:]
    assert jobs[1].num_preemptions == 1
    order: list[int] = []
    for _ in range(100):
        batch, finished, _ = run_step(scheduler)
        order += [job.arrival for job in finished]
        if jobs[1] in batch and jobs[1].num_scheduled > 1:
            assert jobs[1].num_scheduled == 5  # prompt and generated tokens
    assert order[0] == 0
    assert sorted(order) == [0, 1, 2]


def test_a_prompt_that_can_never_fit_is_refused_alone() -> None:
    scheduler = make_scheduler(num_pages=2, page_size=4)
    with pytest.raises(RequestError, match=r"prompt has 8 tokens but the KV cache holds 8 \(2 pages of 4\)"):
        scheduler.add(Job(0, 8, 1))
    scheduler.add(Job(1, 7, 1))
    assert run_step(scheduler)[1]


@pytest.mark.parametrize("page_size", [1, 3, 256])
def test_a_sequence_that_outgrows_the_pool_fails_alone(page_size: int) -> None:
    scheduler = make_scheduler(num_pages=2, page_size=page_size, max_tokens_per_step=1000)
    greedy, modest = Job(0, 1, 10**6), Job(1, 1, 2)
    scheduler.add(greedy)
    scheduler.add(modest)
    ended: list[Job] = []
    for _ in range(1100):
        _, finished, failed = run_step(scheduler)
        assert greedy not in finished
        ended += finished + failed
    assert sorted(job.arrival for job in ended) == [0, 1]
    assert greedy.num_tokens == 2 * page_size + 1
    assert scheduler.pool.num_free == 2


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 256), st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=8))
def test_every_request_that_fits_finishes(page_size: int, lengths: list[tuple[int, int]]) -> None:
    num_pages = max(num_pages_for(prompt + wanted, page_size) for prompt, wanted in lengths)
    scheduler = make_scheduler(num_pages, page_size, max_batch=5, max_tokens_per_step=7)
    for arrival, (prompt, wanted) in enumerate(lengths):
        scheduler.add(Job(arrival, prompt, wanted))
    ended = 0
    for _ in range(20_000):
        if not scheduler.has_work:
            break
        _, finished, failed = run_step(scheduler)
        assert not failed
        ended += len(finished)
    assert ended == len(lengths)

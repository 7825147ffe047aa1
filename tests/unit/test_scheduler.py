"""Scheduling with plain integers: nothing leaks, nothing starves, no step exceeds its bounds."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mlcgen.errors import RequestError
from mlcgen.runtime.kv_cache import PagePool, num_pages_for
from mlcgen.runtime.scheduler import Scheduler, Sequence


class Job(Sequence):
    """A sequence that ends by itself after `num_wanted` tokens."""

    def __init__(self, arrival: int, num_prompt: int, num_wanted: int) -> None:
        super().__init__(num_prompt)
        self.arrival = arrival
        self.num_final = num_prompt + num_wanted


def make_scheduler(
    num_pages: int = 8, page_size: int = 4, max_batch: int = 4, max_tokens_per_step: int = 16
) -> Scheduler[Job]:
    return Scheduler(PagePool(num_pages), page_size, max_batch, max_tokens_per_step)


def run_step(scheduler: Scheduler[Job]) -> tuple[list[Job], list[Job], list[Job]]:
    """One iteration as the engine does it: (batch, finished, failed)."""
    batch, failed = scheduler.schedule()
    check_batch(scheduler, batch)
    scheduler.advance(batch)
    finished = []
    for job in batch:
        if job.num_uncomputed == 0:
            job.num_tokens += 1
            if job.num_tokens == job.num_final:
                scheduler.remove(job)
                finished.append(job)
    return batch, finished, failed


def check_batch(scheduler: Scheduler[Job], batch: list[Job]) -> None:
    assert len(set(map(id, batch))) == len(batch)
    assert set(map(id, batch)) <= set(map(id, scheduler.running))
    assert sum(job.num_scheduled for job in batch) <= scheduler.max_tokens_per_step
    assert len(scheduler.running) <= scheduler.max_batch
    for job in batch:
        assert 1 <= job.num_scheduled <= job.num_uncomputed
        assert job.num_computed + job.num_scheduled <= len(job.table) * scheduler.page_size
    is_chunk = [job.num_uncomputed > 1 for job in batch]
    first_chunk = is_chunk.index(True) if True in is_chunk else len(batch)
    decodes_later = [job for job in batch[first_chunk:] if job.num_uncomputed == 1 and job.num_computed]
    assert not decodes_later


def check_pages(scheduler: Scheduler[Job]) -> None:
    held = [page for job in scheduler.running for page in job.table.pages.tolist()]
    assert len(set(held)) == len(held)
    assert scheduler.pool.num_free == scheduler.pool.num_pages - len(held)
    assert all(len(job.table) == 0 and job.num_computed == 0 for job in scheduler.waiting)


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_pages=st.integers(1, 40),
        page_size=st.integers(1, 256),
        max_batch=st.integers(1, 6),
        max_tokens=st.integers(1, 64),
    )
    def create(self, num_pages: int, page_size: int, max_batch: int, max_tokens: int) -> None:
        page_size = min(page_size, max(1, 400 // num_pages)) if num_pages > 4 else page_size
        self.scheduler = make_scheduler(num_pages, page_size, max_batch, max_tokens)
        self.alive: list[Job] = []
        self.arrivals = 0

    @rule(num_prompt=st.integers(1, 150), num_wanted=st.integers(1, 60))
    def arrive(self, num_prompt: int, num_wanted: int) -> None:
        job = Job(self.arrivals, num_prompt, num_wanted)
        self.arrivals += 1
        if num_pages_for(num_prompt + 1, self.scheduler.page_size) > self.scheduler.pool.num_pages:
            with pytest.raises(RequestError, match="KV cache holds"):
                self.scheduler.add(job)
        else:
            self.scheduler.add(job)
            self.alive.append(job)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.alive))
        self.scheduler.remove(job)
        self.alive.remove(job)

    @rule()
    def step(self) -> None:
        oldest = min(self.alive, key=lambda job: job.arrival, default=None)
        before = oldest.num_computed if oldest else 0
        batch, finished, failed = run_step(self.scheduler)
        if oldest and oldest not in failed:
            assert oldest in batch or self.scheduler.max_tokens_per_step < len(self.scheduler.running)
            assert oldest in finished or oldest.num_computed > before or oldest not in batch
        for job in failed:
            assert num_pages_for(job.num_tokens, self.scheduler.page_size) > self.scheduler.pool.num_pages
        self.alive = [job for job in self.alive if job not in finished and job not in failed]

    @invariant()
    def queues_are_in_order_of_arrival(self) -> None:
        jobs = [*self.scheduler.running, *self.scheduler.waiting]
        assert [job.arrival for job in jobs] == sorted(job.arrival for job in self.alive)

    @invariant()
    def pages_add_up(self) -> None:
        check_pages(self.scheduler)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(20_000):
            if not self.alive:
                break
            self.step()
        assert not self.alive, "a request starved"
        assert not self.scheduler.has_work
        assert self.scheduler.pool.num_free == self.scheduler.pool.num_pages


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(deadline=None, max_examples=60, stateful_step_count=30)


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

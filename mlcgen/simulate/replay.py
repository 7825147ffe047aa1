"""Replays a trace on replicas that have the engine's own scheduler and page pool; only the steps take made-up time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mlcgen.errors import RequestError
from mlcgen.runtime.kv_cache import PagePool
from mlcgen.runtime.scheduler import Scheduled, Scheduler
from mlcgen.runtime.scheduler import Sequence as Scheduling
from mlcgen.simulate.cost import StepCost, StepShape
from mlcgen.simulate.trace import Arrival

__all__ = ["Job", "Replay", "Replica", "Server", "replay"]

Prefill = Literal["chunked", "whole"]


@dataclass(frozen=True)
class Server:
    """One replica's sizes, and what its steps cost."""

    cost: StepCost
    num_pages: int
    page_size: int
    max_batch: int
    tokens_per_step: int
    prefill: Prefill = "chunked"
    prefix_cache: bool = True
    context_length: int | None = None
    host_pages: int = 0  # for what is preempted; 0: it is computed anew
    page_seconds: float = 0.0  # to move a page to the host or back
    looks_ahead: bool = False  # a step is chosen when the one before it begins, as engines on GPUs do


class Job(Scheduling):
    """A request. All its tokens are a number of its own, but for those that its group shares."""

    def __init__(self, number: int, arrival: Arrival, group: int, context_length: int | None) -> None:
        own = arrival.prompt_tokens - arrival.shared_tokens
        super().__init__([-1 - group] * arrival.shared_tokens + [number] * own, arrival.seconds)
        self.number, self.arrival = number, arrival
        room = arrival.output_tokens if context_length is None else context_length - arrival.prompt_tokens
        self.num_wanted = min(arrival.output_tokens, room)
        self.token_times: list[float] = []
        self.error: str | None = None


@dataclass
class Usage:
    """What a replica's steps add up to; `*_seconds` are integrals over the time of steps."""

    num_steps: int = 0
    busy_seconds: float = 0.0
    page_seconds: float = 0.0  # pages held
    waste_seconds: float = 0.0  # share of their slots that have no token
    peak_pages: int = 0
    num_moved: int = 0  # pages saved on the host or loaded
    num_preemptions: int = 0


@dataclass(frozen=True)
class _Step:
    batch: list[Job]
    ready: list[Job]  # those of them that sample
    seconds: float
    num_moved: int
    num_held: int  # pages
    waste: float  # share of their slots that have no token


@dataclass
class Replay:
    """What became of a trace."""

    jobs: list[Job]
    replicas: "list[Replica]"
    waiting: list[int] = field(default_factory=list)  # after each arrival, those that do not run
    unfinished: list[int] = field(default_factory=list)  # likewise, these and those that run

    @property
    def finished(self) -> list[Job]:
        return [job for job in self.jobs if job.error is None]


class Replica:
    """One engine, on a clock of its own. A step that has begun is counted when it ends."""

    def __init__(self, server: Server) -> None:
        self.server, self.usage, self.clock = server, Usage(), 0.0
        self.pool = PagePool(server.num_pages)
        # A prompt that is computed anew runs at the speed of the largest steps.
        whole = StepShape.of([(0, server.tokens_per_step, True)])
        token_seconds = server.cost.seconds(whole) / server.tokens_per_step
        self.scheduler: Scheduler[Job] = Scheduler(
            self.pool,
            server.page_size,
            server.max_batch,
            server.tokens_per_step,
            prefix_cache=server.prefix_cache,
            chunked_prefill=server.prefill == "chunked",
            host_pool=PagePool(server.host_pages),
            prefers_saving=lambda job: 2 * len(job.table) * server.page_seconds < job.num_computed * token_seconds,
        )
        self._step: _Step | None = None  # under way; it ends at `clock`
        self._next: _Step | None = None  # chosen already

    @property
    def num_unfinished(self) -> int:
        return len(self.scheduler.running) + len(self.scheduler.waiting)

    def add(self, job: Job) -> None:
        """At the job's arrival, up to which the replica has run."""
        if self.server.context_length is not None and job.num_tokens >= self.server.context_length:
            job.error = f"a prompt of {job.num_tokens} tokens leaves no room in the context"
            return
        try:
            self.scheduler.add(job)
        except RequestError as error:
            job.error = str(error)
        if self._step is None:
            self.clock = max(self.clock, job.arrival.seconds)

    def run_until(self, seconds: float) -> None:
        """Run the steps that begin before then, and end those that end by then."""
        while True:
            if self._step is not None:
                if self.clock > seconds:
                    return
                self._end(self._step)
            if self.clock >= seconds or not self._begin():
                return

    def _begin(self) -> bool:
        """Start a step at `clock`; False if there is nothing to do."""
        step, self._next = self._next or self._choose(), None
        if step is None:
            return False
        self._step = step
        self._count(step)
        self.scheduler.advance(step.batch)
        for job in step.ready:
            job.num_tokens += 1
            job.is_ending = len(job.token_times) + 1 == job.num_wanted
        if self.server.looks_ahead and step.ready:
            self._next = self._choose()
        return True

    def _choose(self) -> _Step | None:
        while self.scheduler.has_work:
            chosen = self.scheduler.schedule()
            for job in chosen.outgrown:
                job.error = f"{job.num_tokens} tokens are more than the pages hold"
            if chosen.batch:
                return self._measure(chosen)
            if self._step is not None:  # those that run end with it
                break
        return None

    def _measure(self, chosen: Scheduled[Job]) -> _Step:
        server, running = self.server, self.scheduler.running
        shape = StepShape.of((job.num_computed, job.num_scheduled, job.reaches_end) for job in chosen.batch)
        moved = sum(transfer.kind != "copy" for transfer in chosen.transfers)
        slots = sum([len(job.table) for job in running]) * server.page_size
        return _Step(
            chosen.batch,
            [job for job in chosen.batch if job.reaches_end],
            server.cost.seconds(shape) + moved * server.page_seconds,
            moved,
            self.pool.num_pages - self.pool.num_free,
            1 - sum([job.num_tokens for job in running]) / slots,
        )

    def _count(self, step: _Step) -> None:
        usage = self.usage
        self.clock += step.seconds
        usage.num_steps += 1
        usage.num_moved += step.num_moved
        usage.busy_seconds += step.seconds
        usage.page_seconds += step.num_held * step.seconds
        usage.waste_seconds += step.waste * step.seconds
        usage.peak_pages = max(usage.peak_pages, step.num_held)

    def _end(self, step: _Step) -> None:
        self._step = None
        for job in step.ready:
            if job.error is not None:  # it has outgrown the pages in the step that was chosen meanwhile
                continue
            job.token_times.append(self.clock)
            job.tokens.append(job.number)
            if len(job.token_times) == job.num_wanted:
                self.usage.num_preemptions += job.num_preemptions
                self.scheduler.remove(job)


def replay(
    trace: Sequence[Arrival],
    server: Server,
    num_replicas: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Replay:
    """Run a trace to its end. A request goes to the replica with the fewest unfinished ones, the first of several."""
    replicas = [Replica(server) for _ in range(num_replicas)]
    groups: dict[str | None, int] = {}
    result = Replay([], replicas)
    for number, arrival in enumerate(trace):
        for replica in replicas:
            replica.run_until(arrival.seconds)
        group = groups.setdefault(arrival.group, len(groups))
        job = Job(number, arrival, group, server.context_length)
        result.jobs.append(job)
        min(replicas, key=lambda each: each.num_unfinished).add(job)
        result.waiting.append(sum(len(each.scheduler.waiting) for each in replicas))
        result.unfinished.append(sum(each.num_unfinished for each in replicas))
        if progress is not None and number % 64 == 0:
            progress(number, len(trace))
    for replica in replicas:
        replica.run_until(float("inf"))
    if progress is not None:
        progress(len(trace), len(trace))
    return result

"""What a replayed trace says: rates, latencies, memory, and whether the load was too much."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlcgen.simulate.replay import Job, Replay

__all__ = ["Percentiles", "Summary", "summarize"]

GROWTH = 1.25  # of the mean number of unfinished requests from one third of the arrivals to the next, to keep growing
LEAST_SHARE = 0.05  # of all requests, that must be unfinished when the last one comes


@dataclass(frozen=True)
class Percentiles:
    """Seconds; 0 of nothing."""

    p50: float = 0.0
    p95: float = 0.0
    p99: float = 0.0

    @staticmethod
    def of(values: Sequence[float]) -> "Percentiles":
        return Percentiles(*np.percentile(values, [50, 95, 99]).tolist()) if values else Percentiles()


@dataclass(frozen=True)
class Summary:
    """Of one replay; times in seconds."""

    num_requests: int
    num_finished: int
    num_failed: int  # too long for the context or the pages
    seconds: float  # from the first arrival to the last token
    requests_per_s: float
    tokens_per_s: float  # generated
    prompt_tokens_per_s: float
    ttft: Percentiles  # from the arrival to the first token
    tpot: Percentiles  # mean time between two tokens of a request
    gap: Percentiles  # time between any two tokens of a request, so that a pause is not averaged away
    longest_gap: float
    latency: Percentiles  # from the arrival to the last token
    busy: float  # share of the time in which steps ran, mean over replicas
    mean_pages: float  # held while steps ran, of a replica
    peak_pages: int
    waste: float  # share of the slots of held pages without a token
    num_preemptions: int
    num_moved_pages: int
    hit_rate: float  # prompt tokens that were in the cache
    queue_at_end: int  # requests that waited when the last one came, it included
    is_overloaded: bool  # the unfinished ones became more and more


def summarize(result: Replay) -> Summary:
    done, replicas = result.finished, result.replicas
    first = result.jobs[0].arrival.seconds
    seconds = max([job.token_times[-1] for job in done], default=first) - first
    per_second = 1 / seconds if seconds > 0 else 0.0
    usage = [replica.usage for replica in replicas]
    busy = sum(each.busy_seconds for each in usage)
    prompts = sum(replica.scheduler.num_prompt_tokens for replica in replicas)
    hits = sum(replica.scheduler.num_cached_tokens for replica in replicas)
    gaps = [gap for job in done for gap in np.diff(job.token_times).tolist()]
    return Summary(
        num_requests=len(result.jobs),
        num_finished=len(done),
        num_failed=len(result.jobs) - len(done),
        seconds=seconds,
        requests_per_s=len(done) * per_second,
        tokens_per_s=sum(len(job.token_times) for job in done) * per_second,
        prompt_tokens_per_s=sum(job.arrival.prompt_tokens for job in done) * per_second,
        ttft=Percentiles.of([job.token_times[0] - job.arrival.seconds for job in done]),
        tpot=Percentiles.of([_tpot(job) for job in done if len(job.token_times) > 1]),
        gap=Percentiles.of(gaps),
        longest_gap=max(gaps, default=0.0),
        latency=Percentiles.of([job.token_times[-1] - job.arrival.seconds for job in done]),
        busy=busy * per_second / len(replicas),
        mean_pages=sum(each.page_seconds for each in usage) / max(busy, 1e-300),
        peak_pages=max(each.peak_pages for each in usage),
        waste=sum(each.waste_seconds for each in usage) / max(busy, 1e-300),
        num_preemptions=sum(each.num_preemptions for each in usage),
        num_moved_pages=sum(each.num_moved for each in usage),
        hit_rate=hits / max(prompts, 1),
        queue_at_end=result.waiting[-1],
        is_overloaded=_keeps_growing(result.unfinished),
    )


def _tpot(job: Job) -> float:
    return (job.token_times[-1] - job.token_times[0]) / (len(job.token_times) - 1)


def _keeps_growing(unfinished: Sequence[int]) -> bool:
    """Whether there were more in each third of the arrivals than in the one before, and many at the end.

    Of a load that is too much they grow evenly, 1, 3, 5 by thirds; of others they stay about the same once the engine
    is as full as the load makes it.
    """
    if unfinished[-1] <= max(4, LEAST_SHARE * len(unfinished)):
        return False
    begin, middle, end = (float(np.mean(third)) for third in np.array_split(unfinished, 3))
    return middle > GROWTH * begin and end > GROWTH * middle

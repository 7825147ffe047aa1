"""Traces replayed on the real scheduler and page pool, with step costs that make the right times known."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlcgen.errors import SimulationError
from mlcgen.simulate.cost import MeasuredStep, StepCost, StepShape, fit, nonnegative_least_squares
from mlcgen.simulate.replay import Replay, Server, replay
from mlcgen.simulate.report import summarize
from mlcgen.simulate.run import Options, simulate
from mlcgen.simulate.step_times import Limits, StepTimes
from mlcgen.simulate.trace import Arrival, Lengths, Load, make_trace

COST = StepCost(fixed=0.01, knots=(1, 8, 64), slopes=(0.001, 0.0005, 0.002), row=0.0002, cached=1e-6, pair=1e-7)


def make_server(cost: StepCost = COST, **sizes: object) -> Server:
    given = {"num_pages": 64, "page_size": 4, "max_batch": 8, "tokens_per_step": 32} | sizes
    return Server(cost, **given)  # type: ignore[arg-type]


def held_pages(result: Replay) -> list[int]:
    return [replica.pool.num_pages - replica.pool.num_free for replica in result.replicas]


def constant_step(seconds: float) -> StepCost:
    return StepCost(seconds, (1, 2), (0.0, 0.0), 0.0, 0.0, 0.0)


arrivals = st.builds(
    lambda seconds, own, shared, output, group: Arrival(
        seconds, own + shared, output, group if shared else None, shared
    ),
    st.floats(0, 3),
    st.integers(1, 60),
    st.integers(0, 20),
    st.integers(1, 40),
    st.sampled_from("ab"),
)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(arrivals, min_size=1, max_size=25),
    st.integers(30, 60),
    st.integers(1, 6),
    st.integers(1, 3),
    st.sampled_from(["chunked", "whole"]),
    st.booleans(),
    st.sampled_from([0, 50]),
    st.booleans(),
)
def test_every_request_ends_once_with_all_its_tokens_and_no_page_is_left_held(
    trace: list[Arrival],
    num_pages: int,
    max_batch: int,
    replicas: int,
    prefill: str,
    prefix_cache: bool,
    host_pages: int,
    looks_ahead: bool,
) -> None:
    trace.sort(key=lambda arrival: arrival.seconds)
    server = make_server(
        num_pages=num_pages,
        max_batch=max_batch,
        prefill=prefill,
        prefix_cache=prefix_cache,
        host_pages=host_pages,
        page_seconds=1e-6,
        looks_ahead=looks_ahead,
    )
    result = replay(trace, server, replicas)
    assert [job.arrival for job in result.jobs] == trace
    assert held_pages(result) == [0] * replicas
    for job in result.finished:
        assert len(job.token_times) == job.arrival.output_tokens
        assert (np.diff([job.arrival.seconds, *job.token_times]) > 0).all()
    for replica in result.replicas:
        assert not replica.scheduler.has_work
        assert replica.usage.peak_pages <= num_pages
        assert replica.scheduler.host_pool.num_free == host_pages
    summary = summarize(result)
    assert summary.num_finished + summary.num_failed == len(trace)
    assert 0 <= summary.waste < 1
    assert 0 <= summary.busy <= 1 + 1e-9
    assert summary.ttft.p50 <= summary.ttft.p95 <= summary.ttft.p99


def test_a_request_alone_takes_what_its_steps_cost() -> None:
    (job,) = replay([Arrival(2.0, 50, 3)], make_server()).jobs
    prompt = COST.seconds(StepShape(32, 0, 0, 32 * 33 // 2)) + COST.seconds(StepShape(18, 1, 0, 18 * 32 + 18 * 19 // 2))
    second = COST.seconds(StepShape(1, 1, 51, 0))
    third = COST.seconds(StepShape(1, 1, 52, 0))
    assert np.diff([2.0, *job.token_times]).tolist() == pytest.approx([prompt, second, third])


def test_one_at_a_time_waits_as_a_queue_with_poisson_arrivals_and_one_server_does() -> None:
    """Pollaczek and Khinchin for M/D/1: the mean wait is rho / (2 (1 - rho)) services."""
    load = Load(4_000, "poisson", Lengths(1, 1), Lengths(1, 1))
    trace = make_trace(load, rate=0.7)
    result = replay(trace, make_server(constant_step(1.0), max_batch=1))
    waits = [job.token_times[0] - job.arrival.seconds - 1.0 for job in result.jobs]
    assert float(np.mean(waits)) == pytest.approx(0.7 / (2 * 0.3), rel=0.2)


def test_replicas_share_the_load_and_one_of_them_is_not_enough() -> None:
    trace = make_trace(Load(300, "poisson", Lengths(1, 1), Lengths(1, 1)), rate=2.5)
    server = make_server(constant_step(1.0), max_batch=1)
    alone, four = (summarize(replay(trace, server, count)) for count in (1, 4))
    assert alone.is_overloaded
    assert alone.requests_per_s == pytest.approx(1.0, rel=0.01)
    assert alone.queue_at_end > 150
    assert not four.is_overloaded
    assert four.requests_per_s == pytest.approx(2.5, rel=0.2)
    assert four.busy == pytest.approx(2.5 / 4, rel=0.2)


def test_without_chunks_a_decode_waits_for_a_prompt_that_comes_and_with_them_it_does_not() -> None:
    trace = [Arrival(0.0, 4, 60), Arrival(0.1, 120, 1)]
    results = {prefill: replay(trace, make_server(prefill=prefill)) for prefill in ("chunked", "whole")}
    gaps = {prefill: max(np.diff(result.jobs[0].token_times)) for prefill, result in results.items()}
    first = {prefill: result.jobs[1].token_times[0] for prefill, result in results.items()}
    steps = sum(COST.seconds(StepShape.of([(before, 32, False)])) for before in (0, 32, 64))
    assert gaps["whole"] > steps > gaps["chunked"]
    assert summarize(results["whole"]).longest_gap == pytest.approx(gaps["whole"])
    assert first["whole"] < first["chunked"]


def test_where_steps_are_chosen_ahead_a_request_waits_a_step_longer_and_the_others_take_as_long() -> None:
    trace = [Arrival(0.0, 4, 60), Arrival(10.5, 4, 3)]
    results = [replay(trace, make_server(constant_step(1.0), looks_ahead=ahead)) for ahead in (False, True)]
    first = [result.jobs[1].token_times[0] for result in results]
    assert first == [12.0, 13.0]
    assert [result.jobs[0].token_times for result in results] == [[float(i) for i in range(1, 61)]] * 2


def test_a_shared_beginning_is_computed_once() -> None:
    load = Load(50, "poisson", Lengths(8, 8), Lengths(2, 2), shared_prefix=40)
    trace = make_trace(load, rate=1.0)
    hit = summarize(replay(trace, make_server()))
    cold = summarize(replay(trace, make_server(prefix_cache=False)))
    assert hit.hit_rate == pytest.approx(40 / 48 * 49 / 50)
    assert cold.hit_rate == 0
    assert hit.ttft.p50 < cold.ttft.p50


def test_too_few_pages_preempt_and_saving_is_cheaper_than_computing_anew_where_it_costs_nothing() -> None:
    trace = [Arrival(0.0, 20, 60)] * 6
    anew = summarize(replay(trace, make_server(num_pages=40)))
    saved = summarize(replay(trace, make_server(num_pages=40, host_pages=400)))
    assert anew.num_preemptions > 0
    assert anew.num_moved_pages == 0
    assert saved.num_moved_pages > 0
    assert saved.seconds < anew.seconds
    assert anew.peak_pages == 40


def test_what_can_never_fit_fails_and_the_others_go_on() -> None:
    trace = [Arrival(0.0, 100, 5), Arrival(0.0, 10, 5), Arrival(0.0, 10, 60)]
    summary = summarize(replay(trace, make_server(num_pages=12)))
    assert (summary.num_finished, summary.num_failed) == (1, 2)
    server = make_server(context_length=20)
    long, short = replay([Arrival(0.0, 20, 5), Arrival(0.0, 10, 60)], server).jobs
    assert long.error
    assert len(short.token_times) == 10, "the context ends it, as in the engine"
    assert summarize(replay([Arrival(0.0, 20, 5)], server)).requests_per_s == 0


def test_traces_have_the_rate_and_the_lengths_that_were_asked_for() -> None:
    random = np.random.default_rng(1)
    drawn = np.array(Lengths(100, 400).draw(random, 40_000))
    assert np.percentile(drawn, [50, 95]) == pytest.approx([100, 400], rel=0.05)
    gaps = {}
    for kind in ("poisson", "bursty"):
        trace = make_trace(Load(5_000, kind, Lengths(5, 5), Lengths(7, 7)), rate=4.0)
        gaps[kind] = np.diff([arrival.seconds for arrival in trace])
        assert gaps[kind].mean() == pytest.approx(0.25, rel=0.1)
        assert (trace[0].prompt_tokens, trace[0].output_tokens) == (5, 7)
    assert gaps["poisson"].std() / gaps["poisson"].mean() == pytest.approx(1, rel=0.1)
    assert gaps["bursty"].std() / gaps["bursty"].mean() == pytest.approx(3, rel=0.1)


def test_a_fit_finds_the_coefficients_that_made_the_steps() -> None:
    shapes = [StepShape(count, count, count * context) for count in (1, 2, 8, 64) for context in (10, 500)]
    shapes += [StepShape.of([(before, count, True)]) for count in (8, 16, 64, 128) for before in (0, 300)]
    true = StepCost(0.01, (1, 8, 64, 128), (0.001, 0.0, 0.002, 0.002), 0.0002, 1e-6, 1e-7)
    found = fit([MeasuredStep(shape, true.seconds(shape)) for shape in shapes])
    assert found.errors([MeasuredStep(shape, true.seconds(shape)) for shape in shapes]) == pytest.approx(
        [0] * 16, abs=1e-9
    )
    assert (found.row, found.cached, found.pair) == pytest.approx((true.row, true.cached, true.pair))
    for tokens in (1, 5, 8, 30, 64, 100, 200):
        assert found.seconds(StepShape(tokens, 1)) == pytest.approx(true.seconds(StepShape(tokens, 1)))


def test_a_fit_of_noisy_steps_never_has_time_go_down() -> None:
    random = np.random.default_rng(0)
    shapes = [StepShape(count, 1, 10) for count in (1, 2, 4, 8, 16, 32)] * 3
    cost = fit([MeasuredStep(shape, 0.01 * math.exp(random.normal())) for shape in shapes])
    times = [cost.seconds(StepShape(tokens, 1, 10)) for tokens in range(1, 65)]
    assert times == sorted(times)
    assert min(cost.fixed, *cost.slopes, cost.row, cost.cached, cost.pair) >= 0


def test_nonnegative_least_squares_meets_the_conditions_of_an_optimum() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        a, b = random.normal(size=(12, 5)), random.normal(size=12)
        x = nonnegative_least_squares(a, b)
        gradient = a.T @ (b - a @ x)
        assert (x >= 0).all()
        assert (gradient <= 1e-8).all(), "no coefficient at 0 would rise"
        assert np.abs(gradient[x > 0]).max(initial=0) < 1e-8


def test_steps_of_one_size_are_too_few() -> None:
    with pytest.raises(SimulationError, match="two different"):
        fit([MeasuredStep(StepShape(1, 1), 0.1)])


def test_all_combinations_are_tried_on_the_same_requests() -> None:
    shapes = [StepShape(1, 1), StepShape(64, 1)]
    times = StepTimes("made up", [MeasuredStep(shape, COST.seconds(shape)) for shape in shapes], Limits(page_bytes=100))
    load = Load(20, "poisson", Lengths(20, 40), Lengths(5, 10))
    options = Options(load, (1.0, 2.0), None, (16, 1024), ("chunked", "whole"), (1, 2), page_size=8)
    result = simulate(times, options)
    assert len(result.cases) == 16
    assert len({(c.rate, c.tokens_per_step, c.prefill, c.replicas) for c in result.cases}) == 16
    assert {case.summary.num_finished for case in result.cases} == {20}
    assert result.server.num_pages == 64 * 512
    assert result.warnings == ["steps of 1024 tokens are beyond the 512 of the measured engine"]
    assert result.as_dict() == simulate(times, options).as_dict(), "a seed says all"

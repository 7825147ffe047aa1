"""Prefix sharing, several samples, saved pages, priorities, deadlines and drafts: none of them changes a token."""

import itertools
import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlcgen.errors import RequestError
from mlcgen.runtime.draft_model import ModelDrafter
from mlcgen.runtime.engine import Engine
from mlcgen.runtime.ngram import NgramIndex
from mlcgen.runtime.options import EngineOptions
from mlcgen.runtime.sampler import SamplingParams
from mlcgen.runtime.step_cost import StepCost

from .tiny_engine import (
    CONTEXT,
    REPETITIVE,
    NumpyExecutor,
    drafting_engine,
    greedy,
    make_engine,
    prompt_of,
    run,
    run_alone,
)

TEMPERATURE = 6.0  # this model is sure of itself
SYSTEM = prompt_of(33, seed=9)
REQUESTS = [
    (SYSTEM + prompt_of(3), greedy(20)),
    (SYSTEM + prompt_of(9), greedy(12)),
    (SYSTEM, greedy(9)),
    (REPETITIVE, greedy(24)),
    (prompt_of(1), SamplingParams(seed=3, max_tokens=15, temperature=0.9, ignore_eos=True)),
    (SYSTEM[:16], SamplingParams(seed=4, max_tokens=9, presence_penalty=1.0, temperature=0.8, ignore_eos=True)),
]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    plain = EngineOptions(prefix_cache=False, swap_bytes=0)
    return [run(make_engine(options=plain), [request])[0].token_ids for request in REQUESTS]


# Every two values of two choices come together at least once.
CHOICES = {
    "prefix_cache": (True, False),
    "swap_bytes": (1 << 20, 0),
    "speculation": ("off", "ngram", "lookahead", "model"),
    "branches": (1, 3),
    "chunked_prefill": (True, False),
    "tokens_per_step": (None, 7),
    "page_size": (1, 4, 16),
    "num_pages": (1000, 70),  # tokens: enough for all, or for the longest alone
}


def pairwise() -> list[dict[str, object]]:
    names = list(CHOICES)
    everything = [dict(zip(names, values, strict=True)) for values in itertools.product(*CHOICES.values())]
    missing = {(a, x, b, y) for a, b in itertools.combinations(names, 2) for x in CHOICES[a] for y in CHOICES[b]}
    chosen = []
    while missing:
        best = max(everything, key=lambda case: len(covered(case) & missing))
        missing -= covered(best)
        chosen.append(best)
    return chosen


def covered(case: dict[str, object]) -> set[tuple[object, ...]]:
    return {(a, case[a], b, case[b]) for a, b in itertools.combinations(case, 2)}


@pytest.mark.parametrize("case", pairwise(), ids=lambda case: "-".join(map(str, case.values())))
@pytest.mark.usefixtures("cheap_guesses")
def test_no_feature_changes_a_token(case: dict[str, object], expected: list[list[int]]) -> None:
    options = dict(case)
    page_size, tokens = options.pop("page_size"), options.pop("num_pages")
    assert isinstance(page_size, int)
    assert isinstance(tokens, int)
    engine = drafting_engine(options, page_size=page_size, num_pages=-(-tokens // page_size))
    for _ in range(2):  # again, with what the first time left in the cache
        assert [output.token_ids for output in run(engine, REQUESTS)] == expected
    stats = engine.stats()
    assert stats.num_free_pages == stats.num_pages
    assert (stats.num_running, stats.num_waiting, stats.num_saved_pages) == (0, 0, 0)
    assert bool(stats.num_cached_tokens) == (case["prefix_cache"] is True)


@settings(deadline=None, max_examples=30)
@given(
    page_size=st.integers(1, 20),
    num_pages=st.integers(70, 200),
    budget=st.integers(1, 64),
    max_batch=st.integers(1, 8),
    swap=st.sampled_from([0, 1 << 14, 1 << 20]),
    speculation=st.sampled_from(["off", "ngram"]),
)
def test_any_engine_gives_the_same_tokens(
    page_size: int, num_pages: int, budget: int, max_batch: int, swap: int, speculation: str, expected: list[list[int]]
) -> None:
    options = EngineOptions(swap_bytes=swap, speculation=speculation, tokens_per_step=budget)  # type: ignore[arg-type]
    engine = make_engine(
        options=options, page_size=page_size, num_pages=-(-num_pages // page_size), max_batch=max_batch
    )
    assert [output.token_ids for output in run(engine, REQUESTS)] == expected


def test_a_shared_beginning_is_computed_once() -> None:
    engine = make_engine()
    first = run(engine, [([*SYSTEM, 1, 2], greedy(3))])[0]
    again = run(engine, [([*SYSTEM, 3, 4, 5], greedy(3))])[0]
    assert first.metrics.num_cached_tokens == 0
    assert again.metrics.num_cached_tokens == 32  # whole pages of 4
    assert engine.stats().hit_rate == pytest.approx(32 / (35 + 36))


def test_the_same_prompt_again_computes_one_token() -> None:
    engine = make_engine()
    prompt = prompt_of(40)
    outputs = [run(engine, [(prompt, greedy(5))])[0] for _ in range(2)]
    assert outputs[1].metrics.num_cached_tokens == 39
    assert outputs[0].token_ids == outputs[1].token_ids


def test_what_was_used_longest_ago_goes_first() -> None:
    engine = make_engine(num_pages=20)  # of 4 tokens
    old, recent = prompt_of(28, 1), prompt_of(28, 2)
    run(engine, [(old, greedy(1))])
    run(engine, [(recent, greedy(1))])
    run(engine, [(prompt_of(28, 3), greedy(1))])
    assert run(engine, [([*recent, 7], greedy(1))])[0].metrics.num_cached_tokens == 28
    assert run(engine, [([*old, 7], greedy(1))])[0].metrics.num_cached_tokens < 28


def test_samples_share_the_prompt() -> None:
    executor = NumpyExecutor()
    engine = make_engine(executor=executor)
    prompt = prompt_of(41)
    params = SamplingParams(n=4, seed=11, max_tokens=10, ignore_eos=True)
    output = engine.add_request("n", prompt, params, stream=False)
    most = 0
    while engine.has_unfinished:
        engine.step()
        most = max(most, engine.pool.num_pages - engine.pool.num_free)
    assert most <= 10 + 4 * 4  # of the prompt, ten pages that all have, and each one's own
    alone = [SamplingParams(seed=11 + i, max_tokens=10, ignore_eos=True) for i in range(4)]
    assert [each.token_ids for each in output.outputs] == run_alone([(prompt, params) for params in alone])
    assert [each.index for each in output.outputs] == [0, 1, 2, 3]
    assert output.metrics.num_tokens == 40
    assert engine.pool.num_free == engine.pool.num_pages


@pytest.mark.parametrize("after", [0, 1, 3])
def test_aborting_all_samples(after: int) -> None:
    engine = make_engine()
    output = engine.add_request("n", prompt_of(9), SamplingParams(n=3, max_tokens=30), stream=False)
    for _ in range(after):
        engine.step()
    assert engine.abort("n")
    assert engine.step() == [output]
    assert {each.finish_reason for each in output.outputs} == {"abort"}
    assert engine.pool.num_free == engine.pool.num_pages
    assert not engine.has_unfinished


def test_samples_are_not_streamed() -> None:
    output = make_engine().add_request("n", [1, 2], SamplingParams(n=2))
    assert isinstance(output.error, RequestError)
    assert "n=2 samples cannot be streamed" in str(output.error)


def test_pages_are_saved_and_come_back() -> None:
    executor = NumpyExecutor(num_pages=16)
    engine = make_engine(executor=executor, options=EngineOptions(prefix_cache=False))
    requests = [(prompt_of(20, seed), greedy(30)) for seed in range(3)]
    assert [output.token_ids for output in run(engine, requests)] == run_alone(requests)
    stats = engine.stats()
    assert stats.num_saved == stats.num_loaded > 0
    assert stats.num_preemptions > 0
    assert executor.num_steps < 100


def test_a_failure_while_pages_are_saved_loses_none_of_what_they_hold() -> None:
    requests = [(prompt_of(20, seed), greedy(30)) for seed in range(4)]
    engine = make_engine(num_pages=24, options=EngineOptions(swap_bytes=1 << 20))
    read, failures = engine.executor.read_pages, []

    def fails_once(pages: Sequence[int], host: np.ndarray, places: Sequence[int]) -> None:
        if not failures:
            failures.append(pages)
            raise OSError("no answer")
        read(pages, host, places)

    engine.executor.read_pages = fails_once  # type: ignore[method-assign]
    outputs = [engine.add_request(str(i), *request, stream=False) for i, request in enumerate(requests)]
    while engine.has_unfinished:
        engine.step()
    assert failures
    errors = [output for output in outputs if output.error]
    assert all("no answer" in str(output.error) for output in errors)
    assert 0 < len(errors) < 4
    expected = run_alone(requests)
    for output, tokens in zip(outputs, expected, strict=True):
        assert output.error or output.token_ids == tokens
    assert engine.pool.num_free == engine.pool.num_pages


def finishing_order(engine: Engine) -> list[str]:
    order = []
    while engine.has_unfinished:
        order += [output.request_id for output in engine.step() if output.finished]
    return order


def test_priority() -> None:
    engine = make_engine(max_batch=1)
    for name, priority in (("first", 0), ("low", -1), ("high", 2), ("also high", 2)):
        engine.add_request(name, prompt_of(5), greedy(3), priority=priority)
    assert finishing_order(engine) == ["high", "also high", "first", "low"]


def test_one_that_is_due_soon_comes_before_those_that_are_not() -> None:
    engine = make_engine(max_batch=1)
    engine.add_request("whenever", prompt_of(5), greedy(3))
    engine.add_request("due", prompt_of(5), greedy(3), deadline=30)
    assert finishing_order(engine) == ["due", "whenever"]


def test_a_deadline_ends_a_request() -> None:
    engine = make_engine()
    late = engine.add_request("late", prompt_of(5), greedy(100), deadline=0.05)
    on_time = engine.add_request("on time", prompt_of(5), greedy(3), deadline=60)
    engine.step()
    time.sleep(0.06)
    assert finishing_order(engine)[0] == "late"
    assert late.finish_reason == "timeout"
    assert on_time.finish_reason == "length"
    assert engine.pool.num_free == engine.pool.num_pages


@pytest.mark.parametrize("swap_bytes", [0, 1 << 20])
@pytest.mark.parametrize(("page_size", "window"), [(1, 8), (4, 8), (4, 30), (16, 9)])
def test_pages_behind_a_models_window_are_free(page_size: int, window: int, swap_bytes: int) -> None:
    requests = [(prompt_of(25), greedy(60)), (prompt_of(25), greedy(90)), (prompt_of(3), greedy(150))]
    expected = [run(make_engine(executor=NumpyExecutor(window=window)), [each])[0].token_ids for each in requests]
    engine = make_engine(window=window, page_size=page_size, num_pages=-(-80 // page_size), max_batch=3)
    assert engine.scheduler.window == window
    assert [output.token_ids for output in run(engine, requests)] == expected
    assert expected[0] != run_alone(requests[:1])[0]  # the window makes a difference


@pytest.mark.usefixtures("cheap_guesses")
@pytest.mark.parametrize("speculation", ["ngram", "lookahead", "model"])
def test_a_tree_is_right_more_often_than_a_chain(speculation: str) -> None:
    requests = [(prompt_of(7, seed), greedy(60)) for seed in range(4)]
    steps, depths = [], []
    for branches in (1, 3):
        engine = drafting_engine({"speculation": speculation, "branches": branches})
        run(engine, requests)
        stats = engine.stats()
        steps.append(stats.num_steps)
        depths.append(stats.num_accepted)
    if speculation == "model":
        assert max(steps) < 40
    assert depths[1] > 0
    assert steps[1] <= steps[0] * 1.1


@pytest.mark.usefixtures("cheap_guesses")
def test_a_trusted_draft_model_speaks_where_it_is_sure() -> None:
    small = NumpyExecutor()
    small.head = small.head + 0.5 * np.random.default_rng(2).standard_normal(small.head.shape)
    texts = {}
    for trust in (1e-6, 0.8, 1.0):
        options = EngineOptions(speculation="model", draft_model=Path("small"), trust=trust)
        engine = make_engine(options=options, drafter=ModelDrafter(small, CONTEXT, 8, trust=trust))
        texts[trust] = run(engine, [(prompt_of(9), greedy(50)), (prompt_of(9), greedy(50, logprobs=1))])
        assert engine.stats().num_accepted > 0 or trust == 1.0
    large, alone = run_alone([(prompt_of(9), greedy(50))])[0], [(prompt_of(9), greedy(50))]
    little = run(make_engine(executor=small), alone)[0].token_ids
    assert little != large
    assert texts[1e-6][0].token_ids[1:9] == walk_of(small, [*prompt_of(9), large[0]], 8)
    assert texts[0.8][0].token_ids not in (large, little)
    assert texts[1.0][0].token_ids == large
    assert all(outputs[1].token_ids == large for outputs in texts.values())  # wants what the large one says


def walk_of(executor: NumpyExecutor, prompt: list[int], count: int) -> list[int]:
    return run(make_engine(executor=executor), [(prompt, greedy(count))])[0].token_ids


@pytest.mark.usefixtures("cheap_guesses")
def test_a_draft_model_that_is_short_of_pages_guesses_for_some() -> None:
    small = NumpyExecutor(num_pages=3, page_size=16)
    options = EngineOptions(speculation="model", draft_model=Path("small"))
    engine = make_engine(options=options, drafter=ModelDrafter(small, context_length=60, max_batch=2))
    requests = [(prompt_of(30, seed), greedy(40)) for seed in range(3)]
    assert [output.token_ids for output in run(engine, requests)] == run_alone(requests)
    assert 0 < engine.stats().num_accepted < 2 * 40


@pytest.mark.usefixtures("cheap_guesses")
def test_a_draft_model_of_small_batches() -> None:
    small, sizes = NumpyExecutor(num_pages=100), []
    step = small.step
    small.step = lambda batch: sizes.append(len(batch.seq_lens)) or step(batch)  # type: ignore[method-assign,func-returns-value]
    options = EngineOptions(speculation="model", draft_model=Path("small"))
    engine = make_engine(options=options, drafter=ModelDrafter(small, CONTEXT, max_batch=2))
    requests = [(prompt_of(10, seed), greedy(20)) for seed in range(5)]
    assert [output.token_ids for output in run(engine, requests)] == run_alone(requests)
    assert max(sizes) == 2


@pytest.mark.usefixtures("cheap_guesses")
def test_drawn_guesses_keep_the_distribution() -> None:
    """Of the second and third token of samples without a seed, as the large model alone has it."""
    prompt, drawn = prompt_of(5), {"top_k": 3, "temperature": TEMPERATURE, "ignore_eos": True}
    engine = drafting_engine({"speculation": "model", "branches": 1}, num_pages=400)
    first = run(make_engine(), [(prompt, greedy(1))])[0].token_ids[0]
    samples = SamplingParams(n=1024, max_tokens=3, **drawn)  # type: ignore[arg-type]
    output = engine.add_request("a", [*prompt, first], samples, stream=False)
    while not output.finished:
        engine.step()
    stats = engine.stats()
    assert 0.2 < stats.acceptance < 0.95
    assert stats.num_drafted > 500
    counts = Counter(tuple(completion.token_ids) for completion in output.outputs)
    expected = {
        (a, b, c): p * q * r
        for a, p in likeliest([*prompt, first]).items()
        for b, q in likeliest([*prompt, first, a]).items()
        for c, r in likeliest([*prompt, first, a, b]).items()
    }
    assert counts.keys() <= expected.keys()
    common = {text: 1024 * p for text, p in expected.items() if 1024 * p > 5}
    chi_square = sum((counts[text] - mean) ** 2 / mean for text, mean in common.items())
    assert chi_square < chi2_bound(len(common))


def likeliest(prompt: list[int]) -> dict[int, float]:
    """The three likeliest tokens and their probabilities among themselves."""
    (best,) = run(make_engine(), [(prompt, greedy(1, logprobs=3))])[0].outputs[0].logprobs or [{}]
    weights = {token: math.exp(logprob / TEMPERATURE) for token, logprob in best.items()}
    return {token: weight / sum(weights.values()) for token, weight in weights.items()}


def chi2_bound(freedom: int) -> float:
    """Passed by chance once in 10,000 times (Wilson and Hilferty's approximation)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize("params", [greedy(61, logit_bias={7: 1000.0}), greedy(61)], ids=["on the host", "argmax"])
def test_drafts_save_steps(params: SamplingParams, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that says one thing over and over, and whose steps cost the same whatever is in them."""
    monkeypatch.setattr(StepCost, "of_another", lambda cost, num_tokens: 0.1)
    executor = NumpyExecutor()
    executor.embedding[:] = executor.embedding[7]  # what was said does not matter,
    executor.position[:] = executor.position[0]  # nor where
    request = (prompt_of(9), params)
    plain = run(make_engine(executor=executor), [request])[0]
    assert executor.num_steps == 61
    executor.num_steps = 0
    engine = make_engine(executor=executor, options=EngineOptions(speculation="ngram", max_draft=5))
    drafted = run(engine, [request])[0]
    assert drafted.token_ids == plain.token_ids
    assert executor.num_steps < 15
    stats = engine.stats()
    assert (stats.num_drafted, stats.num_accepted) == (drafted.metrics.num_drafted, drafted.metrics.num_accepted)
    assert stats.acceptance > 0.9
    assert engine.pool.num_free == engine.pool.num_pages


def test_wrong_drafts_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepCost, "of_another", lambda cost, num_tokens: 0.3)
    monkeypatch.setattr(NgramIndex, "propose", lambda index, tokens, count: [[1] * count])
    engine = make_engine(options=EngineOptions(speculation="ngram"))
    output = run(engine, [(prompt_of(9), greedy(100))])[0]
    assert output.token_ids == run_alone([(prompt_of(9), greedy(100))])[0]
    assert engine.stats().num_drafted < 40


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens_per_step": 0}, "tokens_per_step=0 is not valid; it must be an integer of at least 1"),
        ({"swap_bytes": -1}, "swap_bytes=-1 is not valid"),
        ({"max_draft": 1.5}, "max_draft=1.5 is not valid"),
        ({"speculation": "magic"}, "speculation='magic' is not known; have: off, ngram, lookahead, model"),
        ({"speculation": "model"}, "speculation='model' with draft_model='None'"),
        ({"speculation": "ngram", "draft_model": Path("a")}, "speculation='ngram' with draft_model='a'"),
        ({"branches": 0}, "branches=0 is not valid"),
        ({"trust": 0.9}, "trust=0.9 is not valid; it must be a probability, with speculation='model'"),
        ({"window": 8, "sinks": 4}, "window=8 with sinks=4 leaves no room"),
        ({"window_keeps": "best"}, "window_keeps='best' is not known; have: last, heavy"),
    ],
)
def test_options_that_are_not_valid(fields: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        EngineOptions(**fields)  # type: ignore[arg-type]

"""Sampling against the plain formulas."""

import math
from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlcgen.errors import RequestError
from mlcgen.runtime.distribution import Distribution, draw_index, verified
from mlcgen.runtime.executor import Float32
from mlcgen.runtime.sampler import _CHECKS, Sampler, SamplingParams, largest_reaching, top_k_ids

Float64 = npt.NDArray[np.float64]


def random_logits(size: int = 50, scale: float = 2.0, seed: int = 0) -> Float32:
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


def make_sampler(prompt: tuple[int, ...] = (), stop: tuple[int, ...] = (), **params: Any) -> Sampler:
    return Sampler(SamplingParams(**params), prompt, stop)


def draw(sampler: Sampler, logits: Float32) -> int:
    return sampler.sample(logits, int(logits.argmax()))


def expected_probabilities(logits: Float32, params: SamplingParams) -> Float64:
    """The plain formula, in float64, token by token from the most likely one."""
    p: Float64 = np.exp((logits.astype(np.float64) - logits.max()) / params.temperature)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    keep = np.ones(len(p), bool)
    if params.top_k > 0:
        keep[order[params.top_k :]] = False
    keep &= p >= params.min_p * p.max()
    p = np.where(keep, p, 0) / p[keep].sum()
    mass_before = np.cumsum(p[order]) - p[order]
    p[order[mass_before >= params.top_p]] = 0
    p /= p.sum()
    return p


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 5},
        {"top_k": -1},
        {"top_k": 10_000},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"top_k": 8, "top_p": 0.8, "min_p": 0.02, "temperature": 1.3},
    ],
)
@pytest.mark.parametrize("vocab", [40, 1000])  # within one block, and over several
def test_frequencies_follow_the_formula(params: dict[str, Any], vocab: int) -> None:
    num_draws = 4000
    logits = random_logits(vocab)
    sampler = make_sampler(seed=1, **params)
    counts = np.bincount([draw(sampler, logits) for _ in range(num_draws)], minlength=vocab)
    expected = expected_probabilities(logits, sampler.params)
    assert not counts[expected == 0].any()
    # Pearson's statistic has mean and variance of chi-squared: 6 standard deviations above is our bug, not bad luck.
    likely = expected * num_draws >= 5
    rest = expected[~likely].sum() * num_draws
    statistic = (((counts - expected * num_draws) ** 2)[likely] / (expected[likely] * num_draws)).sum()
    statistic += (counts[~likely].sum() - rest) ** 2 / rest if rest >= 5 else 0
    freedom = int(likely.sum())
    assert statistic < freedom + 6 * math.sqrt(2 * freedom)


def test_greedy_is_argmax_and_needs_no_call() -> None:
    logits = random_logits()
    sampler = make_sampler(temperature=0)
    assert sampler.is_argmax
    assert draw(sampler, logits) == logits.argmax()
    assert not make_sampler(temperature=0, repetition_penalty=1.2).is_argmax
    assert not make_sampler(temperature=1.0).is_argmax


def test_the_same_seed_draws_the_same_tokens_whatever_is_drawn_in_between() -> None:
    logits = [random_logits(seed=i) for i in range(20)]
    alone = make_sampler(seed=7)
    expected = [draw(alone, row) for row in logits]
    again, other = make_sampler(seed=7), make_sampler(seed=8)
    drawn = []
    for row in logits:
        draw(other, row)
        drawn.append(draw(again, row))
    assert drawn == expected
    unlike = make_sampler(seed=8)
    assert [draw(unlike, row) for row in logits] != expected


def test_without_a_seed_draws_differ() -> None:
    logits = np.zeros(1000, np.float32)
    first, second = make_sampler(), make_sampler()
    assert [draw(first, logits) for _ in range(8)] != [draw(second, logits) for _ in range(8)]


def penalized(logits: Float32, prompt: list[int], output: list[int], params: SamplingParams) -> Float64:
    """The definition, one token at a time."""
    result = logits.astype(np.float64)
    for token, bias in (params.logit_bias or {}).items():
        result[token] += bias
    for token in {*prompt, *output}:
        r = params.repetition_penalty
        result[token] = result[token] / r if result[token] > 0 else result[token] * r
    for token in set(output):
        result[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    return result


@settings(deadline=None)
@given(
    prompt=st.lists(st.integers(0, 19), max_size=30),
    num_steps=st.integers(1, 30),
    repetition=st.sampled_from([1.0, 0.8, 1.5]),
    presence=st.sampled_from([0.0, -1.0, 2.0]),
    frequency=st.sampled_from([0.0, -0.5, 1.5]),
    bias=st.dictionaries(st.integers(0, 19), st.floats(-5, 5, width=32), max_size=4),
)
def test_penalties_and_bias_follow_the_definition(
    prompt: list[int], num_steps: int, repetition: float, presence: float, frequency: float, bias: dict[int, float]
) -> None:
    params = SamplingParams(
        temperature=0,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=bias,
    )
    sampler = Sampler(params, prompt, [])
    output: list[int] = []
    for step in range(num_steps):
        logits = random_logits(20, seed=step % 3)
        untouched = logits.copy()
        token = draw(sampler, logits)
        expected = penalized(logits, prompt, output, params)
        assert expected[token] >= expected.max() - 1e-4
        assert (logits == untouched).all()
        output.append(token)


def test_min_tokens_hides_the_stop_tokens() -> None:
    logits = np.array([0, 5, 9, 1], np.float32)
    sampler = make_sampler(stop=(2,), temperature=0, min_tokens=2)
    assert [draw(sampler, logits) for _ in range(3)] == [1, 1, 2]


@pytest.mark.parametrize("count", [0, 1, 5, 49, 50, 60, -1])
def test_logprobs_are_the_raw_log_softmax(count: int) -> None:
    logits = random_logits()
    sampler = make_sampler(logprobs=count, temperature=0.3, logit_bias={0: 50.0})
    token = draw(sampler, logits)
    assert token == 0
    reported = sampler.logprobs(logits, int(logits.argmax()), token)
    exact = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    order = np.argsort(-logits).tolist()
    num_best = 50 if count < 0 else min(count, 50)
    assert list(reported)[:num_best] == order[:num_best]
    assert set(reported) == {*order[:num_best], 0}
    assert all(abs(value - exact[i]) < 1e-5 for i, value in reported.items())


@settings(deadline=None)
@given(st.integers(1, 2000), st.integers(0, 2100), st.integers(1, 40), st.integers(0, 1000))
def test_top_k_ids_is_a_stable_sort(size: int, k: int, num_distinct: int, seed: int) -> None:
    logits = np.random.default_rng(seed).integers(0, num_distinct, size).astype(np.float32)
    assert top_k_ids(logits, k).tolist() == np.argsort(-logits, kind="stable")[:k].tolist()


def test_top_k_ids_sees_through_minus_infinity() -> None:
    logits = np.full(1000, -np.inf, np.float32)
    logits[[3, 700]] = [1, 2]
    assert top_k_ids(logits, 2).tolist() == [700, 3]
    assert top_k_ids(logits, 3).tolist() == [700, 3, 0]


@settings(deadline=None)
@given(st.integers(1, 1500), st.floats(0, 1, exclude_max=True), st.integers(0, 1000))
def test_draw_index_inverts_the_running_sum(size: int, uniform: float, seed: int) -> None:
    weights = np.random.default_rng(seed).random(size).astype(np.float32)
    cumulative = np.cumsum(weights, dtype=np.float64)
    index = draw_index(weights, uniform)
    slack = 1e-5 * cumulative[-1]
    assert cumulative[index] - weights[index] - slack <= uniform * cumulative[-1] <= cumulative[index] + slack


def test_draw_index_never_draws_weight_zero_at_the_borders() -> None:
    weights = np.zeros(1000, np.float32)
    weights[600] = 1
    assert draw_index(weights, 0.0) == 600
    assert draw_index(weights, 1 - 2**-53) == 600


@settings(deadline=None)
@given(st.integers(1, 400), st.floats(0.01, 0.999), st.sampled_from([0.1, 1, 8]), st.integers(0, 1000))
def test_largest_reaching_is_the_smallest_set(size: int, top_p: float, scale: float, seed: int) -> None:
    weights = np.exp(random_logits(size, scale, seed))
    target = top_p * float(weights.sum(dtype=np.float64))
    kept = largest_reaching(weights, target)
    order = np.argsort(-weights, kind="stable")
    assert len(set(kept.tolist())) == len(kept)
    assert sorted(weights[kept]) == sorted(weights[order[: len(kept)]])
    total = weights[kept].sum(dtype=np.float64)
    assert total >= target * (1 - 1e-9)
    assert total - weights[kept].min() < target * (1 + 1e-9)


def test_equal_logits_keep_top_p_of_the_tokens() -> None:
    sampler = make_sampler(top_p=0.5, seed=0)
    drawn = {draw(sampler, np.zeros(10, np.float32)) for _ in range(300)}
    assert drawn == {0, 1, 2, 3, 4}


def test_extreme_logits_stay_finite() -> None:
    logits = np.array([-3e38, 3e38, -np.inf, 0], np.float32)
    for params in ({"temperature": 1e-4}, {"temperature": 100.0}, {"top_p": 0.5}, {"top_k": 2}, {"min_p": 1.0}):
        assert draw(make_sampler(seed=0, **params), logits) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 10**400),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 3),
        ("frequency_penalty", -2.5),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {"1": 1.0}),
        ("logit_bias", {1: math.inf}),
        ("logit_bias", {1: 10**400}),
        ("logit_bias", [1]),
        ("seed", -1),
        ("max_tokens", 0),
        ("max_tokens", 1.0),
        ("min_tokens", -1),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", [1]),
        ("stop_token_ids", [1.5]),
        ("stop_token_ids", 3),
        ("ignore_eos", 1),
        ("logprobs", -2),
        ("logprobs", True),
        ("skip_special_tokens", None),
    ],
)
def test_invalid_values_are_named(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as raised:
        SamplingParams(**{name: value})
    assert str(raised.value).startswith(f"{name}={value!r} is not valid; it must be")


def test_every_field_is_checked_and_its_default_is_valid() -> None:
    SamplingParams()
    assert [name for name, *_ in _CHECKS] == [field.name for field in fields(SamplingParams)]


def test_stop_strings_are_a_list_however_given() -> None:
    assert SamplingParams().stop_strings == []
    assert SamplingParams(stop="a").stop_strings == ["a"]
    assert SamplingParams(stop=["a", "b"]).stop_strings == ["a", "b"]


@pytest.mark.parametrize("seed", range(4))
def test_verified_guesses_are_distributed_as_the_target(seed: int) -> None:
    random = np.random.default_rng(seed)
    size = 6
    ids = np.sort(random.choice(size, 4, replace=False))
    target = Distribution(ids, random.random(4).astype(np.float32))
    proposal = Distribution(None, random.random(size).astype(np.float32) * (random.random(size) < 0.7))
    p, q = target.dense(size), proposal.dense(size)
    counts, num_right, draws = np.zeros(size), 0, 20_000
    for _ in range(draws):
        guess = proposal.draw(random.random())
        token = verified(target, guess, proposal, size, random)
        counts[token] += 1
        num_right += token == guess
    assert not counts[p == 0].any()
    chi_square = ((counts - draws * p)[p > 0] ** 2 / (draws * p[p > 0])).sum()
    assert chi_square < 22  # three degrees of freedom: by chance in one of 10,000
    assert num_right / draws == pytest.approx(np.minimum(p, q).sum(), abs=0.02)  # as often as can be

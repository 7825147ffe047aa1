"""Sampling on the device under the emulator, against runtime/sampler.py: the same seed gives the same tokens."""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from mlcgen.runtime.device_sampler import DeviceSampler
from mlcgen.runtime.sampler import Sampled, Sampler, SamplingParams

from .emulate_cuda import needs_compiler
from .emulated_device import EmulatedDevice

pytestmark = needs_compiler

SOURCE = """
#include "sample.cuh"
extern "C" __global__ void __launch_bounds__(1024)
    argmax_rows_by_parts(const float* logits, Best* parts, u32* counters, i32* ids, float* values, int vocab) {
  argmax_of_parts<1024>(logits, parts, counters, ids, values, vocab);
}
extern "C" __global__ void __launch_bounds__(1024)
    sample_rows(float* logits, const sampling::Row* rows, sampling::Change* changes, const u32* masks, i32* results,
                int vocab) {
  sampling::sample(logits, rows, changes, masks, results, vocab);
}
"""
VOCABS = [5, 257, 1000, 4097]


class Rows:
    """Requests, each sampled on the device and on the host."""

    def __init__(self, device: EmulatedDevice, vocab: int, params: Sequence[SamplingParams]) -> None:
        self.device, self.vocab = device, vocab
        self.sampler = DeviceSampler(device, vocab, len(params))
        self.logits = device.allocate(len(params) * vocab * 4, "logits")
        rng = np.random.default_rng(0)
        prompts = [rng.integers(0, vocab, 6).tolist() for _ in params]
        stops = [0, vocab - 1]
        self.on_device = [Sampler(p, prompt, stops) for p, prompt in zip(params, prompts, strict=True)]
        self.on_host = [Sampler(p, prompt, stops) for p, prompt in zip(params, prompts, strict=True)]

    def sample(self, logits: np.ndarray, masks: dict[int, np.ndarray] | None = None) -> Sampled:
        self.device.upload(self.logits, logits)
        self.sampler.start(self.logits, self.on_device, masks)
        self.device.synchronize()
        after = np.empty_like(logits)
        self.device.download(after, self.logits)
        np.testing.assert_array_equal(after, logits)
        return self.sampler.finish()

    def check(self, logits: np.ndarray) -> list[int]:
        """The tokens, which are those of the host."""
        sampled = self.sample(logits)
        expected = []
        for row, sampler, maximum in zip(logits, self.on_host, sampled.maxima, strict=True):
            best = int(row.argmax())
            assert maximum == row[best]
            expected.append(sampler.sample(row, best))
        assert sampled.tokens == expected
        return expected


@pytest.fixture(scope="module")
def device() -> EmulatedDevice:
    emulated = EmulatedDevice()
    emulated.load(SOURCE.encode(), [])
    return emulated


def random_logits(rows: int, vocab: int, seed: int, scale: float = 3) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, vocab)) * scale).astype(np.float32)


def many_params(vocab: int) -> list[SamplingParams]:
    """Each parameter alone, then together."""
    seeded = functools.partial(SamplingParams, seed=7)
    bias = {0: 2.5, vocab // 2: -100.0, vocab - 1: 4.0}
    alone: list[dict[str, object]] = [
        *({"temperature": t} for t in (0, 0.3, 1, 2, 1e6)),
        *({"top_k": k} for k in (1, 2, 50, vocab - 1, vocab)),
        *({"top_p": p} for p in (1e-9, 0.1, 0.5, 0.9, 1)),
        *({"min_p": p} for p in (0.05, 0.5, 1)),
        {"repetition_penalty": 1.7},
        {"presence_penalty": 1.5},
        {"frequency_penalty": -1.2},
        {"logit_bias": bias},
        {"min_tokens": 2},
    ]
    penalties = {"repetition_penalty": 0.6, "presence_penalty": 0.7, "frequency_penalty": 0.9}
    together: list[dict[str, object]] = [
        {"top_k": 50, "top_p": 0.9},
        {"top_k": 50, "top_p": 0.5, "min_p": 0.02, "temperature": 1.5},
        {"top_k": vocab - 1, "top_p": 0.95, "temperature": 0.8},
        {"min_p": 0.1, "top_p": 0.9},
        {"temperature": 0, **penalties, "logit_bias": bias, "min_tokens": 3},
        {"top_k": 20, "top_p": 0.9, **penalties, "logit_bias": bias, "min_tokens": 3},
        {"top_p": 0.8, **penalties, "logit_bias": bias, "min_tokens": 3},
    ]
    return [seeded(**fields) for fields in [*alone, *together]]


@pytest.mark.parametrize("vocab", VOCABS)
def test_tokens_are_those_of_the_host(device: EmulatedDevice, vocab: int) -> None:
    params = many_params(vocab)
    rows = Rows(device, vocab, params)
    for step in range(4):
        rows.check(random_logits(len(params), vocab, seed=step))


@pytest.mark.parametrize("fields", [{"top_p": 0.5}, {"top_p": 0.9}, {"top_k": 30, "top_p": 0.8}, {"min_p": 0.05}])
def test_many_random_numbers(device: EmulatedDevice, fields: dict[str, object]) -> None:
    params = [SamplingParams(seed=seed, **fields) for seed in range(150)]
    Rows(device, 257, params).check(np.tile(random_logits(1, 257, seed=4), (len(params), 1)))


def test_a_large_vocabulary(device: EmulatedDevice) -> None:
    together = {"top_p": 0.9, "top_k": 40, "min_p": 0.01, "repetition_penalty": 1.2, "min_tokens": 1}
    fields = [{}, {"top_k": 50}, {"top_p": 0.9}, {"top_p": 0.9, "temperature": 0.5}, together]
    rows = Rows(device, 50_000, [SamplingParams(seed=3, **f) for f in fields])
    rows.check(random_logits(len(fields), 50_000, seed=1))


def equal(rows: int, vocab: int) -> np.ndarray:
    return np.full((rows, vocab), 0.5, np.float32)


def whole_numbers(rows: int, vocab: int) -> np.ndarray:
    return np.round(random_logits(rows, vocab, seed=5, scale=1.5)) * np.float32(0.5)


def nearly_flat(rows: int, vocab: int) -> np.ndarray:
    return random_logits(rows, vocab, seed=6, scale=0.1)


def far_apart(rows: int, vocab: int) -> np.ndarray:
    logits = random_logits(rows, vocab, seed=7, scale=1e30)
    logits[:, ::3] = -np.inf
    return logits


@pytest.mark.parametrize("make", [equal, whole_numbers, nearly_flat, far_apart], ids=lambda make: make.__name__)
@pytest.mark.parametrize("vocab", [5, 4097])
def test_ties_and_extremes(device: EmulatedDevice, make: Callable[[int, int], np.ndarray], vocab: int) -> None:
    fields: list[dict[str, object]] = [
        *({"top_k": k} for k in (1, 3, 2000)),
        *({"top_p": p} for p in (0.1, 0.5, 0.9)),
        *({"top_k": k, "top_p": 0.5} for k in (4, 1500)),
        {"min_p": 0.7},
        {"temperature": 0, "logit_bias": {1: 0.0}},
        {},
    ]
    rows = Rows(device, vocab, [SamplingParams(seed=11, **f) for f in fields])
    for _ in range(3):
        rows.check(make(len(fields), vocab))


def test_order_of_threads_does_not_matter(device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows(device, 257, [SamplingParams(top_k=1, logprobs=1)])
    rows.sample(random_logits(1, 257, seed=0))  # compiles
    kernel = device._kernels["sample_rows"]
    monkeypatch.setitem(device._kernels, "sample_rows", functools.partial(kernel, order="descending"))
    params = many_params(1000)
    rows = Rows(device, 1000, params)
    for step in range(2):
        rows.check(random_logits(len(params), 1000, seed=step))
    Rows(device, 4097, params[-6:]).check(nearly_flat(6, 4097))


def test_a_request_samples_the_same_alone_and_in_a_batch(device: EmulatedDevice) -> None:
    params = [SamplingParams(seed=seed, top_p=0.9) for seed in range(5)]
    logits = random_logits(5, 257, seed=2)
    together = Rows(device, 257, params).check(logits)
    assert Rows(device, 257, params[3:4]).check(logits[3:4]) == together[3:4]


@pytest.mark.parametrize("vocab", [5, 1000, 20_001])
def test_greedy_rows_need_only_the_argmax(device: EmulatedDevice, vocab: int) -> None:
    rows = Rows(device, vocab, [SamplingParams(temperature=0)] * 3)
    device.launched.clear()
    for seed in range(2):
        logits = random_logits(3, vocab, seed)
        logits[0, [2, vocab - 1]] = 99
        assert rows.check(logits)[0] == 2
    assert device.launched == ["argmax_rows_by_parts"] * 2


def test_masks(device: EmulatedDevice) -> None:
    vocab = 257
    allowed = np.random.default_rng(4).random((5, vocab)) < 0.1
    bits = np.pad(allowed, ((0, 0), (0, -vocab % 32))).reshape(5, -1, 32)
    words = np.packbits(bits, axis=2, bitorder="little").view(np.uint32)[:, :, 0]  # (rows, ceil(vocab / 32))
    fields: list[dict[str, object]] = [{}, {"temperature": 0}, {"top_k": 5}, {"top_p": 0.5}, {"logit_bias": {3: 9.0}}]
    rows = Rows(device, vocab, [SamplingParams(seed=5, **f) for f in fields])
    logits = random_logits(5, vocab, seed=8)
    sampled = rows.sample(logits, {row: words[row] for row in (0, 1, 2, 4)})
    np.testing.assert_array_equal(sampled.maxima, logits.max(1))
    allowed[3] = True
    masked = np.where(allowed, logits, np.float32(-np.inf))
    assert sampled.tokens == [s.sample(row, int(row.argmax())) for s, row in zip(rows.on_host, masked, strict=True)]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_is_reported(device: EmulatedDevice, bad: float) -> None:
    params = [SamplingParams(temperature=t, top_p=0.9, logprobs=2, seed=0) for t in (0, 1, 0, 1)]
    logits = random_logits(4, 257, seed=9)
    logits[:2, 200] = bad
    rows = Rows(device, 257, params)
    sampled = rows.sample(logits)
    assert not np.isfinite(sampled.maxima[:2]).any()
    assert sampled.logprobs[:2] == [None, None]
    assert sampled.tokens[2:] == [rows.on_host[i].sample(logits[i], int(logits[i].argmax())) for i in (2, 3)]


def test_greedy_rows_report_what_is_not_finite(device: EmulatedDevice) -> None:
    logits = random_logits(2, 257, seed=9)
    logits[1, 3] = np.nan
    sampled = Rows(device, 257, [SamplingParams(temperature=0)] * 2).sample(logits)
    assert np.isfinite(sampled.maxima).tolist() == [True, False]


@pytest.mark.parametrize("vocab", [5, 1000, 4097])
def test_logprobs(device: EmulatedDevice, vocab: int) -> None:
    bias = {1: 50.0}  # the raw logits count
    wanted = [None, 0, 1, 5, 32, 33, -1]  # the last two are sampled on the host
    params = [SamplingParams(logprobs=n, logit_bias=bias, top_k=9, seed=1) for n in wanted]
    rows = Rows(device, vocab, params)
    for logits in (random_logits(len(params), vocab, seed=10), whole_numbers(len(params), vocab)):
        sampled = rows.sample(logits)
        for row, sampler, token, found in zip(logits, rows.on_host, sampled.tokens, sampled.logprobs, strict=True):
            best = int(row.argmax())
            assert token == sampler.sample(row, best)
            if sampler.params.logprobs is None:
                assert found is None
                continue
            expected = sampler.logprobs(row, best, token)
            assert found is not None
            assert list(found) == list(expected)
            np.testing.assert_allclose(list(found.values()), list(expected.values()), atol=1e-4)


def test_distribution(device: EmulatedDevice) -> None:
    """Chi-square: below 18.47 with probability 0.999 for 4 degrees of freedom."""
    count, logits = 2000, np.array([0.5, -0.3, 1.2, 0.0, -1.0], np.float32)
    rows = Rows(device, 5, [SamplingParams(seed=seed) for seed in range(count)])
    tokens = rows.sample(np.tile(logits, (count, 1))).tokens
    expected = count * np.exp(logits) / np.exp(logits).sum()
    observed = np.bincount(tokens, minlength=5)
    assert ((observed - expected) ** 2 / expected).sum() < 18.47


def test_no_memory_is_taken_in_the_steady_state(device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    params = [SamplingParams(repetition_penalty=1.1, logit_bias=dict.fromkeys(range(300), 1.0), seed=0)] * 2
    rows = Rows(device, 1000, params)
    rows.check(random_logits(2, 1000, seed=0))
    monkeypatch.setattr(device, "allocate", None)
    monkeypatch.setattr(device, "pinned", None)
    for step in range(3):
        rows.check(random_logits(2, 1000, seed=step))

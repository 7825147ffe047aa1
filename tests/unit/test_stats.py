"""What an engine measures decides whether pages are saved, so it must be right while iterations overlap too."""

import time

import pytest

from mlcgen.runtime.stats import EngineStats, Rates

from .tiny_engine import NumpyExecutor, greedy, make_engine, prompt_of, run


def test_rates_are_of_the_last_measurements() -> None:
    rates = Rates()
    for _ in range(60):
        rates.computed(100, 1.0)
        rates.moved(2, 0.2)
    assert rates.token_seconds == pytest.approx(0.01, rel=0.01)
    assert rates.page_seconds == pytest.approx(0.1, rel=0.01)
    for _ in range(60):
        rates.computed(1, 1.0)  # of few tokens each, as chunks beside many decodes: they say less
    assert 0.01 < rates.token_seconds < 1.01


def test_an_engine_measures_prompts_and_decoding_apart() -> None:
    executor = NumpyExecutor()
    executor.before_step = lambda: time.sleep(0.02)
    engine = make_engine(executor=executor)
    run(engine, [(prompt_of(40, seed), greedy(3)) for seed in range(3)])
    assert 0.02 / 64 < engine._mover.rates.token_seconds < 2e-3
    assert engine.stats().num_steps == executor.num_steps


def test_shares_of_nothing() -> None:
    assert (EngineStats().hit_rate, EngineStats().acceptance) == (0, 0)

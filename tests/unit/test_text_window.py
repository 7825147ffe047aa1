"""Texts that outgrow their window, which keeps their last tokens, or heavy hitters: every token is checked."""

from typing import Any

import numpy as np
import pytest

from mlcgen.errors import RequestError
from mlcgen.runtime.heavy_hitters import KeyLayout
from mlcgen.runtime.options import EngineOptions
from mlcgen.runtime.page_mover import PageMover
from mlcgen.runtime.sampler import SamplingParams

from .tiny_engine import (
    HEAD_DIM,
    HEADS,
    REPETITIVE,
    NumpyExecutor,
    drafting_engine,
    greedy,
    make_engine,
    prompt_of,
    run,
    run_alone,
)


@pytest.mark.usefixtures("cheap_guesses")
@pytest.mark.parametrize("speculation", ["off", "ngram", "model"])
@pytest.mark.parametrize(("window", "sinks"), [(24, 4), (9, 0), (50, 3)])
def test_a_text_without_end(speculation: str, window: int, sinks: int) -> None:
    """Each token is what the model says to what is left of the text."""
    requests = [(prompt_of(5), greedy(70)), (prompt_of(40, seed=1), greedy(70)), (prompt_of(9, seed=2), greedy(250))]
    options = {"speculation": speculation, "branches": 1, "window": window, "sinks": sinks}
    engine = drafting_engine(options, page_size=4, num_pages=40)
    outputs = run(engine, requests)
    for output, (prompt, params) in zip(outputs[:2], requests[:2], strict=True):
        assert output.token_ids == walked(prompt, params.max_tokens or 0, window, sinks)
    assert len(outputs[2].token_ids) == 250  # more than the context


KEYS = KeyLayout(HEADS, 4, HEAD_DIM, "float64", (0.0,) * (HEAD_DIM // 2))  # this model's know where they were


@pytest.mark.usefixtures("cheap_guesses")
@pytest.mark.parametrize("speculation", ["off", "ngram", "model"])
@pytest.mark.parametrize("num_pages", [60, 13])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_heavy_hitters_of_a_text_without_end(
    speculation: str, num_pages: int, prefix_cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token is what the model says to the keys and values that are left, also of those that were preempted."""
    # Those that are computed anew see what is left of the text alone.
    monkeypatch.setattr(PageMover, "prefers_saving", lambda mover, sequence: True)
    requests = [(prompt_of(5), greedy(70)), (prompt_of(40, seed=1), greedy(70)), (prompt_of(40, seed=1), greedy(250))]
    given = {"window_keeps": "heavy", "window": 30, "sinks": 3, "prefix_cache": prefix_cache}
    engine = drafting_engine(
        {"speculation": speculation, "branches": 1, **given}, page_size=4, num_pages=num_pages, keys=KEYS
    )
    outputs = run(engine, requests)
    assert (engine.stats().num_preemptions > 0) == (num_pages == 13)
    for output, (prompt, params) in zip(outputs, requests, strict=True):
        assert output.token_ids == walked_heavily(prompt, params.max_tokens or 0, window=30, sinks=3)


@pytest.mark.usefixtures("cheap_guesses")
@pytest.mark.parametrize("speculation", ["off", "ngram", "lookahead", "model"])
@pytest.mark.parametrize(("window", "sinks"), [(2, 0), (8, 3), (9, 0), (13, 2)])
def test_heavy_hitters_of_small_windows(speculation: str, window: int, sinks: int) -> None:
    """Trees leave tokens that are right and not in their places: perhaps more than such a window has room for."""
    options = {"speculation": speculation, "branches": 3, "window_keeps": "heavy", "window": window, "sinks": sinks}
    engine = drafting_engine(options, page_size=4, num_pages=40, keys=KEYS)
    outputs = run(engine, [(prompt_of(5), greedy(70)), (REPETITIVE, greedy(70)), (prompt_of(1), greedy(250))])
    assert [len(output.token_ids) for output in outputs] == [70, 70, 250]


def walked_heavily(prompt: list[int], count: int, window: int, sinks: int) -> list[int]:
    model, cache, said = NumpyExecutor(), np.empty((2, HEADS, 0, HEAD_DIM)), []
    waiting = list(prompt)
    while len(said) < count:
        if said and cache.shape[2] + 1 >= window:
            cache = kept_of(cache, window // 2 - 1, sinks)
        for token in waiting:
            x = model.embedding[token] + model.position[cache.shape[2]]
            q, k, v = np.einsum("d,adhe->ahe", x, model.qkv)
            cache = np.concatenate([cache, np.stack([k, v])[:, :, None]], 2)
            scores = np.einsum("he,hte->ht", q, cache[0])
            weights = np.exp(scores - scores.max(1, keepdims=True))
            out = np.einsum("ht,hte->he", weights / weights.sum(1, keepdims=True), cache[1])
        waiting = [int(((x + 3 * out.reshape(-1)) @ model.head).argmax())]
        said += waiting
    return said


def kept_of(cache: np.ndarray, kept: int, sinks: int) -> np.ndarray:
    last = cache.shape[2] - kept // 2
    norms = np.linalg.norm(cache[0], axis=-1).sum(0)
    lightest = sorted(range(sinks, last), key=norms.__getitem__)[: kept - kept // 2 - sinks]
    return cache[:, :, [*range(sinks), *sorted(lightest), *range(last, cache.shape[2])]]


def test_heavy_hitters_where_the_device_fails() -> None:
    class Failing(NumpyExecutor):
        fails = True

        def write_pages(self, *arguments: Any) -> None:
            if self.fails:
                raise RuntimeError("no such address")
            super().write_pages(*arguments)

    options = EngineOptions(window=30, window_keeps="heavy")
    engine = make_engine(executor=(executor := Failing()), options=options, keys=KEYS)
    short = (prompt_of(9), greedy(10))
    outputs = [engine.add_request("long", prompt_of(20), greedy(40)), engine.add_request("short", *short)]
    while engine.has_unfinished:
        engine.step()
    assert str(outputs[0].error) == "the device failed in the step that had this request: no such address"
    assert outputs[1].token_ids == run_alone([short])[0]
    assert engine.pool.num_free == engine.pool.num_pages
    executor.fails = False
    assert len(run(engine, [(prompt_of(20), greedy(40))])[0].token_ids) == 40


def test_heavy_hitters_without_room_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples share all but their last tokens, and there are no more pages: the last half of the window is left."""
    options = EngineOptions(window=48, window_keeps="heavy")
    engine = make_engine(options=options, keys=KEYS, num_pages=16)
    params = SamplingParams(n=4, max_tokens=60, temperature=0.9, ignore_eos=True)
    output = engine.add_request("samples", prompt_of(44), params, stream=False)
    replaced = []
    replace_pages = engine.scheduler.replace_pages
    monkeypatch.setattr(
        engine.scheduler, "replace_pages", lambda *given: replaced.append(replace_pages(*given)) or replaced[-1]
    )
    while engine.has_unfinished:
        engine.step()
    assert [len(each.token_ids) for each in output.outputs] == [60] * 4
    assert None in replaced
    assert engine.pool.num_free == engine.pool.num_pages


def test_heavy_hitters_of_a_model_with_a_window() -> None:
    with pytest.raises(RequestError, match="window_keeps='heavy' is not for this model"):
        make_engine(options=EngineOptions(window=30, window_keeps="heavy"), window=20, keys=KEYS)


def walked(prompt: list[int], count: int, window: int, sinks: int) -> list[int]:
    seen, said = list(prompt), []
    while len(said) < count:
        if len(seen) >= window:
            seen = seen[:sinks] + seen[-(window // 2 - sinks) :]
        tokens = run_alone([(seen, greedy(min(window - len(seen), count - len(said))))])[0]
        seen += tokens
        said += tokens
    return said

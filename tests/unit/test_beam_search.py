"""Beams against a search that computes every prefix anew; pages and places are given back whatever happens."""

import math
from functools import cache

import pytest

from mlcgen.errors import RequestError
from mlcgen.runtime.options import EngineOptions
from mlcgen.runtime.outputs import RequestOutput
from mlcgen.runtime.sampler import SamplingParams

from .tiny_engine import greedy, make_engine, prompt_of, run, run_alone

PROMPTS = [prompt_of(9), prompt_of(4, seed=1), prompt_of(17, seed=2)]


@cache
def logprobs_after(tokens: tuple[int, ...]) -> dict[int, float]:
    output = run(make_engine(), [(list(tokens), greedy(1, logprobs=-1))])[0]
    assert output.outputs[0].logprobs is not None
    return output.outputs[0].logprobs[0]


def searched(prompt: list[int], params: SamplingParams) -> list[tuple[list[int], float]]:
    """(tokens, sum of log-probabilities), the best first."""

    def score(each: tuple[list[int], float]) -> float:
        return each[1] / len(each[0]) ** params.length_penalty

    live: list[tuple[list[int], float]] = [([], 0.0)]
    ended: list[tuple[list[int], float]] = []
    for _ in range(params.max_tokens or 0):
        ways = [
            ([*tokens, token], total + logprob)
            for tokens, total in live
            for token, logprob in logprobs_after((*prompt, *tokens)).items()
        ]
        ways.sort(key=lambda each: -each[1])
        ways = ways[: 2 * params.beam_width]
        ended += [way for way in ways if way[0][-1] in (params.stop_token_ids or ())]
        live = [way for way in ways if way[0][-1] not in (params.stop_token_ids or ())][: params.beam_width]
        best = sorted(ended, key=score)[-params.beam_width :]
        if len(best) == params.beam_width and max(map(score, live)) <= score(best[0]):
            break
    return sorted(ended + live, key=score, reverse=True)[: params.n]


def beams(max_tokens: int = 7, **params: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, **{"ignore_eos": True, "beam_width": 3, **params})  # type: ignore[arg-type]


def run_beams(requests: list[tuple[list[int], SamplingParams]], **engine: object) -> list[RequestOutput]:
    made = make_engine(**engine)  # type: ignore[arg-type]
    outputs = [made.add_request(str(i), prompt, params, stream=False) for i, (prompt, params) in enumerate(requests)]
    for _ in range(3000):
        if not made.has_unfinished:
            break
        made.step()
    assert all(output.finished for output in outputs), "nothing moves any more"
    assert made.pool.num_free == made.pool.num_pages
    assert not [*made.scheduler.running, *made.scheduler.waiting, *made.scheduler.paused]
    return outputs


def check(output: RequestOutput, prompt: list[int], params: SamplingParams) -> None:
    assert output.error is None
    expected = searched(prompt, params)
    assert [each.token_ids for each in output.outputs] == [tokens for tokens, _ in expected]
    assert [each.cumulative_logprob for each in output.outputs] == pytest.approx([total for _, total in expected])


@pytest.mark.parametrize("params", [beams(n=3), beams(beam_width=4, n=2), beams(beam_width=1), beams(12)])
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_beams_equal_a_search_of_whole_prefixes(params: SamplingParams, page_size: int) -> None:
    requests = [(prompt, params) for prompt in PROMPTS]
    outputs = run_beams(requests, page_size=page_size, num_pages=500, max_batch=16)
    for output, prompt in zip(outputs, PROMPTS, strict=True):
        check(output, prompt, params)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_texts_that_end(length_penalty: float) -> None:
    """Tokens that beams would go on with end them."""
    free = run_beams([(PROMPTS[0], beams(n=3))])[0]
    stops = [free.outputs[0].token_ids[3], free.outputs[1].token_ids[1]]
    params = beams(n=3, stop_token_ids=stops, length_penalty=length_penalty)
    output = run_beams([(PROMPTS[0], params)])[0]
    check(output, PROMPTS[0], params)
    for each in output.outputs:
        assert each.finish_reason == ("stop" if each.token_ids[-1] in stops else "length")
        assert each.stop_reason in (None, *stops)


def test_one_beam_with_no_way_to_go_on() -> None:
    """Both of the tokens that it looks at end it."""
    likeliest = list(logprobs_after(tuple(PROMPTS[0])))[:2]
    output = run_beams([(PROMPTS[0], beams(beam_width=1, stop_token_ids=likeliest))])[0]
    assert (output.token_ids, output.finish_reason) == (likeliest[:1], "stop")


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize(("max_batch", "num_pages"), [(1, 7), (2, 9), (3, 8), (5, 60)])
def test_more_beams_than_places_or_pages(max_batch: int, num_pages: int, prefix_cache: bool) -> None:
    """They take turns, beside requests that sample."""
    requests = [(PROMPTS[0], beams(5, n=3)), (PROMPTS[1], beams(5, beam_width=4)), (prompt_of(6), greedy(9))]
    options = EngineOptions(prefix_cache=prefix_cache)
    outputs = run_beams(requests, max_batch=max_batch, num_pages=num_pages, options=options)
    check(outputs[0], *requests[0])
    check(outputs[1], *requests[1])
    assert outputs[2].token_ids == run_alone([requests[2]])[0]


def test_nothing_is_guessed_for_beams() -> None:
    repetitive = [5, 6, 7, 8] * 6
    options = EngineOptions(speculation="ngram", branches=2)
    outputs = run_beams([(repetitive, beams(9)), (repetitive, greedy(20))], options=options)
    check(outputs[0], repetitive, beams(9))
    assert outputs[0].metrics.num_drafted == 0


def test_one_beam_is_greedy() -> None:
    assert run_beams([(PROMPTS[0], beams(20, beam_width=1))])[0].token_ids == run_alone([(PROMPTS[0], greedy(20))])[0]


def test_beams_share_pages() -> None:
    engine = make_engine(num_pages=400, page_size=4, max_batch=8)
    engine.add_request("a", prompt_of(100), beams(8, beam_width=8), stream=False)
    held = 0
    while engine.has_unfinished:
        engine.step()
        held = max(held, engine.pool.num_pages - engine.pool.num_free)
    assert held < 25 + 8 * 3  # not eight times 25


@pytest.mark.parametrize("after", range(6))
def test_abort(after: int) -> None:
    engine = make_engine(num_pages=60)
    output = engine.add_request("a", PROMPTS[0], beams(n=2), stream=False)
    for _ in range(after):
        engine.step()
    engine.abort("a")
    engine.step()
    assert [each.finish_reason for each in output.outputs] == ["abort"] * 2
    assert {len(each.token_ids) for each in output.outputs} == ({0} if after == 0 else {after})
    assert engine.pool.num_free == engine.pool.num_pages
    assert not engine.has_unfinished


def test_beams_that_outgrow_the_pool() -> None:
    output = run_beams([(PROMPTS[0], beams(60))], num_pages=5, page_size=4)[0]
    assert output.finish_reason == "error"
    assert "the KV cache holds 20" in str(output.error)
    assert len(output.token_ids) > 0


def test_a_failure_of_the_device_ends_all_beams() -> None:
    engine = make_engine()
    output = engine.add_request("a", PROMPTS[0], beams(n=3), stream=False)
    engine.step()
    engine.step()
    engine.executor.fail_next = True  # type: ignore[attr-defined]
    engine.step()
    assert [each.finish_reason for each in output.outputs] == ["error"] * 3
    assert engine.pool.num_free == engine.pool.num_pages


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (beams(n=4), "n=4 texts of beam_width=3 beams"),
        (beams(stop="x"), "stop='x' is nothing that beam search knows"),
        (beams(presence_penalty=1.0), "presence_penalty=1.0 is nothing that"),
    ],
)
def test_what_beam_search_refuses(params: SamplingParams, message: str) -> None:
    assert message in str(make_engine().add_request("a", PROMPTS[0], params, stream=False).error)


def test_beams_are_not_streamed() -> None:
    assert "beam_width=3 beams cannot be streamed" in str(make_engine().add_request("a", PROMPTS[0], beams()).error)
    with pytest.raises(RequestError, match="beam_width=65 is not valid"):
        beams(beam_width=65)
    assert math.isfinite(beams().length_penalty)

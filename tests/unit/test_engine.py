"""The engine on a real, tiny model that attends through its pages: whatever the schedule, the tokens are the same."""

import asyncio
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlcgen.errors import DeviceError, MlcgenError, RequestError
from mlcgen.runtime import llm as llm_module
from mlcgen.runtime.engine import Engine
from mlcgen.runtime.executor import Float32, StepInput
from mlcgen.runtime.llm import LLM, AsyncEngine
from mlcgen.runtime.options import EngineOptions
from mlcgen.runtime.outputs import Delta
from mlcgen.runtime.sampler import SamplingParams
from mlcgen.runtime.tokenizer import Tokenizer

from .tiny_engine import CONTEXT, VOCAB, NumpyExecutor, greedy, make_engine, prompt_of, run, run_alone

MIXED = [(prompt_of(length), greedy(wanted)) for length, wanted in ((3, 20), (17, 4), (1, 9), (40, 12), (8, 30))]


def test_the_model_depends_on_every_token_it_attends_to() -> None:
    """Else the tests below would prove nothing."""
    base = prompt_of(30)
    tokens = run_alone([(base, greedy(20))])[0]
    assert len(set(tokens)) > 5
    for i in (0, 10, 25):
        changed = [*base[:i], (base[i] + 1) % VOCAB, *base[i + 1 :]]
        assert run_alone([(changed, greedy(20))])[0] != tokens


@pytest.mark.parametrize("page_size", [1, 3, 16, 256])
def test_batched_equals_alone(page_size: int) -> None:
    outputs = run(make_engine(page_size=page_size, num_pages=400 // page_size + 5), MIXED)
    assert [output.token_ids for output in outputs] == run_alone(MIXED)
    assert {output.finish_reason for output in outputs} == {"length"}


@pytest.mark.parametrize("budget", [1, 3, 7])
def test_chunked_equals_unchunked(budget: int) -> None:
    outputs = run(make_engine(max_tokens_per_step=budget), MIXED)
    assert [output.token_ids for output in outputs] == run_alone(MIXED)


@pytest.mark.parametrize(("page_size", "num_pages"), [(4, 14), (1, 54), (7, 8)])
def test_preempted_equals_undisturbed(page_size: int, num_pages: int) -> None:
    outputs = run(make_engine(page_size=page_size, num_pages=num_pages), MIXED)
    assert [output.token_ids for output in outputs] == run_alone(MIXED)
    assert sum(output.metrics.num_preemptions for output in outputs) > 0


def test_a_small_batch_makes_the_others_wait_their_turn() -> None:
    outputs = run(make_engine(max_batch=2), MIXED)
    assert [output.token_ids for output in outputs] == run_alone(MIXED)


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20)), min_size=1, max_size=5),
    page_size=st.integers(1, 40),
    spare=st.integers(0, 4),
    budget=st.integers(1, 40),
    max_batch=st.integers(1, 5),
)
def test_any_schedule_gives_the_same_tokens(
    lengths: list[tuple[int, int]], page_size: int, spare: int, budget: int, max_batch: int
) -> None:
    requests = [(prompt_of(length, i), greedy(wanted)) for i, (length, wanted) in enumerate(lengths)]
    num_pages = max(-(-sum(pair) // page_size) for pair in lengths) + spare
    engine = make_engine(max_batch=max_batch, page_size=page_size, num_pages=num_pages, max_tokens_per_step=budget)
    assert [output.token_ids for output in run(engine, requests)] == run_alone(requests)


def test_a_seed_gives_the_same_tokens_in_any_batch() -> None:
    requests = [
        (prompt, SamplingParams(max_tokens=15, seed=i, temperature=0.9, top_k=40, top_p=0.9, ignore_eos=True))
        for i, (prompt, _) in enumerate(MIXED)
    ]
    expected = run_alone(requests)
    assert [output.token_ids for output in run(make_engine(num_pages=16), requests)] == expected
    mixed = run(make_engine(), [request for pair in zip(MIXED, requests, strict=True) for request in pair])
    assert [output.token_ids for output in mixed[1::2]] == expected


def test_arrivals_while_others_run() -> None:
    engine = make_engine()
    outputs = []
    for i, (prompt, params) in enumerate(MIXED):
        outputs.append(engine.add_request(str(i), prompt, params))
        engine.step()
        engine.step()
    while engine.has_unfinished:
        engine.step()
    assert [output.token_ids for output in outputs] == run_alone(MIXED)


def test_abort_frees_pages_and_leaves_the_others_alone() -> None:
    engine = make_engine()
    outputs = [engine.add_request(str(i), prompt, params) for i, (prompt, params) in enumerate(MIXED)]
    engine.step()
    engine.step()
    assert engine.abort("3")
    assert not engine.abort("3")
    assert not engine.abort("unknown")
    assert outputs[3] in engine.step()
    assert outputs[3].finish_reason == "abort"
    while engine.has_unfinished:
        engine.step()
    expected = run_alone(MIXED)
    assert [output.token_ids for output in outputs[:3] + outputs[4:]] == expected[:3] + expected[4:]
    assert engine.pool.num_free == engine.pool.num_pages


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "prompt is empty"),
        ([1] * CONTEXT, {}, f"{CONTEXT} tokens, which leaves no room"),
        ([1] * 60, {}, "KV cache holds 40"),
        ([VOCAB], {}, f"token id {VOCAB}; token ids go from 0 to {VOCAB - 1}"),
        ([-1], {}, "token id -1"),
        ([1.5], {}, "neither a text nor a flat list"),
        ([[1]], {}, "neither a text nor a flat list"),
        ([True], {}, "neither a text nor a flat list"),
        ([2**70], {}, "neither a text nor a flat list"),
        (None, {}, "neither a text nor a flat list"),
        ("text", {}, "no tokenizer"),
        ([1], {"stop": "x"}, "needs a tokenizer"),
        ([1], {"logit_bias": {VOCAB: 1.0}}, f"logit_bias names token {VOCAB}"),
        ([1], {"stop_token_ids": [VOCAB]}, f"stop_token_ids names token {VOCAB}"),
    ],
)
def test_a_bad_request_fails_alone(prompt: Any, params: dict[str, Any], message: str) -> None:
    engine = make_engine(num_pages=10)
    good, bad = run(engine, [MIXED[0], (prompt, greedy(**params))])
    assert isinstance(bad.error, RequestError)
    assert message in str(bad.error)
    assert (bad.finish_reason, bad.token_ids) == ("error", [])
    assert good.token_ids == run_alone(MIXED[:1])[0]


def test_a_request_id_in_use_is_refused() -> None:
    engine = make_engine()
    engine.add_request("a", [1])
    with pytest.raises(RequestError, match="'a' is in use"):
        engine.add_request("a", [1])


def test_the_context_ends_a_sequence() -> None:
    output = run(make_engine(), [(prompt_of(CONTEXT - 5), greedy(None))])[0]
    assert output.finish_reason == "length"
    assert len(output.token_ids) == 5
    assert len(run(make_engine(), [(prompt_of(CONTEXT - 1), greedy(50))])[0].token_ids) == 1


def test_a_sequence_that_outgrows_the_pool_fails_with_what_it_has() -> None:
    good, bad = run(make_engine(num_pages=5), [(prompt_of(2), greedy(4)), (prompt_of(3), greedy(100))])
    assert good.finish_reason == "length"
    assert bad.finish_reason == "error"
    assert "grown to 21 tokens but the KV cache holds 20" in str(bad.error)
    assert bad.token_ids == run_alone([(prompt_of(3), greedy(18))])[0]


def test_nan_logits_fail_that_request_alone() -> None:
    executor, expected = NumpyExecutor(), run_alone(MIXED)
    used = {token for (prompt, _), tokens in zip(MIXED, expected, strict=True) for token in prompt + tokens}
    executor.poisoned_token = min(set(range(VOCAB)) - used)
    requests = [*MIXED, ([*prompt_of(6), executor.poisoned_token], greedy())]
    outputs = run(make_engine(executor=executor), requests)
    assert "NaN" in str(outputs[-1].error)
    assert [output.token_ids for output in outputs[:-1]] == expected


@pytest.mark.parametrize("checks", [False, True])
def test_nan_logits_are_traced_where_asked_for(checks: bool) -> None:
    executor = NumpyExecutor()
    executor.poisoned_token = 5
    engine = make_engine(executor=executor, options=EngineOptions(check_numerics=checks))
    output = engine.add_request("a", [1, 2, 5], greedy())
    engine.step()
    assert ("kernel head" in str(output.error)) == checks
    assert executor.num_checked == checks


def test_an_executor_failure_ends_the_requests_of_that_step_alone() -> None:
    engine = make_engine(max_batch=2)
    outputs = [engine.add_request(str(i), prompt, params) for i, (prompt, params) in enumerate(MIXED)]
    engine.step()
    engine.executor.fail_next = True  # type: ignore[attr-defined]
    assert [output.request_id for output in engine.step()] == ["0", "1"]
    for output in outputs[:2]:
        assert output.finish_reason == "error"
        assert isinstance(output.error, DeviceError)
        assert "out of device memory" in str(output.error)
    while engine.has_unfinished:
        engine.step()
    assert [output.token_ids for output in outputs[2:]] == run_alone(MIXED)[2:]
    assert engine.pool.num_free == engine.pool.num_pages


def test_stop_token_ids_and_end_of_sequence() -> None:
    prompt = prompt_of(5)
    tokens = run_alone([(prompt, greedy(20))])[0]
    stop = next(token for i, token in enumerate(tokens) if i > 3 and token not in tokens[:i])
    end = tokens.index(stop) + 1
    by_id = run(make_engine(), [(prompt, greedy(20, stop_token_ids=[stop]))])[0]
    assert (by_id.token_ids, by_id.finish_reason) == (tokens[:end], "stop")
    assert by_id.outputs[0].stop_reason == stop
    engine = Engine(NumpyExecutor(), None, [stop], CONTEXT, 4)
    by_eos, ignoring = run(engine, [(prompt, greedy(20, ignore_eos=False)), (prompt, greedy(20))])
    assert (by_eos.token_ids, by_eos.finish_reason) == (tokens[:end], "stop")
    assert by_eos.outputs[0].stop_reason is None
    assert ignoring.token_ids == tokens


def test_min_tokens_puts_off_the_stop() -> None:
    prompt = prompt_of(5)
    first = run_alone([(prompt, greedy(1))])[0][0]
    output = run(make_engine(), [(prompt, greedy(8, stop_token_ids=[first], min_tokens=4))])[0]
    assert first not in output.token_ids[:4]
    assert len(output.token_ids) >= 4


@pytest.mark.parametrize("stream", [True, False])
def test_text_is_that_of_the_tokens(tokenizer: Tokenizer, stream: bool) -> None:
    engine = make_engine(tokenizer)
    output = engine.add_request("a", "the quick fox", greedy(60), stream=stream)
    seen = [output.text for _ in range(100) if engine.step()]
    assert output.finished
    assert output.text == tokenizer.decode(output.token_ids)
    assert all(output.text.startswith(text) for text in seen)
    assert len(seen) == (60 if stream else 1)
    assert output.prompt_token_ids == tokenizer.encode("the quick fox")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("include", [True, False])
def test_stop_strings_cut_the_text(tokenizer: Tokenizer, stream: bool, include: bool) -> None:
    full = run(make_engine(tokenizer), [("the quick fox", greedy(60))])[0].text  # type: ignore[list-item]
    stop = full[20:25]  # spans tokens: most of this model's tokens are single characters
    engine = make_engine(tokenizer)
    params = greedy(60, stop=["never there", stop], include_stop_str_in_output=include)
    output = engine.add_request("a", "the quick fox", params, stream=stream)
    while engine.has_unfinished:
        engine.step()
        assert include or stop[:3] not in output.text[full.index(stop) :]
    assert output.text == full[: full.index(stop)] + (stop if include else "")
    assert (output.finish_reason, output.outputs[0].stop_reason) == ("stop", stop)


def test_logprobs_come_per_token() -> None:
    output = run(make_engine(), [(prompt_of(4), greedy(6, logprobs=3))])[0]
    logprobs = output.outputs[0].logprobs
    assert logprobs is not None
    assert [next(iter(best)) for best in logprobs] == output.token_ids
    assert {len(best) for best in logprobs} == {3}
    total = output.outputs[0].cumulative_logprob
    assert total is not None
    assert total < 0


def test_metrics_are_in_order() -> None:
    metrics = run(make_engine(), [(prompt_of(4), greedy(6))])[0].metrics
    assert metrics.scheduled is not None
    assert metrics.first_token is not None
    assert metrics.finished is not None
    assert metrics.arrival <= metrics.scheduled <= metrics.first_token <= metrics.finished
    assert metrics.ttft_ms is not None
    assert metrics.prefill_tokens_per_s is not None
    assert metrics.decode_tokens_per_s is not None
    assert run(make_engine(), [(prompt_of(4), greedy(1))])[0].metrics.decode_tokens_per_s is None


def test_greedy_requests_copy_no_logits() -> None:
    class Wide(NumpyExecutor):
        vocab_size = 4_000_000
        logits = np.zeros((1, vocab_size), np.float32)

        def step(self, batch: StepInput) -> Float32:
            return self.logits

    engine = make_engine(executor=Wide())
    engine.add_request("a", [1], greedy(100))
    engine.step()
    tracemalloc.start()
    for _ in range(5):
        engine.step()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


# The public classes, with the loader replaced by one that gives the tiny model.


@pytest.fixture
def loaded(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Engine]]:
    engines: list[Engine] = []

    def load(path: Path, target: str, num_pages: int | None, max_batch: int | None, *options: object) -> Engine:
        if path == Path("broken"):
            raise MlcgenError("no such artifact")
        engines.append(make_engine(tokenizer, num_pages=num_pages or 64, max_batch=max_batch or 8))
        return engines[-1]

    monkeypatch.setattr(llm_module, "load_engine", load)
    yield engines
    for engine in engines:
        assert engine.pool.num_free == engine.pool.num_pages


TEXTS = ["the quick", "brown fox jumps over", "dog"]


def test_generate_keeps_the_order(loaded: list[Engine], tokenizer: Tokenizer) -> None:
    llm = LLM("anywhere", max_batch=2)
    outputs = llm.generate(TEXTS, [greedy(20), greedy(3), greedy(7)])
    assert [output.prompt for output in outputs] == TEXTS
    assert [len(output.token_ids) for output in outputs] == [20, 3, 7]
    ids = [tokenizer.encode(text) for text in TEXTS]
    assert [o.token_ids for o in llm.generate(ids, greedy(20))] == [
        o.token_ids for o in llm.generate(TEXTS, greedy(20))
    ]
    assert llm.generate(ids[0], greedy(20))[0].text == llm.generate(TEXTS[0], greedy(20))[0].text == outputs[0].text
    assert llm.generate([]) == []


def test_generate_reports_a_bad_prompt_in_place(loaded: list[Engine]) -> None:
    good, bad = LLM("anywhere").generate(["fine", ""], greedy(4))
    assert good.error is None
    assert isinstance(bad.error, RequestError)
    assert bad.finish_reason == "error"


def test_generate_wants_as_many_params_as_prompts(loaded: list[Engine]) -> None:
    with pytest.raises(RequestError, match="2 SamplingParams for 3 prompts"):
        LLM("anywhere").generate(TEXTS, [greedy(), greedy()])


def test_generate_cleans_up_after_a_device_failure(loaded: list[Engine]) -> None:
    llm = LLM("anywhere")
    llm.engine.executor.fail_next = True  # type: ignore[attr-defined]
    assert [output.finish_reason for output in llm.generate(TEXTS, greedy(4))] == ["error"] * 3
    assert [len(output.token_ids) for output in llm.generate(TEXTS, greedy(4))] == [4, 4, 4]


def test_stream_adds_up_to_generate(loaded: list[Engine]) -> None:
    llm = LLM("anywhere")
    whole = llm.generate(TEXTS[0], greedy(30))[0]
    deltas = list(llm.stream(TEXTS[0], greedy(30)))
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [token for delta in deltas for token in delta.token_ids] == whole.token_ids
    assert [delta.finish_reason for delta in deltas] == [None] * 29 + ["length"]
    assert deltas[-1].output is not None


def test_streams_interleave_and_leaving_one_aborts_it(loaded: list[Engine]) -> None:
    llm = LLM("anywhere")
    first, second = llm.stream(TEXTS[0], greedy(30)), llm.stream(TEXTS[1], greedy(30))
    next(first)
    text = next(second).text
    first.close()  # type: ignore[attr-defined]
    text += "".join(delta.text for delta in second)
    assert text == llm.generate(TEXTS[1], greedy(30))[0].text


def test_stream_raises_the_requests_error(loaded: list[Engine]) -> None:
    with pytest.raises(RequestError, match="prompt is empty"):
        list(LLM("anywhere").stream(""))


def test_chat_renders_the_template(loaded: list[Engine], tokenizer: Tokenizer) -> None:
    llm = LLM("anywhere")
    output = llm.chat([{"role": "user", "content": "the dog"}], greedy(4))[0]
    assert output.prompt_token_ids == tokenizer.encode("the dog")
    assert len(llm.chat([[{"role": "user", "content": text}] for text in TEXTS], greedy(4))) == 3


async def collect(deltas: Any) -> list[Delta]:
    return [delta async for delta in deltas]


def test_async_streams_run_together_in_one_thread(loaded: list[Engine]) -> None:
    expected = LLM("anywhere").generate(TEXTS * 3, greedy(20))

    async def main(engine: AsyncEngine) -> list[list[Delta]]:
        return await asyncio.gather(*(collect(engine.stream(text, greedy(20))) for text in TEXTS * 3))

    with AsyncEngine("anywhere") as engine:
        streams = asyncio.run(main(engine))
    assert ["".join(delta.text for delta in deltas) for deltas in streams] == [output.text for output in expected]
    executor: Any = loaded[-1].executor
    assert executor.threads != {threading.get_ident()}
    assert len(executor.threads) == 1
    assert executor.num_steps < 9 * 20  # batched


def test_async_generate(loaded: list[Engine]) -> None:
    async def main() -> None:
        async with AsyncEngine("anywhere") as engine:
            output = await engine.generate(TEXTS[0], greedy(20))
            assert output.text == LLM("anywhere").generate(TEXTS[0], greedy(20))[0].text
            with pytest.raises(RequestError, match="prompt is empty"):
                await engine.generate("")

    asyncio.run(main())


def test_async_deadline(loaded: list[Engine]) -> None:
    async def main() -> None:
        async with AsyncEngine("artifact") as engine:
            late = await engine.generate(prompt_of(5), greedy(190), deadline=0.0, priority=1)
            assert late.finish_reason == "timeout"
            streamed = [delta async for delta in engine.stream(prompt_of(5), greedy(190), deadline=0.0)]
            assert streamed[-1].finish_reason == "timeout"

    asyncio.run(main())


def test_cancelling_a_stream_frees_its_pages(loaded: list[Engine]) -> None:
    async def main(engine: AsyncEngine) -> None:
        started = asyncio.Event()

        async def consume() -> None:
            async for _ in engine.stream(TEXTS[0], greedy(None)):
                started.set()

        task = asyncio.create_task(consume())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        output = await engine.generate(TEXTS[1], greedy(5))  # runs after the abort, for commands are in order
        assert len(output.token_ids) == 5
        assert loaded[0].num_unfinished == 0
        assert loaded[0].pool.num_free == loaded[0].pool.num_pages

    with AsyncEngine("anywhere") as engine:
        loaded[0].executor.before_step = lambda: threading.Event().wait(0.002)  # type: ignore[attr-defined]
        asyncio.run(main(engine))


def test_abort_by_id_ends_the_stream(loaded: list[Engine]) -> None:
    async def main(engine: AsyncEngine) -> list[Delta]:
        deltas = []
        async for delta in engine.stream(TEXTS[0], greedy(None), request_id="mine"):
            deltas.append(delta)
            engine.abort("mine")
            engine.abort("not mine")
        return deltas

    with AsyncEngine("anywhere") as engine:
        loaded[0].executor.before_step = lambda: threading.Event().wait(0.002)  # type: ignore[attr-defined]
        deltas = asyncio.run(main(engine))
    assert deltas[-1].finish_reason == "abort"


def test_a_request_id_in_use_fails_the_newcomer(loaded: list[Engine]) -> None:
    async def main(engine: AsyncEngine) -> None:
        first = asyncio.create_task(collect(engine.stream(TEXTS[0], greedy(20), request_id="a")))
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match="'a' is in use"):
            await collect(engine.stream(TEXTS[0], greedy(20), request_id="a"))
        assert (await first)[-1].finish_reason == "length"

    with AsyncEngine("anywhere") as engine:
        loaded[0].executor.before_step = lambda: threading.Event().wait(0.002)  # type: ignore[attr-defined]
        asyncio.run(main(engine))


def test_a_device_failure_reaches_every_stream_and_the_engine_goes_on(loaded: list[Engine]) -> None:
    async def main(engine: AsyncEngine) -> None:
        loaded[0].executor.fail_next = True  # type: ignore[attr-defined]
        with pytest.raises(MlcgenError, match="out of device memory"):
            await collect(engine.stream(TEXTS[0], greedy(5)))
        assert len((await engine.generate(TEXTS[0], greedy(5))).token_ids) == 5

    with AsyncEngine("anywhere") as engine:
        asyncio.run(main(engine))


def test_close_ends_what_runs_and_refuses_what_comes(loaded: list[Engine]) -> None:
    async def main(engine: AsyncEngine) -> list[Delta]:
        stream = engine.stream(TEXTS[0], greedy(None))
        deltas = [await anext(stream)]
        await asyncio.to_thread(engine.close)
        deltas += await collect(stream)
        with pytest.raises(MlcgenError, match="closed"):
            await collect(engine.stream(TEXTS[0]))
        return deltas

    engine = AsyncEngine("anywhere")
    loaded[0].executor.before_step = lambda: threading.Event().wait(0.002)  # type: ignore[attr-defined]
    deltas = asyncio.run(main(engine))
    assert deltas[-1].finish_reason == "abort"
    engine.close()


def test_loading_errors_reach_the_caller(loaded: list[Engine]) -> None:
    with pytest.raises(MlcgenError, match="no such artifact"):
        AsyncEngine(Path("broken"))

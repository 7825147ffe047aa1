"""Structured output through the engine: texts are what was asked for, alone and beside others, drawn or greedy."""

import json
import re
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mlcgen.errors import RequestError
from mlcgen.runtime.engine import Engine
from mlcgen.runtime.grammar import Grammar, GrammarCompiler, StructuredOutput
from mlcgen.runtime.options import EngineOptions
from mlcgen.runtime.outputs import RequestOutput
from mlcgen.runtime.sampler import SamplingParams
from mlcgen.runtime.step_cost import StepCost
from mlcgen.runtime.tokenizer import Tokenizer

from .tiny_engine import VOCAB, NumpyExecutor, make_engine, prompt_of

pytest.importorskip("llguidance", reason="needs llguidance")

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "good": {"type": "boolean"}},
    "required": ["name", "good"],
    "additionalProperties": False,
}
NUMBER = re.compile(r"[0-9]{3}-[0-9]{2}")


def params(seed: int | None = None, **fields: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0 if seed is None else 1.0, seed=seed, max_tokens=180, **fields)


def generate(engine: Engine, *each: SamplingParams) -> list[RequestOutput]:
    outputs = [engine.add_request(str(i), prompt_of(5, i), its, stream=False) for i, its in enumerate(each)]
    while engine.has_unfinished:
        engine.step()
    assert engine.pool.num_free == engine.pool.num_pages
    return outputs


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
@pytest.mark.parametrize("speculation", ["off", "ngram"])
def test_texts_are_what_was_asked_for(tokenizer: Tokenizer, seed: int | None, speculation: Any) -> None:
    engine = make_engine(tokenizer, options=EngineOptions(speculation=speculation))
    structures = [
        StructuredOutput(json_schema=SCHEMA),
        StructuredOutput(regex=NUMBER.pattern),
        StructuredOutput(choice=["dog", "fox"]),
    ]
    free = params(seed)
    batch = [free, *(params(seed, structured=structured) for structured in structures)]
    plain, document, number, choice = generate(engine, *batch)
    held = json.loads(document.text)
    assert list(held) == ["name", "good"]
    assert isinstance(held["good"], bool)
    assert len(held["name"]) <= 5
    assert NUMBER.fullmatch(number.text)
    assert choice.text in ("dog", "fox")
    assert {output.finish_reason for output in (document, number, choice)} == {"stop"}
    assert plain.token_ids == generate(make_engine(tokenizer), free)[0].token_ids
    alone = [generate(make_engine(tokenizer), free, its)[1] for its in batch[1:2]]
    assert [output.error for output in alone] == [None]


def test_forced_tokens_take_no_steps_of_their_own(tokenizer: Tokenizer) -> None:
    executor = NumpyExecutor()
    engine = make_engine(tokenizer, executor=executor)
    text = "the quick brown fox jumps over the lazy dog"
    (output,) = generate(engine, params(structured=StructuredOutput(choice=[text])))
    assert output.text == text
    assert executor.num_steps < 0.5 * len(output.token_ids)
    assert output.metrics.num_accepted == output.metrics.num_drafted > 0


@pytest.mark.parametrize("branches", [1, 3])
@pytest.mark.parametrize("seed", [None, 5])
def test_guesses_keep_to_the_grammar(
    tokenizer: Tokenizer, seed: int | None, branches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StepCost, "of_another", lambda cost, num_tokens: 0.05)
    wanted = params(seed, structured=StructuredOutput(regex="[a-c ]{90}"))
    (plain,) = generate(make_engine(tokenizer), wanted)
    (guessed,) = generate(make_engine(tokenizer, options=EngineOptions(speculation="ngram", branches=branches)), wanted)
    assert re.fullmatch("[a-c ]{90}", guessed.text)
    assert guessed.token_ids == plain.token_ids
    assert guessed.metrics.num_drafted > 0


def test_samples_have_a_grammar_each(tokenizer: Tokenizer) -> None:
    (output,) = generate(make_engine(tokenizer), params(3, n=4, structured=StructuredOutput(regex=NUMBER.pattern)))
    texts = [each.text for each in output.outputs]
    assert all(NUMBER.fullmatch(text) for text in texts)
    assert len(set(texts)) > 1


def test_min_tokens_do_not_go_beyond_the_grammar(tokenizer: Tokenizer) -> None:
    (output,) = generate(make_engine(tokenizer), params(min_tokens=60, structured=StructuredOutput(choice=["dog"])))
    assert (output.text, output.finish_reason) == ("dog", "stop")


def test_what_is_not_valid_fails_alone(tokenizer: Tokenizer) -> None:
    bad = params(structured=StructuredOutput(regex="("))
    wrong, right = generate(make_engine(tokenizer), bad, params())
    assert isinstance(wrong.error, RequestError)
    assert "regex cannot be used" in str(wrong.error)
    assert right.error is None
    (none,) = generate(make_engine(), params(structured=StructuredOutput(choice=["a"])))
    assert "structured output needs a tokenizer" in str(none.error)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Grammars are not compiled before it is set."""
    compiles, gate = GrammarCompiler.compile, threading.Event()

    def waits(compiler: GrammarCompiler, structured: StructuredOutput) -> Grammar:
        known = compiler._known(structured.kind, structured.source) is not None
        assert known or gate.wait(60)
        return compiles(compiler, structured)

    monkeypatch.setattr(GrammarCompiler, "compile", waits)
    yield gate
    gate.set()


def test_others_go_on_while_a_grammar_is_compiled(tokenizer: Tokenizer, gate: threading.Event) -> None:
    engine = make_engine(tokenizer)
    structured = engine.add_request("structured", prompt_of(5), params(structured=StructuredOutput(choice=["fox"])))
    plain = engine.add_request("plain", prompt_of(6), params(ignore_eos=True))
    while not plain.finished:
        engine.step()
    assert len(plain.token_ids) == 180
    assert engine.stats().num_waiting == 1
    assert engine.step() == [], "which comes back, though there is nothing to do"
    gate.set()
    while not structured.finished:
        engine.step()
    assert structured.text == "fox"
    assert structured.error is None


def test_what_was_compiled_before_waits_for_no_thread(tokenizer: Tokenizer, gate: threading.Event) -> None:
    engine, known = make_engine(tokenizer), params(structured=StructuredOutput(choice=["dog"]))
    gate.set()
    generate(engine, known)
    gate.clear()
    engine.add_request("slow", prompt_of(5), params(structured=StructuredOutput(choice=["fox"])))
    output = engine.add_request("known", prompt_of(5), known, stream=False)
    for _ in range(20):
        engine.step()
    assert output.text == "dog"
    engine.abort("slow")


def test_ending_requests_whose_grammars_are_compiled(tokenizer: Tokenizer, gate: threading.Event) -> None:
    engine = make_engine(tokenizer)
    choices = ["dog", "fox", "lazy"]
    outputs = [
        engine.add_request(text, prompt_of(5), params(structured=StructuredOutput(choice=[text]), n=2), stream=False)
        for text in choices[:2]
    ]
    late = engine.add_request("lazy", [1], params(structured=StructuredOutput(choice=["lazy"])), deadline=0.0)
    assert engine.abort("dog")
    assert engine.abort("fox")
    assert engine.step() == [*outputs, late]
    assert [output.finish_reason for output in (*outputs, late)] == ["abort", "abort", "timeout"]
    assert not engine.has_unfinished
    assert engine.stats().num_waiting == 0
    assert engine._intake._compiler is not None
    gate.set()
    (again,) = generate(engine, params(structured=StructuredOutput(choice=["fox"])))  # the thread is free again
    assert again.text == "fox"
    held = {source for _, source in engine._intake._compiler._compiled}
    assert json.dumps(["lazy"]) not in held, "nobody waited for it any more when its turn came"


def test_a_grammar_that_breaks_later_fails_alone(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Grammar.mask
    calls = []

    def breaks(grammar: Grammar) -> Any:
        calls.append(grammar)
        if len(calls) > 5:
            raise RequestError("the request's grammar cannot go on: too complex")
        return made(grammar)

    engine = make_engine(tokenizer)
    monkeypatch.setattr(Grammar, "mask", breaks)
    broken, right = generate(engine, params(1, structured=StructuredOutput(json_object=True)), params())
    assert "too complex" in str(broken.error)
    assert right.error is None


def test_a_value_of_another_type_is_refused() -> None:
    with pytest.raises(RequestError, match="must be a StructuredOutput or None"):
        SamplingParams(structured={"json_schema": {}})  # type: ignore[arg-type]


def test_masks_are_applied_to_the_whole_vocabulary(tokenizer: Tokenizer) -> None:
    """The model's vocabulary is larger than the tokenizer's; its best token is one that there is not."""
    executor = NumpyExecutor()
    size = tokenizer._tokenizer.get_vocab_size()
    executor.head[:, size:] = 50 * np.sign(executor.head[:, size:]) if size < VOCAB else executor.head[:, size:]
    (output,) = generate(make_engine(tokenizer, executor=executor), params(structured=StructuredOutput(choice=["fox"])))
    assert output.text == "fox"

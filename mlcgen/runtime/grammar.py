"""Structured output: which tokens may come next, so that the text is what a schema, regex, grammar or list allows.

The parsing is llguidance's, an optional package that is imported when a request first wants structure.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from mlcgen.errors import RequestError
from mlcgen.runtime.grammar_vocabulary import Mask, Vocabulary
from mlcgen.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

__all__ = ["Grammar", "GrammarCompiler", "StructuredOutput"]

MAX_SOURCE = 256 * 1024  # characters of a schema, regex, grammar or list
MAX_COMPILED = 16  # grammars kept for the next request that wants the same
# Between the parts of JSON. llguidance's own has no upper bound, and small models do not always come back from there.
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,64}"
_KINDS = ("json_schema", "json_object", "regex", "grammar", "choice")


@dataclass(frozen=True, kw_only=True)
class StructuredOutput:
    """What the text must be; exactly one of the fields. Raises RequestError that names the field and what is wrong."""

    json_schema: dict[str, Any] | str | None = None
    """JSON that this schema (draft 2020-12; a dict or its text) describes, properties in the schema's order."""
    json_object: bool = False
    """Any JSON object."""
    regex: str | None = None
    """All of the text matches this regular expression (syntax of the Rust crate `regex`; no look-around)."""
    grammar: str | None = None
    """A context-free grammar in llguidance's dialect of Lark; it begins with the rule `start`."""
    choice: list[str] | None = None
    """One of these strings."""

    def __post_init__(self) -> None:
        if not isinstance(self.json_object, bool):
            raise RequestError(f"json_object={self.json_object!r:.80} is not valid; it must be True or False")
        given = [kind for kind in _KINDS if getattr(self, kind) not in (None, False)]
        if len(given) != 1:
            raise RequestError(
                f"structured output needs exactly one of {', '.join(_KINDS)}; given: {', '.join(given) or 'none'}"
            )
        if len(self.source) > MAX_SOURCE:
            raise RequestError(f"{self.kind} has {len(self.source)} characters; shorten it to {MAX_SOURCE} at most")

    @property
    def kind(self) -> str:
        """The field that is given."""
        return next(kind for kind in _KINDS if getattr(self, kind) not in (None, False))

    @property
    def source(self) -> str:
        """Its value as text, of which equal ones mean the same."""
        if self.kind in ("json_schema", "json_object"):
            return _schema_text({"type": "object"} if self.json_object else self.json_schema)
        if self.kind == "choice":
            return _choice_text(self.choice)
        return _checked_text(self.kind, getattr(self, self.kind))


def _schema_text(schema: object) -> str:
    try:
        schema = json.loads(schema) if isinstance(schema, str) else schema
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"json_schema is not JSON: {error}; give it as a dict or as JSON text") from error
    if not isinstance(schema, dict):
        raise RequestError(f"json_schema={text:.80} is not a JSON object; give the schema as a dict or as JSON text")
    return text


def _choice_text(choice: object) -> str:
    is_valid = isinstance(choice, list | tuple) and choice and all(isinstance(each, str) and each for each in choice)
    if not is_valid:
        raise RequestError(f"choice={choice!r:.80} is not valid; it must be a list of non-empty strings")
    assert isinstance(choice, list | tuple)
    return json.dumps([_checked_text("choice", each) for each in choice], ensure_ascii=False)


def _checked_text(kind: str, text: object) -> str:
    if not isinstance(text, str) or not text:
        raise RequestError(f"{kind}={text!r:.80} is not valid; it must be a non-empty string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{kind} is not valid Unicode text ({error}); remove lone surrogates") from error
    return text


class GrammarCompiler:
    """Compiles for one model: its tokenizer, the size of its vocabulary (the tokenizer may have fewer), its EOS ids.

    Safe to call from any thread. The first `compile` takes half a second or more, to read the tokenizer; others a few
    milliseconds, mostly without the GIL, or up to two seconds for the largest that are allowed. So an engine has it
    done by a thread of the compiler's own (`start`).
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        self._tokenizer, self._vocab_size, self._eos_token_ids = tokenizer, vocab_size, frozenset(eos_token_ids)
        self._lock, self._reading = threading.Lock(), threading.Lock()
        self._vocabulary: Vocabulary | None = None
        self._compiled: OrderedDict[tuple[str, str], _Compiled] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, "mlcgen-grammar")

    def start(self, structured: StructuredOutput, count: int) -> "Future[list[Grammar]]":
        """`count` grammars as of `compile`, when they are there: at once where it was compiled before."""
        if self._known(structured.kind, structured.source) is None:
            return self._thread.submit(lambda: [self.compile(structured) for _ in range(count)])
        done: Future[list[Grammar]] = Future()
        done.set_result([self.compile(structured) for _ in range(count)])
        return done

    def compile(self, structured: StructuredOutput) -> "Grammar":
        """A request's grammar at its beginning.

        Raises RequestError with llguidance's message if it is not valid or too complex, or llguidance is missing.
        """
        key = structured.kind, structured.source
        if (known := self._known(*key)) is not None:
            return Grammar(known)
        with self._reading:
            if self._vocabulary is None:
                self._vocabulary = Vocabulary(self._tokenizer, self._vocab_size, self._eos_token_ids)
        compiled = _Compiled(self._vocabulary, *key)
        grammar = Grammar(compiled)
        grammar.mask()  # fails here rather than at the first token
        with self._lock:
            self._compiled[key] = compiled
            self._compiled.move_to_end(key)
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        return grammar

    def _known(self, kind: str, source: str) -> "_Compiled | None":
        with self._lock:
            found = self._compiled.get((kind, source))
        return None if found is None or found.is_spoiled else found


class Grammar:
    """One request's place in its grammar. One thread at a time.

    Every method but `accept` and `rollback` leaves the place as it is. Any may raise RequestError where the grammar
    turns out to be too complex; the request cannot go on then.
    """

    def __init__(self, compiled: "_Compiled") -> None:
        self._compiled = compiled
        self._vocabulary = compiled.vocabulary
        self._matcher = compiled.start()
        self._tokens: list[int] = []
        self._has_ended = False  # whether the last of them is an end of sequence, which the matcher is not told

    def mask(self) -> Mask:
        """The tokens allowed next, (ceil(vocab / 32),), with token t at bit t % 32 of word t // 32; at least one.

        Where only one way to go on is possible, this is the one token with which the tokenizer would write it. The
        model's EOS ids are among them where the text may end here, and alone where it must.
        """
        if self._has_ended:
            return self._vocabulary.eos_mask.copy()
        words = np.frombuffer(self._matcher.compute_bitmask(), "<u4").astype(np.uint32, copy=False)
        self._check()
        mask: Mask = words[: len(self._vocabulary.known)] & self._vocabulary.known
        if not mask.any():
            raise RequestError("the grammar allows no token of this model here; change the grammar")
        return mask

    def accept(self, token: int) -> None:
        """`token` is the next one. Raises RequestError, and changes nothing, if it is not allowed."""
        if not self._accepts(token):
            raise RequestError(f"token {token} is not allowed at this place by the request's grammar")

    def forced(self) -> list[int]:
        """Tokens that come next whatever the model says, perhaps none: all masks up to there allow one token only."""
        if self.is_finished:
            return []
        tokens = self._matcher.compute_ff_tokens()
        self._check()
        return list(takewhile(self._vocabulary.knows, tokens))

    def validate(self, tokens: Sequence[int]) -> int:
        """How many of a draft's first tokens the grammar allows.

        Also ways of writing a text that the tokenizer would not choose count, so it may be more than `mask` allows.
        """
        if self._has_ended or not tokens:
            return 0
        eos = self._vocabulary.eos
        if tokens[0] in eos:
            return int(self._may_end())
        if self.is_finished:
            return 0
        allowed = list(takewhile(lambda token: token not in eos and self._vocabulary.knows(token), tokens))
        count = self._matcher.validate_tokens(allowed)
        self._check()
        if count == len(allowed) < len(tokens) and tokens[count] in eos:
            count += self._may_end_after(allowed)
        return count

    @property
    def can_end(self) -> bool:
        """Whether the text so far is complete."""
        return self._has_ended or self._matcher.is_accepting()

    @property
    def is_finished(self) -> bool:
        """Whether the text is complete and nothing but an EOS may follow: no need to ask the model for that one."""
        return self._has_ended or (self._matcher.is_stopped() and not self._matcher.is_error())

    def rollback(self, count: int) -> None:
        """Take back the last `count` tokens that were accepted."""
        assert 0 <= count <= len(self._tokens), (count, len(self._tokens))
        if not count:
            return
        del self._tokens[len(self._tokens) - count :]
        num_consumed = count - self._has_ended
        self._has_ended = False
        if num_consumed and not self._matcher.rollback(num_consumed):  # as where a rule has max_tokens, or after errors
            self._matcher = self._compiled.start()
            if self._matcher.try_consume_tokens(self._tokens) != len(self._tokens):
                raise RequestError(f"the grammar cannot go back by {count} tokens; leave max_tokens and stop out of it")

    def _accepts(self, token: int) -> bool:
        """Accept the token if it is allowed; says whether it was."""
        if self._has_ended:
            return False
        if token in self._vocabulary.eos:
            self._has_ended = self._may_end()
            is_accepted = self._has_ended
        else:
            is_accepted = self._vocabulary.knows(token) and self._matcher.try_consume_tokens([token]) == 1
            self._check()
        if is_accepted:
            self._tokens.append(token)
        return is_accepted

    def _may_end(self) -> bool:
        """Whether an EOS is allowed: the text is complete, or the grammar itself has that token here."""
        return self.can_end or bool((self.mask() & self._vocabulary.eos_mask).any())

    def _may_end_after(self, tokens: list[int]) -> bool:
        num_accepted = 0
        try:
            for token in tokens:
                num_accepted += self._accepts(token)
            return num_accepted == len(tokens) and self._may_end()
        finally:
            self.rollback(num_accepted)

    def _check(self) -> None:
        """llguidance does not raise; after an error it allows EOS and nothing else."""
        if self._matcher.is_error():
            self._compiled.is_spoiled = True
            raise RequestError(f"the request's grammar cannot go on: {_shortened(self._matcher.get_error())}")


class _Compiled:
    """A grammar that is the beginning of several requests; they share the lexer's states."""

    def __init__(self, vocabulary: Vocabulary, kind: str, source: str) -> None:
        self.vocabulary = vocabulary
        self.is_spoiled = False  # whether the shared lexer may be why a request failed
        library = vocabulary.library
        text = _grammar_text(library, kind, source)
        self._first: LLMatcher = library.LLMatcher(vocabulary.reader, text, log_level=0, limits=vocabulary.limits)
        if self._first.is_error():
            raise RequestError(f"{kind} cannot be used: {_shortened(self._first.get_error())}")

    def start(self) -> "LLMatcher":
        return self._first.deep_copy()


def _grammar_text(library: ModuleType, kind: str, source: str) -> str:
    """What llguidance calls a serialized grammar."""
    if kind == "regex":
        return str(library.LLMatcher.grammar_from_regex(source))
    if kind == "grammar":
        return json.dumps({"grammars": [{"lark_grammar": source}]})
    if kind == "choice":
        return str(library.LLMatcher.grammar_from_regex("|".join(map(_escaped, json.loads(source)))))
    schema = json.loads(source)
    options = schema.get("x-guidance", {})
    if isinstance(options, dict) and not options.keys() & {"whitespace_pattern", "whitespace_flexible"}:
        schema["x-guidance"] = {**options, "whitespace_pattern": WHITESPACE}
    return json.dumps({"grammars": [{"json_schema": schema}]})


def _escaped(text: str) -> str:
    """A regex that matches this text; re.escape is for Python's syntax."""
    return "".join(char if char.isascii() and char.isalnum() else f"\\x{{{ord(char):x}}}" for char in text)


def _shortened(message: str) -> str:
    """llguidance's message in one line, without the excerpts that it shows of the grammar."""
    message = message.split("\n<", 1)[0]  # <state> or <non-verbose/>
    if message.startswith("NoExtensionBias"):
        return "no token continues the text as it wants"
    lines = (line.strip() for line in message.splitlines())
    text = " ".join(line for line in lines if line.strip("^") and not line.split(" ", 1)[-1].startswith("| "))
    return text if len(text) <= 400 else f"{text[:120]} … {text[-270:]}"

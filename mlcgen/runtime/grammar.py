"""Structured output: which tokens may come next, so that the text is what a schema, regex, grammar or list allows.

The parsing is llguidance's, an optional package that is imported when a request first wants structure.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import tokenizers

from mlcgen.errors import RequestError
from mlcgen.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

__all__ = ["Grammar", "GrammarCompiler", "StructuredOutput"]

Mask = npt.NDArray[np.uint32]
Json = dict[str, Any]

MAX_SOURCE = 256 * 1024  # characters of a schema, regex, grammar or list
MAX_COMPILED = 16  # grammars kept for the next request that wants the same
# Lower than llguidance's own where those let one mask take seconds or hundreds of MB: Earley items and lexer fuel of a
# step (50,000 and 200,000), lexer states (250,000, of 1 to 2 KB), symbols (500,000).
LIMITS = {"step_max_items": 10_000, "step_lexer_fuel": 100_000, "max_lexer_states": 50_000, "max_grammar_size": 200_000}
# Between the parts of JSON. llguidance's own has no upper bound, and small models do not always come back from there.
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,64}"
_KINDS = ("json_schema", "json_object", "regex", "grammar", "choice")


@dataclass(frozen=True, kw_only=True)
class StructuredOutput:
    """What the text must be; exactly one of the fields. Raises RequestError that names the field and what is wrong."""

    json_schema: Json | str | None = None
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
    milliseconds, mostly without the GIL, or up to two seconds for the largest that are allowed. So it is better done
    where no engine waits for it.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        self._tokenizer, self._vocab_size, self._eos_token_ids = tokenizer, vocab_size, frozenset(eos_token_ids)
        self._lock = threading.Lock()
        self._vocabulary: _Vocabulary | None = None
        self._compiled: OrderedDict[tuple[str, str], _Compiled] = OrderedDict()

    def compile(self, structured: StructuredOutput) -> "Grammar":
        """A request's grammar at its beginning.

        Raises RequestError with llguidance's message if it is not valid or too complex, or llguidance is missing.
        """
        key = structured.kind, structured.source
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = _Vocabulary(self._tokenizer, self._vocab_size, self._eos_token_ids)
            vocabulary, found = self._vocabulary, self._compiled.get(key)
        if found is not None and not found.is_spoiled:
            return Grammar(found)
        compiled = _Compiled(vocabulary, *key)
        grammar = Grammar(compiled)
        grammar.mask()  # fails here rather than at the first token
        with self._lock:
            self._compiled[key] = compiled
            self._compiled.move_to_end(key)
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        return grammar


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

    def masks(self, draft: Sequence[int]) -> Mask:
        """`mask` here and after each token of `draft`, up to the first that is not allowed: (1 + allowed, words)."""
        rows, num_accepted = [self.mask()], 0
        try:
            for token in draft:
                if not self._accepts(token):
                    break
                num_accepted += 1
                rows.append(self.mask())
        finally:
            self.rollback(num_accepted)
        return np.stack(rows)

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

    def __init__(self, vocabulary: "_Vocabulary", kind: str, source: str) -> None:
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


class _Vocabulary:
    """A tokenizer as llguidance reads it, and the sets of tokens that masks are made with."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self.library = _library()
        spec: Json = json.loads(tokenizer._tokenizer.to_str())
        tokens, special = _token_bytes(spec, tokenizer, vocab_size)
        self._ids = frozenset(id for id, text in enumerate(tokens[:vocab_size]) if text)
        self.eos = eos_token_ids & self._ids
        if not self.eos:
            raise RequestError("the model names no end-of-sequence token that its tokenizer has; structure needs one")
        self.known = _bits(self._ids, vocab_size)
        self.eos_mask = _bits(self.eos, vocab_size)
        writer = _Writer(spec, tokens, sorted(special | self.eos), min(self.eos))
        self.reader: LLTokenizer = self.library.LLTokenizer(
            self.library.TokenizerWrapper(writer), eos_token=sorted(self.eos)
        )
        writer.reader = self.reader
        self.limits: LLParserLimits = self.library.LLParserLimits(verbose_errors=False, **LIMITS)

    def knows(self, token: int) -> bool:
        """Whether both model and tokenizer have the token."""
        return token in self._ids


def _library() -> ModuleType:
    try:
        import llguidance
    except ImportError as error:
        raise RequestError(
            f"structured output needs llguidance ({error}); install it: pip install 'mlcgen[structured]'"
        ) from error
    return llguidance


def _bits(ids: frozenset[int], vocab_size: int) -> Mask:
    bits = np.zeros(-(-vocab_size // 32) * 32, np.bool_)
    bits[list(ids)] = True
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32, copy=False)


class _Writer:
    """Writes forced text in tokens, for llguidance.

    Special tokens are not recognized in it: <|im_end|> inside a string of the schema is text. (llguidance's own reader
    of tokenizers takes it for the token, which its parser then refuses.) No space is put before the text either, and
    where a normalizer would change it, it is written with the longest tokens that fit.
    """

    reader: "LLTokenizer"

    def __init__(self, spec: Json, tokens: list[bytes], special: list[int], eos: int) -> None:
        self.tokens, self.special_token_ids = tokens, special
        self.eos_token_id, self.bos_token_id = eos, None
        added = [{**each, "special": each["special"] or each["id"] in special} for each in spec["added_tokens"]]
        spec = {
            **spec,
            "added_tokens": added,
            "normalizer": _without_prefix(spec["normalizer"]),
            "pre_tokenizer": _without_prefix(spec["pre_tokenizer"]),
        }
        self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
        self._tokenizer.encode_special_tokens = True

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids if b"".join(self.tokens[id] for id in ids) == text.encode() else self.reader.greedy_tokenize(text)


def _without_prefix(step: Json | None) -> Json | None:
    """A normalizer or pre-tokenizer that puts no space before the text."""
    if step is None or step["type"] == "Prepend":
        return None
    if step["type"] == "Sequence":
        name = "normalizers" if "normalizers" in step else "pretokenizers"
        return {**step, name: [each for each in map(_without_prefix, step[name]) if each is not None]}
    changes = {"prepend_scheme": "never", "add_prefix_space": False}
    return {**step, **{name: value for name, value in changes.items() if name in step}}


def _token_bytes(spec: Json, tokenizer: Tokenizer, vocab_size: int) -> tuple[list[bytes], frozenset[int]]:
    """Each id's text, empty for those that the tokenizer lacks, and which are special: never part of the text.

    As llguidance has it, an added token like <tool_call> is special, so that grammars can name it.
    Raises RequestError for decoders that do not say which bytes a token stands for.
    """
    spelled: dict[str, int] = tokenizer._tokenizer.get_vocab(with_added_tokens=True)
    tokens = [b""] * max(vocab_size, 1 + max(spelled.values(), default=0))
    to_bytes = _ByteDecoder(spec["decoder"])
    for spelling, id in spelled.items():
        tokens[id] = to_bytes(spelling)
    for each in spec["added_tokens"]:
        tokens[each["id"]] = each["content"].encode()
    added = spec["added_tokens"]
    special = frozenset(t["id"] for t in added if t["special"] or (t["content"][:1], t["content"][-1:]) == ("<", ">"))
    return tokens, special


class _ByteDecoder:
    """The bytes that the vocabulary's spelling of a token stands for."""

    def __init__(self, decoder: Json | None) -> None:
        steps = list(_flattened(decoder))
        types = {step["type"] for step in steps}
        if not types & {"ByteLevel", "ByteFallback", "Metaspace"}:
            found = ", ".join(sorted(types)) or "none"
            raise RequestError(f"structured output does not know this tokenizer's decoder ({found}); leave it out")
        self._bytes = _byte_level_alphabet() if "ByteLevel" in types else None
        self._has_fallback = "ByteFallback" in types
        self._spaces = [step["replacement"] for step in steps if step["type"] == "Metaspace"]
        self._spaces += [
            step["pattern"]["String"]
            for step in steps
            if step["type"] == "Replace" and step["content"] == " " and "String" in step["pattern"]
        ]

    def __call__(self, spelling: str) -> bytes:
        if self._bytes is not None:
            found = [self._bytes.get(char) for char in spelling]
            return spelling.encode() if None in found else bytes(byte for byte in found if byte is not None)
        if self._has_fallback and len(spelling) == 6 and spelling.startswith("<0x") and spelling.endswith(">"):
            return bytes([int(spelling[3:5], 16)])
        for space in self._spaces:
            spelling = spelling.replace(space, " ")
        return spelling.encode()


def _flattened(decoder: Json | None) -> Iterator[Json]:
    if decoder is not None and decoder["type"] == "Sequence":
        for step in decoder["decoders"]:
            yield from _flattened(step)
    elif decoder is not None:
        yield decoder


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: those that can be seen as they are, the others from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}

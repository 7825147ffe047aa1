"""A model's tokens as llguidance reads them: the text of each, and which are its end."""

import json
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import tokenizers

from mlcgen.errors import RequestError
from mlcgen.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLParserLimits, LLTokenizer

__all__ = ["Mask", "Vocabulary"]

Mask = npt.NDArray[np.uint32]
Json = dict[str, Any]

# Lower than llguidance's own where those let one mask take seconds or hundreds of MB: Earley items and lexer fuel of a
# step (50,000 and 200,000), lexer states (250,000, of 1 to 2 KB), symbols (500,000).
LIMITS = {"step_max_items": 10_000, "step_lexer_fuel": 100_000, "max_lexer_states": 50_000, "max_grammar_size": 200_000}


class Vocabulary:
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

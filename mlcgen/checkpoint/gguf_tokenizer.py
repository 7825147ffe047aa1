"""A Hugging Face `tokenizers` file from GGUF metadata.

The JSON is written directly: special tokens with `$` or spaces in their names need no escaping there, and the library
checks the whole when it loads it.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as HfTokenizer

from mlcgen.checkpoint.base import Tokenizer
from mlcgen.errors import CheckpointError, UnsupportedError

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # tokenizer.ggml.token_type; 1 is an ordinary token
MAX_PIECE = 512  # characters in a SentencePiece token (its own default is 16): splitting one is quadratic
SPACE = "\u2581"
Json = dict[str, Any]


def build_tokenizer(path: Path, metadata: Mapping[str, Any]) -> Tokenizer:
    """`tokenizer.json` and the fields of `tokenizer_config.json` from the keys tokenizer.ggml.* of a GGUF file.

    Gives llama.cpp's ids (with special tokens in the text recognised). Empty if the file holds no vocabulary.
    Raises UnsupportedError for a tokenizer model or pre-tokenizer that is not in the tables below.
    """
    vocabulary = _Vocabulary(path, metadata)
    model = vocabulary.get("model", str, "none")
    if model in ("none", "no_vocab"):
        return Tokenizer(None, _tokenizer_config(vocabulary, {}))
    if model not in _MODELS:
        raise UnsupportedError(f"{path}: tokenizer model {model[:40]!r} is not read; have: {', '.join(_MODELS)}")
    vocabulary.read_tokens()
    parts = _MODELS[model](vocabulary)
    add_bos = vocabulary.get("add_bos_token", bool, parts.pop("add_bos") and vocabulary.token("bos") is not None)
    add_eos = vocabulary.get("add_eos_token", bool, False)
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(vocabulary),
        "post_processor": _template(vocabulary, add_bos, add_eos),
        **parts,
    }
    return Tokenizer(
        _checked(vocabulary, content),
        _tokenizer_config(vocabulary, {"add_bos_token": add_bos, "add_eos_token": add_eos}),
    )


def _checked(vocabulary: "_Vocabulary", content: Json) -> bytes:
    text = json.dumps(content, ensure_ascii=False)
    try:
        HfTokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise vocabulary.error(f"the vocabulary is inconsistent ({str(error)[:200]})") from error
    return text.encode()


class _Vocabulary:
    """The keys tokenizer.ggml.*, checked."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self.path, self.metadata = path, metadata
        self.tokens: list[str] = []
        self.types: list[int] = []
        self.ids: dict[str, int] = {}

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: tokenizer: {problem}; convert the model again")

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.metadata.get(f"tokenizer.ggml.{key}")
        value = default if value is None else value
        if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise self.error(f"tokenizer.ggml.{key} is {str(value)[:40]!r}, not of type {kind.__name__}")
        return value

    def strings(self, key: str) -> list[str]:
        """A list of strings; an array of numbers, which is how an empty list may be typed, counts if it is empty."""
        value = self.metadata.get(f"tokenizer.ggml.{key}", [])
        if isinstance(value, np.ndarray) and not len(value):
            value = []
        if not isinstance(value, list):
            raise self.error(f"tokenizer.ggml.{key} is not a list of strings")
        return value

    def numbers(self, key: str, default: float) -> list[float]:
        """One number per token."""
        value = self.metadata.get(f"tokenizer.ggml.{key}")
        if value is None:
            return [default] * len(self.tokens)
        if not isinstance(value, np.ndarray) or len(value) != len(self.tokens):
            raise self.error(f"tokenizer.ggml.{key} is not one number for each of {len(self.tokens)} tokens")
        return value.tolist()

    def read_tokens(self) -> None:
        self.tokens = self.strings("tokens")
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        if not self.tokens:
            raise self.error("tokenizer.ggml.tokens is empty")
        if len(self.ids) != len(self.tokens):
            twice = next(token for index, token in enumerate(self.tokens) if self.ids[token] != index)
            raise self.error(f"token {twice[:40]!r} occurs twice")
        self.types = [int(kind) for kind in self.numbers("token_type", 1)]

    def token_id(self, name: str) -> int | None:
        """The id of `bos`, `eos`, … or None where the file names none."""
        value = self.get(f"{name}_token_id", int)
        if value is None or value == 0xFFFFFFFF:  # -1 in a uint32: explicitly none
            return None
        if not 0 <= value < len(self.tokens):
            raise self.error(f"tokenizer.ggml.{name}_token_id is {value} but there are {len(self.tokens)} tokens")
        return int(value)

    def token(self, name: str) -> str | None:
        index = self.token_id(name)
        return None if index is None else self.tokens[index]


def _added_tokens(vocabulary: _Vocabulary) -> list[Json]:
    """Tokens that are matched in the raw text before anything else; control tokens vanish when decoding."""
    return [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != _USER_DEFINED,
        }
        for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if token and kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]


def _template(vocabulary: _Vocabulary, add_bos: bool, add_eos: bool) -> Json | None:
    def piece(name: str) -> list[Json]:
        token = vocabulary.token(name)
        if token is None:
            raise vocabulary.error(f"add_{name}_token is set but there is no tokenizer.ggml.{name}_token_id")
        used[token] = {"id": token, "ids": [vocabulary.ids[token]], "tokens": [token]}
        return [{"SpecialToken": {"id": token, "type_id": 0}}]

    def sequence(name: str) -> list[Json]:
        return [*before, {"Sequence": {"id": name, "type_id": 0}}, *after]

    used: Json = {}
    before, after = piece("bos") if add_bos else [], piece("eos") if add_eos else []
    if not used:
        return None
    return {
        "type": "TemplateProcessing",
        "single": sequence("A"),
        "pair": sequence("A") + sequence("B"),
        "special_tokens": used,
    }


def _tokenizer_config(vocabulary: _Vocabulary, extra: Json) -> Json:
    config = dict(extra)
    if vocabulary.tokens:
        names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        named = {f"{short}_token": vocabulary.token(name) for short, name in names.items()}
        config |= {key: token for key, token in named.items() if token is not None}
    template = vocabulary.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    return config


# --- byte-level BPE: `gpt2` -----------------------------------------------------------------------------------------

_WORDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _WORDS
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def _byte_level(use_regex: bool) -> Json:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _sequence(*steps: Json) -> Json:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def _split(pattern: str) -> Json:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


_GPT2: Json = {"pre_tokenizer": _byte_level(use_regex=True)}
_PRE_TOKENIZERS: dict[str, Json] = {  # by tokenizer.ggml.pre
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": {"pre_tokenizer": _sequence({"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True))},
    "qwen2": {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": _sequence(_split(_QWEN2), _byte_level(use_regex=False)),
    },
    "llama-bpe": {
        "pre_tokenizer": _sequence(_split(_LLAMA3), _byte_level(use_regex=False)),
        "ignore_merges": True,  # a whole word that is a token needs no merges
        "add_bos": True,
    },
}


def _byte_level_bpe(vocabulary: _Vocabulary) -> Json:
    name = vocabulary.get("pre", str, "default")
    if name not in _PRE_TOKENIZERS:
        have = ", ".join(_PRE_TOKENIZERS)
        raise UnsupportedError(f"{vocabulary.path}: pre-tokenizer {name[:40]!r} is not read; have: {have}")
    pre = _PRE_TOKENIZERS[name]
    merges = [merge.split(" ", 1) for merge in vocabulary.strings("merges")]
    for merge in merges:
        _check_merge(vocabulary, merge)
    return {
        "normalizer": pre.get("normalizer"),
        "pre_tokenizer": pre["pre_tokenizer"],
        "decoder": _byte_level(use_regex=True),
        "model": _bpe(vocabulary, merges, ignore_merges=pre.get("ignore_merges", False)),
        "add_bos": pre.get("add_bos", False),
    }


def _check_merge(vocabulary: _Vocabulary, merge: list[str]) -> None:
    missing = [part for part in (*merge, "".join(merge)) if part not in vocabulary.ids]
    if len(merge) != 2 or missing:
        raise vocabulary.error(f"merge {' '.join(merge)[:60]!r} is not made of tokens")


def _bpe(vocabulary: _Vocabulary, merges: list[list[str]], **options: Any) -> Json:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **options,
        "vocab": vocabulary.ids,
        "merges": merges,
    }


# --- SentencePiece BPE: `llama` -------------------------------------------------------------------------------------


def _sentencepiece_bpe(vocabulary: _Vocabulary) -> Json:
    """llama.cpp's `llama` tokenizer: spaces become U+2581, unknown characters become byte tokens."""
    prefix = vocabulary.get("add_space_prefix", bool, True)
    spaces: Json = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    before: list[Json] = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    strip: list[Json] = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    decoders = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *strip,
    ]
    fallback = all(f"<0x{byte:02X}>" in vocabulary.ids for byte in range(256))
    model = _bpe(
        vocabulary,
        _merges_from_scores(vocabulary),
        unk_token=vocabulary.token("unknown"),
        fuse_unk=True,
        byte_fallback=fallback,
    )
    return {
        # Text between added tokens is normalized piece by piece, so each piece gets the prefix, as in llama.cpp.
        "normalizer": {"type": "Sequence", "normalizers": [*before, spaces]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
        "add_bos": True,
    }


def _merges_from_scores(vocabulary: _Vocabulary) -> list[list[str]]:
    """All pairs of tokens whose concatenation is an ordinary token, best score of that token first.

    SentencePiece merges whichever neighbours make the token of the highest score; as a ranked list that is every way to
    split each token. Among splits of one token, those with the older (smaller) left part come first.
    """
    scores, ids = vocabulary.numbers("scores", 0.0), vocabulary.ids
    if not np.isfinite(scores).all():
        raise vocabulary.error("tokenizer.ggml.scores holds a number that is not finite")
    ranked: list[tuple[float, int, int, str, str]] = []
    for token, score, kind in zip(vocabulary.tokens, scores, vocabulary.types, strict=True):
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE):
            continue
        if len(token) > MAX_PIECE:
            raise vocabulary.error(f"token {token[:20]!r}… has {len(token)} characters (limit {MAX_PIECE})")
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                ranked.append((-score, ids[left], ids[right], left, right))
    return [[left, right] for _, _, _, left, right in sorted(ranked)]


_MODELS: dict[str, Callable[[_Vocabulary], Json]] = {"gpt2": _byte_level_bpe, "llama": _sentencepiece_bpe}

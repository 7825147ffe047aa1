"""Text to token ids and back: encoding, chat templates, and streaming decoding with stop strings."""

import json
import threading
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import tokenizers
from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlcgen.errors import ArtifactError, RequestError

__all__ = ["ChatTemplate", "IncrementalDecoder", "StopMatcher", "Tokenizer"]

Message = dict[str, Any]

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A `tokenizer.json` with its `tokenizer_config.json` (special tokens and chat template; may be empty)."""

    def __init__(self, path: str | Path, config: dict[str, Any] | None = None) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise ArtifactError(f"cannot read tokenizer {path}: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = config or {}
        self.special_tokens = {name: _content(config[name]) for name in _SPECIAL_NAMES if config.get(name)}
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        self._special_ids = {id for id, t in self._tokenizer.get_added_tokens_decoder().items() if t.special}
        self._templates = _named_templates(config.get("chat_template"))
        self._compiled: dict[str, ChatTemplate] = {}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; with the tokens that the model wants around a text (such as BOS) unless told otherwise."""
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeEncodeError) as error:
            raise RequestError(f"the prompt is not valid Unicode text ({error}); remove lone surrogates") from error
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; ids that the tokenizer does not know (padding of the vocabulary) are left out."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_id(self, token: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def token(self, token_id: int) -> str | None:
        """The vocabulary's spelling of a token id, not its text."""
        found: str | None = self._tokenizer.id_to_token(token_id)
        return found

    def is_silent(self, token_id: int, skip_special_tokens: bool) -> bool:
        """Whether `decode` leaves this id out."""
        return (skip_special_tokens and token_id in self._special_ids) or self.token(token_id) is None

    @property
    def eos_token_ids(self) -> list[int]:
        """The configured end-of-sequence token, if any."""
        found = self.token_id(self.special_tokens.get("eos_token", ""))
        return [] if found is None else [found]

    @property
    def has_chat_template(self) -> bool:
        return bool(self._templates)

    def render_chat(
        self,
        messages: list[Message],
        *,
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Prompt text for [{"role": …, "content": …}, …] by the model's own template.

        `variables` are passed on (for instance enable_thinking=False). Raises RequestError if the model has no
        template, or the template refuses these messages.
        """
        variables = {"messages": messages, "add_generation_prompt": add_generation_prompt, "tools": tools, **variables}
        return self._template(tools is not None).render({**self.special_tokens, **variables})

    def encode_chat(self, messages: list[Message], **options: Any) -> list[int]:
        """Token ids of `render_chat`; templates write special tokens themselves, so none are added."""
        return self.encode(self.render_chat(messages, **options), add_special_tokens=False)

    def _template(self, with_tools: bool) -> "ChatTemplate":
        if not self._templates:
            raise RequestError("this model has no chat template; give it a plain prompt instead of messages")
        name = "tool_use" if with_tools and "tool_use" in self._templates else "default"
        name = name if name in self._templates else next(iter(self._templates))
        if name not in self._compiled:
            self._compiled[name] = ChatTemplate(self._templates[name])
        return self._compiled[name]


def _content(token: str | dict[str, Any]) -> str:
    """Special tokens are written as a string or as an AddedToken's fields."""
    return token if isinstance(token, str) else str(token["content"])


def _named_templates(template: str | list[dict[str, str]] | dict[str, str] | None) -> dict[str, str]:
    if isinstance(template, str):
        return {"default": template}
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}
    return template or {}


class ChatTemplate:
    """A Jinja chat template, which is a program out of a file that nobody has vetted: sandboxed and bounded."""

    def __init__(self, source: str) -> None:
        self._environment = _TemplateEnvironment()
        try:
            self._template = self._environment.from_string(source)
        except (TemplateError, RecursionError) as error:
            raise RequestError(f"the model's chat template does not parse: {error}") from error

    def render(self, variables: dict[str, Any]) -> str:
        """Raises RequestError with the template's own message where it refuses the conversation."""
        with self._environment.metered():
            try:
                return self._template.render(variables)
            except RequestError:
                raise
            except Exception as error:  # a template can raise anything that Python's operators raise
                raise RequestError(f"the chat template refused the messages: {error}") from error


class _TemplateEnvironment(ImmutableSandboxedEnvironment):
    """What Hugging Face templates expect, with a bound on loops, calls and repetition.

    The sandbox keeps a template from Python's internals. It does not keep it from running for ever, so each pass
    through a loop and each call spends one of `MAX_OPERATIONS`, and operators may not build texts beyond `MAX_TEXT`.
    (Single filters and methods can still ask for much memory; the template was chosen along with the weights.)
    """

    MAX_OPERATIONS = 1_000_000
    MAX_TEXT = 16 * 1024 * 1024
    intercepted_binops = frozenset(["+", "*", "**"])

    def __init__(self) -> None:
        extensions = ["jinja2.ext.loopcontrols", _GenerationBlock]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        self.filters["tojson"] = _to_json
        self.filters["metered"] = self._metered
        self.filters["sized"] = self._sized
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda fmt: datetime.now().strftime(fmt)
        self._operations = 0
        self._lock = threading.Lock()

    def metered(self) -> "_Meter":
        return _Meter(self)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self._spend()
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or (operator == "*" and _repeats(left, right, self.MAX_TEXT)):
            raise SecurityError(f"operator {operator} on such operands is not allowed in a chat template")
        return self._sized(super().call_binop(context, operator, left, right))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = _filtered(loop.iter, "metered")
        for concat in list(tree.find_all(nodes.Concat)):
            concat.nodes = [_filtered(nodes.Concat(concat.nodes), "sized")]
        tree.set_environment(self)
        return tree

    def _sized(self, value: Any) -> Any:
        if isinstance(value, str | list | tuple) and len(value) > self.MAX_TEXT:
            raise SecurityError(f"a chat template may not build texts over {self.MAX_TEXT} characters")
        return value

    def _metered(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._spend()
            yield item

    def _spend(self) -> None:
        self._operations += 1
        if self._operations > self.MAX_OPERATIONS:
            raise SecurityError(f"more than {self.MAX_OPERATIONS} loop passes and calls")


class _Meter:
    """One rendering at a time, each with its own count of operations."""

    def __init__(self, environment: _TemplateEnvironment) -> None:
        self._environment = environment

    def __enter__(self) -> None:
        self._environment._lock.acquire()
        self._environment._operations = 0

    def __exit__(self, *_: object) -> None:
        self._environment._lock.release()


class _GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's tokens for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None)


def _repeats(left: Any, right: Any, limit: int) -> bool:
    """Whether left * right repeats a text or list beyond `limit`."""
    for items, count in ((left, right), (right, left)):
        if isinstance(items, str | list | tuple) and isinstance(count, int):
            return len(items) * count > limit
    return False


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own tojson escapes HTML, which a prompt must not be."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise RequestError(f"the chat template refused the messages: {message}")


class IncrementalDecoder:
    """Streaming detokenization: the pieces joined equal `Tokenizer.decode` of all tokens.

    Decodes a short window of the last tokens, because a token's text depends on its neighbours: a character may be
    spread over several tokens, and some decoders treat the first token of a text specially. While the text ends in
    U+FFFD a character is unfinished, and the text is held back, for at most `PATIENCE` tokens.

    One exception to equality: a decoder with byte fallback turns a whole run of bytes into U+FFFD when any of them is
    invalid, also those that were valid characters until then and have been given out.
    """

    PATIENCE = 8  # tokens; a character has at most 4, and a token seldom holds the ends of two
    KEEP = 6  # least tokens of context to the left of what is new
    SLIDE = 16  # shorten the window when it is this long

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window: list[int] = []
        self._boundary = 0  # index in the window where a character starts
        self._num_held = 0  # tokens since the text last ended with a whole character
        self._num_sent = 0  # characters of the window's text that were given out

    def push(self, token_id: int) -> str:
        """The text that this token makes certain, perhaps empty."""
        if self._tokenizer.is_silent(token_id, self._skip):
            return ""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window, self._skip)
        num_uncertain = _num_uncertain(text)
        self._num_held = self._num_held + 1 if num_uncertain else 0
        if 0 < self._num_held <= self.PATIENCE:
            return ""
        certain = len(text) - num_uncertain
        delta = text[self._num_sent : certain]
        self._num_sent = max(self._num_sent, certain)
        self._slide(is_boundary=not num_uncertain)
        return delta

    def flush(self) -> str:
        """What was held back, at the end of the sequence."""
        text = self._tokenizer.decode(self._window, self._skip)
        delta = text[self._num_sent :]
        self._num_sent = len(text)
        return delta

    def _slide(self, is_boundary: bool) -> None:
        """Drop the window's oldest tokens, at a place where a character starts if there is one."""
        length = len(self._window)
        if is_boundary and not self._boundary and length >= self.KEEP:
            self._boundary = length
        elif length >= (self.SLIDE if is_boundary else 2 * self.SLIDE):
            self._window = self._window[self._boundary or -self.KEEP :]
            text = self._tokenizer.decode(self._window, self._skip)
            self._num_sent = len(text) - _num_uncertain(text)
            self._boundary = 0


def _num_uncertain(text: str) -> int:
    """Characters at the end that the next token may change: a decoder shows a character's 1 to 3 bytes so far."""
    tail = text[-3:]
    return len(tail) - len(tail.rstrip("\ufffd"))


class StopMatcher:
    """Cuts streamed text at the first stop string; holds back what may be the beginning of one."""

    def __init__(self, stops: list[str], include: bool = False) -> None:
        self._stops = stops
        self._include = include
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The part of the text so far that is certainly before any stop string. Sets `matched` at a stop."""
        text = self._held + text
        if self._find(text):
            self._held = ""
            return self._cut
        num_held = self._num_held(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def flush(self) -> str:
        """What was held back, at the end of the sequence."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str) -> bool:
        found = [(start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if not found:
            return False
        start, self.matched = min(found, key=lambda match: match[0])
        self._cut = text[: start + (len(self.matched) if self._include else 0)]
        return True

    def _num_held(self, text: str) -> int:
        longest = min(len(text), self._longest - 1)
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stops)), 0)

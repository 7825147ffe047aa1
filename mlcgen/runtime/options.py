"""How an engine serves: what can be chosen when an artifact is loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlcgen.errors import RequestError

__all__ = ["SPECULATIONS", "EngineOptions"]

_LEAST = {"tokens_per_step": 1, "swap_bytes": 0, "max_draft": 1, "branches": 1, "window": 2, "sinks": 0}
SPECULATIONS = ("off", "ngram", "lookahead", "model")
WINDOW_KEEPS = ("last", "heavy")


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Raises RequestError that names the field and its value."""

    prefix_cache: bool = True
    """Keep the pages of finished sequences, for those that begin as they did."""
    tokens_per_step: int | None = None
    """Tokens of one step at most, decodes first, then chunks of prompts: fewer make other requests' tokens come more
    evenly, more make prompts faster. None: as compiled."""
    swap_bytes: int = 1 << 30
    """Memory of the host for the pages of preempted sequences, used as far as needed; 0: they are computed anew."""
    swap_file: Path | None = None
    """Where these pages go instead of memory; the file is made, and removed at the end."""
    chunked_prefill: bool = True
    """Compute prompts in chunks beside the tokens of those that generate. False: prompts alone and first, as they come;
    those that generate wait for them."""
    window: int | None = None
    """Let texts grow without end: one with so many tokens goes on with half of the window. None: they end with the
    context."""
    window_keeps: Literal["last", "heavy"] = "last"
    """Besides the first `sinks` tokens. last: the last ones, computed anew. heavy: the last ones and, half of all,
    those that attention falls on, with the keys and values that they have (H2O); a prompt may then be longer than the
    window, and is cut down to half of it once it is computed."""
    sinks: int = 4
    """First tokens of a text that stay in the window; without them models lose their way (arXiv:2309.17453)."""
    speculation: Literal["off", "ngram", "lookahead", "model"] = "off"
    """Guess tokens and verify several in one step, which does not change what is generated. ngram: as they went on
    before in the same text. lookahead: as the model itself guessed on the way. model: as `draft_model` goes on."""
    draft_model: Path | None = None
    """An artifact of a smaller model with the same tokenizer."""
    max_draft: int = 8
    """Tokens guessed one after the other, at most; how many it pays to guess is measured."""
    branches: int = 1
    """Tokens guessed at one place, at most: with several, guesses are trees."""
    trust: float | None = None
    """Take tokens of which `draft_model` is at least so sure without asking the large model, which takes over where it
    is less sure: faster, and another text (big little decoder, arXiv:2302.07863). Greedy requests only."""
    check_numerics: bool = False
    """Where the model gives NaN or infinite logits, run the step again kernel by kernel to name the first that did."""

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise RequestError(f"{name}={value!r} is not valid; it must be an integer of at least {least}")
        if self.window is not None and self.window // 2 <= self.sinks:
            raise RequestError(
                f"window={self.window} with sinks={self.sinks} leaves no room; raise one or lower the other"
            )
        for name, have in (("speculation", SPECULATIONS), ("window_keeps", WINDOW_KEEPS)):
            if (value := getattr(self, name)) not in have:
                raise RequestError(f"{name}={value!r} is not known; have: {', '.join(have)}")
        if self.trust is not None and not (self.speculation == "model" and 0 < self.trust <= 1 and self.branches == 1):
            raise RequestError(
                f"trust={self.trust!r} is not valid; it must be a probability, with speculation='model' and branches=1"
            )
        if (self.speculation == "model") != (self.draft_model is not None):
            raise RequestError(
                f"speculation={self.speculation!r} with draft_model={str(self.draft_model)!r}: "
                "a draft model is what speculation='model' needs, and nothing else does"
            )

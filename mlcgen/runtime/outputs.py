"""What a request gives back. Names and meanings as in vLLM."""

import time
from dataclasses import dataclass, field
from typing import Literal

from mlcgen.errors import MlcgenError

__all__ = ["CompletionOutput", "Delta", "DeltaCursor", "FinishReason", "RequestMetrics", "RequestOutput"]

FinishReason = Literal["stop", "length", "abort", "error", "timeout"]


@dataclass
class RequestMetrics:
    """Times in seconds of the monotonic clock; None until the event has happened."""

    arrival: float
    scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None
    num_prompt_tokens: int = 0
    num_tokens: int = 0  # generated
    num_preemptions: int = 0
    num_cached_tokens: int = 0  # of the prompt, those that were in the cache already
    num_drafted: int = 0  # tokens that were guessed,
    num_accepted: int = 0  # and right

    @property
    def ttft_ms(self) -> float | None:
        """Time to first token in milliseconds, waiting in the queue included."""
        return None if self.first_token is None else (self.first_token - self.arrival) * 1e3

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """Prompt tokens per second from the first scheduled chunk to the first token."""
        return _rate(self.num_prompt_tokens, self.scheduled, self.first_token)

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Generated tokens per second after the first; None below two tokens."""
        return _rate(self.num_tokens - 1, self.first_token, self.finished) if self.num_tokens > 1 else None


def _rate(count: int, start: float | None, stop: float | None) -> float | None:
    if start is None or stop is None or stop <= start:
        return None
    return count / (stop - start)


@dataclass
class CompletionOutput:
    """One generated sequence. `token_ids` has the token that stopped it, `text` has neither that nor a stop string."""

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] | None = None  # per token: id -> log-probability, best first
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop string or stop token id that ended it; None for end-of-sequence

    @property
    def cumulative_logprob(self) -> float | None:
        """Sum of the generated tokens' log-probabilities; None unless logprobs were asked for."""
        if self.logprobs is None:
            return None
        return sum(best[token] for token, best in zip(self.token_ids, self.logprobs, strict=True))


@dataclass
class RequestOutput:
    """A request and what it has generated so far. The engine updates the same object until `finished`."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    error: MlcgenError | None = None

    @property
    def finished(self) -> bool:
        return all(output.finish_reason is not None for output in self.outputs)

    def end(self, completion: CompletionOutput, reason: FinishReason, error: MlcgenError | None = None) -> None:
        """One of `outputs` has ended. The first error of them is the request's."""
        self.error = self.error or error
        completion.finish_reason = reason
        if self.finished:
            self.metrics.finished = time.monotonic()
            self.metrics.num_prompt_tokens = len(self.prompt_token_ids)
            self.metrics.num_tokens = sum(len(each.token_ids) for each in self.outputs)

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.outputs[0].finish_reason


@dataclass
class Delta:
    """What a stream adds in one step. `text` may be empty while a character or a stop string is incomplete."""

    text: str
    token_ids: list[int]
    logprobs: list[dict[int, float]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    output: RequestOutput | None = None  # the whole request, with the last delta only


class DeltaCursor:
    """How far a reader of a growing RequestOutput has come."""

    def __init__(self, output: RequestOutput) -> None:
        self.output = output
        self._num_characters = 0
        self._num_tokens = 0
        self.is_done = False

    def advance(self) -> Delta | None:
        """What is new since the last call, or None."""
        completion, first = self.output.outputs[0], self._num_tokens
        text, token_ids = completion.text[self._num_characters :], completion.token_ids[first:]
        if self.is_done or not (token_ids or text or self.output.finished):
            return None
        self._num_characters += len(text)
        self._num_tokens += len(token_ids)
        self.is_done = self.output.finished
        return Delta(
            text,
            token_ids,
            completion.logprobs[first:] if completion.logprobs is not None else None,
            completion.finish_reason,
            completion.stop_reason,
            self.output if self.is_done else None,
        )

"""Beam search: of all ways to go on, the few that are likeliest as a whole (Graves, 2012; Wu et al., 2016).

A beam is a sequence of the scheduler. One whose next tokens are known waits, paused, for the others of its request;
then the best continuations of all are chosen. The beams that come of one share its pages up to where they differ.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest

from mlcgen.errors import MlcgenError
from mlcgen.runtime.outputs import FinishReason
from mlcgen.runtime.request import CANDIDATES, Request
from mlcgen.runtime.sampler import SamplingParams
from mlcgen.runtime.scheduler import Scheduler
from mlcgen.runtime.tokenizer import Tokenizer

__all__ = ["BeamSearch"]


@dataclass
class _Hypothesis:
    """A way to go on that has ended."""

    token_ids: list[int]
    logprobs: list[dict[int, float]]
    reason: FinishReason
    stop_reason: int | None = None

    @property
    def logprob(self) -> float:
        return _sum(self.token_ids, self.logprobs)


@dataclass
class BeamSearch:
    """The beams of one request. The scheduler has all of them, the paused ones too.

    beams: the first one, in a list that always has those of now. new_beam(): a request like the first one. A beam's
    tokens and their log-probabilities are in its `completion`.
    """

    beams: list[Request]
    params: SamplingParams
    scheduler: Scheduler[Request]
    new_beam: Callable[[], Request]
    _next: dict[Request, Mapping[int, float]] = field(default_factory=dict)  # log-probabilities of tokens
    _ended: list[_Hypothesis] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._first = self.beams[0]

    def extend(self, beam: Request, logprobs: Mapping[int, float]) -> FinishReason | None:
        """A beam's likeliest next tokens. Why the search ends, if it does.

        The scheduler has the beam, which has just been computed to its end. Raises RequestError where there will never
        be room for as many beams as there are now.
        """
        beam.num_tokens = len(beam.tokens)
        self._next[beam] = logprobs
        self.scheduler.pause(beam)
        goes_on = len(self._next) < len(self.beams) or self._select()
        return None if goes_on else "length"

    def _select(self) -> bool:
        """Go on with the best continuations. Whether there is something to go on with."""
        width = self.params.beam_width
        scored = [
            (_sum(beam.completion.token_ids, beam.completion.logprobs or []) + logprob, beam, token)
            for beam in self.beams
            for token, logprob in self._next[beam].items()
        ]
        scored.sort(key=lambda each: -each[0])
        chosen: list[tuple[Request, int]] = []
        for _, beam, token in scored[: CANDIDATES * width]:
            if token in beam.stop_ids:
                self._end(beam, token)
            elif len(chosen) < width:
                chosen.append((beam, token))
        self._go_on(chosen)
        if not self.beams or len(self.beams[0].completion.token_ids) >= self._first.max_tokens:
            return False
        return not self._is_decided(max(self._score(_hypothesis(beam, "length")) for beam in self.beams))

    def _end(self, beam: Request, token: int) -> None:
        """With the token that stops it, where no better way to go on was there for a whole beam."""
        completion, logprob = beam.completion, self._next[beam][token]
        logprobs = [*(completion.logprobs or []), {token: logprob}]
        self._ended.append(_Hypothesis([*completion.token_ids, token], logprobs, "stop", token))

    def _go_on(self, chosen: list[tuple[Request, int]]) -> None:
        """The first continuation of a beam is the same sequence, others begin as copies of it."""
        logprobs, self._next = self._next, {}
        for beam in set(self.beams).difference(beam for beam, _ in chosen):
            self.scheduler.remove(beam)
        self.beams.clear()
        copies: list[tuple[Request, Request]] = []
        for parent, _ in chosen:
            beam = parent
            if parent in self.beams:
                beam = self._copy(parent)
                copies.append((beam, parent))
            self.beams.append(beam)
        for beam, (parent, token) in zip(self.beams, chosen, strict=True):
            _append(beam, token, logprobs[parent][token])
        for beam in set(self.beams).difference(beam for beam, _ in copies):
            self.scheduler.resume(beam)
        for beam, parent in copies:
            self.scheduler.fork(beam, parent)
            beam.is_queued = True

    def _copy(self, beam: Request) -> Request:
        copy = self.new_beam()
        copy.tokens[:] = beam.tokens
        copy.adapter_slot, copy.cache_root = beam.adapter_slot, beam.cache_root
        copy.search, copy.due = self, beam.due
        copy.completion.token_ids[:] = beam.completion.token_ids
        copy.completion.logprobs = list(beam.completion.logprobs or [])
        return copy

    def _is_decided(self, best_live: float) -> bool:
        """Whether so many have ended as are wanted, and nothing that is alive is better than the worst of these."""
        width = self.params.beam_width
        return len(self._ended) >= width and best_live <= sorted(map(self._score, self._ended))[-width]

    def _score(self, hypothesis: _Hypothesis) -> float:
        """Sum of log-probabilities per token, to the power of the length penalty."""
        return hypothesis.logprob / max(len(hypothesis.token_ids), 1) ** self.params.length_penalty

    def finish(self, reason: FinishReason, error: MlcgenError | None, tokenizer: Tokenizer | None) -> None:
        """End the request with the best texts, and for `reason` where these have not ended themselves."""
        for beam in self.beams:
            beam.completion.finish_reason = reason
            if beam.is_queued:
                self.scheduler.remove(beam)
        found = [*self._ended, *(_hypothesis(beam, reason) for beam in self.beams)]
        found.sort(key=lambda each: -self._score(each))
        output = self._first.output
        for completion, each in zip_longest(output.outputs, found[: len(output.outputs)]):
            if each is not None:
                completion.token_ids[:] = each.token_ids
                completion.logprobs = each.logprobs
                completion.stop_reason = each.stop_reason
                self._first.complete_text(completion, tokenizer)
            output.end(completion, reason if each is None else each.reason, error)


def _append(beam: Request, token: int, logprob: float) -> None:
    beam.tokens.append(token)
    beam.num_tokens = len(beam.tokens)
    beam.completion.token_ids.append(token)
    beam.completion.logprobs = [*(beam.completion.logprobs or []), {token: logprob}]


def _hypothesis(beam: Request, reason: FinishReason) -> _Hypothesis:
    return _Hypothesis(list(beam.completion.token_ids), list(beam.completion.logprobs or []), reason)


def _sum(token_ids: list[int], logprobs: list[dict[int, float]]) -> float:
    return sum(each[token] for token, each in zip(token_ids, logprobs, strict=True))

"""Requests as the engine knows them, and what is wrong with those that cannot be served."""

import math
import sys
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from mlcgen.errors import RequestError
from mlcgen.runtime.adapters import Adapter
from mlcgen.runtime.grammar import Grammar, GrammarCompiler
from mlcgen.runtime.outputs import CompletionOutput, FinishReason, RequestOutput
from mlcgen.runtime.sampler import Sampler, SamplingParams
from mlcgen.runtime.scheduler import Sequence
from mlcgen.runtime.step_cost import Acceptance
from mlcgen.runtime.tokenizer import IncrementalDecoder, StopMatcher, Tokenizer

if TYPE_CHECKING:
    from mlcgen.runtime.beam_search import BeamSearch

__all__ = ["CANDIDATES", "Intake", "Prompt", "Request"]

Prompt = str | list[int]

CANDIDATES = 2  # tokens of a beam that matter, for each beam: half of all that are taken may end the text


class Request(Sequence):
    """One sample of a request: a sequence with its sampler and its text."""

    def __init__(
        self,
        output: RequestOutput,
        completion: CompletionOutput,
        params: SamplingParams,
        stop_ids: frozenset[int],
        max_tokens: int,
        rank: float,
    ) -> None:
        super().__init__(output.prompt_token_ids, rank)
        self.output = output
        self.completion = completion
        self.params = params
        self.stop_ids = stop_ids
        self.eos_token_ids: frozenset[int] = frozenset()  # the model's own among all that there are
        self.max_tokens = max_tokens
        self.num_before = len(self.tokens)  # of `tokens`, all but the generated ones; fewer where a window has moved
        self.due = math.inf  # when nobody wants it any more, on the monotonic clock
        self.is_queued = False  # whether the scheduler has it
        self.siblings: list[Request] = []  # other samples, which begin when this one's prompt is in the cache
        self.acceptance = Acceptance()
        self.sampler = Sampler(params, self.tokens, stop_ids)
        self.stops = StopMatcher(params.stop_strings, params.include_stop_str_in_output)
        self.decoder: IncrementalDecoder | None = None  # None: the text is wanted only at the end
        self.streams = False
        self.search: BeamSearch | None = None  # that it is a beam of

    def constrain(self, grammar: Grammar) -> None:
        """Before its first token: all of its text is what the grammar allows."""
        self.sampler = Sampler(self.params, self.tokens, self.stop_ids, grammar)

    def append(self, token: int, logprobs: dict[int, float] | None) -> FinishReason | None:
        """The next token; returns why it is the last one, if it is. Raises RequestError as BeamSearch.extend."""
        if self.search is not None:
            return self.search.extend(self, logprobs or {})
        completion = self.completion
        if completion.logprobs is not None and logprobs is not None:
            completion.logprobs.append(logprobs)
        self.tokens.append(token)
        completion.token_ids.append(token)
        if token in self.stop_ids:
            completion.stop_reason = None if token in self.eos_token_ids else token
            return "stop"
        if self.decoder is not None:
            self._extend_text(self.decoder.push(token))
        if self.stops.matched is not None:
            completion.stop_reason = self.stops.matched
            return "stop"
        return "length" if self.num_wanted <= 0 else None

    def _extend_text(self, text: str) -> None:
        may_stop = len(self.completion.token_ids) >= self.params.min_tokens
        self.completion.text += self.stops.push(text) if may_stop else text

    def complete_text(self, completion: CompletionOutput, tokenizer: Tokenizer | None) -> None:
        """Give out the text that was held back, or decode all of it if it was not decoded on the way."""
        if self.decoder is not None:
            if self.stops.matched is None:
                completion.text += self.stops.push(self.decoder.flush()) + self.stops.flush()
        elif tokenizer is not None:
            stopped_by_token = completion.token_ids[-1:] and completion.token_ids[-1] in self.stop_ids
            shown = completion.token_ids[:-1] if stopped_by_token else completion.token_ids
            completion.text = tokenizer.decode(shown, self.params.skip_special_tokens)

    def keep(self, places: list[int]) -> None:
        """Go on from the tokens at these places, as if there had been no others."""
        self.tokens[:] = [self.tokens[place] for place in places]
        self.num_tokens = len(places)
        self.num_before = len(places) - len(self.completion.token_ids)

    @property
    def num_wanted(self) -> int:
        """Tokens that are still to be generated, at most."""
        return self.max_tokens - len(self.completion.token_ids)

    @property
    def draws_freely(self) -> bool:
        """Whether its tokens are drawn with random numbers that nobody expects to be the same again."""
        return not self.params.is_greedy and self.params.seed is None


class Intake:
    """Makes requests for one model. Every method raises RequestError for what cannot be served."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        context_length: int,
        is_endless: bool = False,
    ) -> None:
        """is_endless: texts may outgrow the context, prompts may not."""
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._eos_token_ids, self._context_length = eos_token_ids, context_length
        self._is_endless = is_endless
        self._compiler: GrammarCompiler | None = None  # made when a request wants structure

    def token_ids(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return _checked_token_ids(prompt, self._vocab_size)
        if self._tokenizer is None:
            raise RequestError("the artifact has no tokenizer; give the prompt as token ids")
        return self._tokenizer.encode(prompt)

    def new_requests(
        self,
        output: RequestOutput,
        params: SamplingParams,
        stream: bool,
        rank: float,
        due: float,
        adapter: Adapter | None,
    ) -> list[Request]:
        """One for each sample; the first one has the others as siblings."""
        requests = self._new_samples(output, params, stream, rank)
        for request in requests:
            request.due = due
            if adapter is not None:
                request.adapter_slot, request.cache_root = adapter.slot, adapter.cache_root
        return requests

    def _new_samples(self, output: RequestOutput, params: SamplingParams, stream: bool, rank: float) -> list[Request]:
        self._check_prompt(len(output.prompt_token_ids))
        self._check_params(params)
        if max(params.n, params.beam_width) > 1 and stream:
            what = f"n={params.n} samples" if params.n > 1 else f"beam_width={params.beam_width} beams"
            raise RequestError(f"{what} cannot be streamed; use generate, or several requests")
        if params.beam_width:
            return [self.new_beam(output, params, rank)]
        samples = []
        for completion in output.outputs:
            seed = None if params.seed is None else params.seed + completion.index
            its_params = params if not completion.index else replace(params, seed=seed)
            samples.append(self._new_request(output, completion, its_params, stream, rank, self._is_endless))
        samples[0].siblings = samples[1:]
        return samples

    def grammars(self, params: SamplingParams) -> "Future[list[Grammar]]":
        """One for each sample, or why there are none: compiling them takes longer than a step."""
        assert params.structured is not None
        if self._tokenizer is None:
            raise RequestError("structured output needs a tokenizer, which the artifact lacks")
        if self._compiler is None:
            self._compiler = GrammarCompiler(self._tokenizer, self._vocab_size, self._eos_token_ids)
        return self._compiler.start(params.structured, params.n)

    def new_beam(self, output: RequestOutput, params: SamplingParams, rank: float) -> Request:
        """A beam of a request; its completion is none of the output's yet."""
        greedy = replace(params, n=1, beam_width=0, temperature=0.0)
        own = replace(greedy, logprobs=CANDIDATES * params.beam_width)
        return self._new_request(output, CompletionOutput(), own, stream=False, rank=rank)

    def _new_request(
        self,
        output: RequestOutput,
        completion: CompletionOutput,
        params: SamplingParams,
        stream: bool,
        rank: float,
        is_endless: bool = False,
    ) -> Request:
        room = self._context_length - len(output.prompt_token_ids)
        if is_endless:
            room = sys.maxsize
        stop_ids = frozenset(params.stop_token_ids or ()) | (frozenset() if params.ignore_eos else self._eos_token_ids)
        max_tokens = min(room, params.max_tokens or room)
        request = Request(output, completion, params, stop_ids, max_tokens, rank)
        if params.logprobs is not None:
            completion.logprobs = []
        request.eos_token_ids = self._eos_token_ids
        if self._tokenizer is not None and (stream or params.stop):
            request.decoder = IncrementalDecoder(self._tokenizer, params.skip_special_tokens)
        request.streams = stream
        return request

    def _check_prompt(self, num_tokens: int) -> None:
        if not num_tokens:
            raise RequestError("the prompt is empty; give it at least one token")
        if num_tokens >= self._context_length:
            raise RequestError(
                f"the prompt has {num_tokens} tokens, which leaves no room for one more in the context of "
                f"{self._context_length}; shorten it or compile with a larger --context-length"
            )

    def _check_params(self, params: SamplingParams) -> None:
        if params.beam_width:
            _check_beams(params)
        if params.stop and self._tokenizer is None:
            raise RequestError(f"stop={params.stop!r} needs a tokenizer, which the artifact lacks; use stop_token_ids")
        for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            outside = [token for token in ids or () if token >= self._vocab_size]
            if outside:
                raise RequestError(f"{name} names token {outside[0]}; token ids go to {self._vocab_size - 1}")


def _check_beams(params: SamplingParams) -> None:
    if params.n > params.beam_width:
        raise RequestError(f"n={params.n} texts of beam_width={params.beam_width} beams; lower n or raise beam_width")
    unused = ("stop", "structured", "logit_bias", "min_tokens", "repetition_penalty", "presence_penalty")
    for name in (*unused, "frequency_penalty", "logprobs"):
        if getattr(params, name) != getattr(SamplingParams(), name):
            raise RequestError(f"{name}={getattr(params, name)!r} is nothing that beam search knows; leave it out")


def _checked_token_ids(prompt: list[int], vocab_size: int) -> list[int]:
    """Token ids as ints; an id outside of the vocabulary would read past the embedding table."""
    try:
        ids = np.asarray(prompt)
    except ValueError as error:
        raise RequestError(f"the prompt is neither a text nor a flat list of token ids: {error}") from error
    if ids.size and (ids.ndim != 1 or ids.dtype.kind not in "iu"):
        raise RequestError(f"the prompt is neither a text nor a flat list of token ids: {prompt!r:.80}")
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.size:
        raise RequestError(f"the prompt has token id {outside[0]}; token ids go from 0 to {vocab_size - 1}")
    checked: list[int] = ids.tolist()
    return checked

"""The engine: requests in, tokens out, one iteration at a time. Runs in one thread, on any executor."""

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from mlcgen.errors import MlcgenError, RequestError
from mlcgen.runtime.executor import Executor, Int32, SamplingExecutor, StepInput
from mlcgen.runtime.host_sampling import HostSampling
from mlcgen.runtime.kv_cache import BlockTable, PagePool
from mlcgen.runtime.outputs import CompletionOutput, FinishReason, RequestMetrics, RequestOutput
from mlcgen.runtime.sampler import Sampled, Sampler, SamplingParams
from mlcgen.runtime.scheduler import Scheduler, Sequence
from mlcgen.runtime.tokenizer import IncrementalDecoder, StopMatcher, Tokenizer

__all__ = ["Engine", "Prompt"]

Prompt = str | list[int]


class Request(Sequence):
    """A sequence with its tokens, its sampler and its text."""

    def __init__(
        self, output: RequestOutput, params: SamplingParams, stop_ids: frozenset[int], max_tokens: int
    ) -> None:
        super().__init__(len(output.prompt_token_ids))
        self.output = output
        self.params = params
        self.stop_ids = stop_ids
        self.max_tokens = max_tokens
        self.tokens = list(output.prompt_token_ids)  # prompt and generated
        self.sampler = Sampler(params, self.tokens, stop_ids)
        self.stops = StopMatcher(params.stop_strings, params.include_stop_str_in_output)
        self.decoder: IncrementalDecoder | None = None  # None: the text is wanted only at the end
        self.streams = False


@dataclass
class _Started:
    """An iteration that the executor works on."""

    batch: list[Request]
    ready: list[Request]  # those whose next token it samples
    is_advanced: bool = False  # whether they count as computed and sampled


class Engine:
    """Continuous batching over an executor.

    What is wrong with one request ends that request alone: its output has `finish_reason` "error" and `error`, and the
    others go on. An exception of the executor itself passes through `step`; a later `step` tries the same work again.
    """

    def __init__(
        self,
        executor: Executor,
        tokenizer: Tokenizer | None,
        eos_token_ids: Iterable[int],
        context_length: int,
        max_batch: int,
    ) -> None:
        self.executor = executor
        self._sampling = executor if isinstance(executor, SamplingExecutor) else HostSampling(executor)
        self.tokenizer = tokenizer
        self.eos_token_ids = frozenset(eos_token_ids)
        self.context_length = context_length
        self.pool = PagePool(executor.num_pages)
        self.scheduler: Scheduler[Request] = Scheduler(
            self.pool, executor.page_size, max_batch, executor.max_tokens_per_step
        )
        self._requests: dict[str, Request] = {}  # unfinished
        self._changed: list[RequestOutput] = []  # for `step` to return
        self._started: _Started | None = None  # the iteration under way between two calls of `step`

    def add_request(
        self, request_id: str, prompt: Prompt, params: SamplingParams | None = None, *, stream: bool = True
    ) -> RequestOutput:
        """Queue a prompt (text, or token ids taken as they are) and return the output that `step` will fill.

        With stream=False `step` returns it only when it has finished, and text is decoded only then. A prompt that
        cannot be served does not raise: its output has the error. Raises RequestError if the id is in use.
        """
        if request_id in self._requests:
            raise RequestError(f"request id {request_id!r} is in use; choose another or abort that request")
        text = prompt if isinstance(prompt, str) else None
        output = RequestOutput(request_id, text, [], [CompletionOutput()], RequestMetrics(time.monotonic()))
        try:
            output.prompt_token_ids = self._token_ids(prompt)
            request = self._new_request(output, params or SamplingParams(), stream)
            self.scheduler.add(request)
            self._requests[request_id] = request
        except MlcgenError as error:
            self._end(output, "error", error)
        return output

    def abort(self, request_id: str) -> bool:
        """End a request and free its pages; the next step returns its output. False if it has ended already."""
        request = self._requests.get(request_id)
        if request is not None:
            self._finish(request, "abort")
        return request is not None

    @property
    def has_unfinished(self) -> bool:
        """Whether another `step` has something to do or to return."""
        return bool(self._requests or self._changed)

    @property
    def num_unfinished(self) -> int:
        """Requests that run or wait."""
        return len(self._requests)

    def step(self) -> list[RequestOutput]:
        """Run one iteration; returns the outputs that changed since the last one, finished ones included.

        Where the executor allows it, the next iteration is begun first: the device has it before it needs it.
        """
        started = None
        try:
            started, self._started = self._started or self._start(None), None
            if started is not None:
                self._started = self._start(started) if self._can_look_ahead(started) else None
                self._complete(started)
            if self._started is not None and not any(map(self._is_alive, self._started.batch)):
                self._sampling.finish()  # nobody waits for it
                self._started = None
        except BaseException:
            self._recover(started)
            raise
        changed, self._changed = self._changed, []
        return changed

    def _start(self, before: "_Started | None") -> "_Started | None":
        """Schedule and begin an iteration, `before` being under way; None if there is nothing to do."""
        if before is not None:
            self._advance(before)
        batch, outgrown = self.scheduler.schedule()
        for request in outgrown:
            self._retire(request, "error", self._outgrown_error(request))
        if not batch:
            return None
        _mark_scheduled(batch)
        ready = [request for request in batch if request.reaches_end]  # in the order of the logit rows
        rows = {request: row for row, request in enumerate(before.ready)} if before is not None else {}
        step_input, sampled_rows = self._step_input(batch, rows)
        self._sampling.start(step_input, [request.sampler for request in ready], sampled_rows)
        return _Started(batch, ready)

    def _can_look_ahead(self, started: "_Started") -> bool:
        """Whether the next iteration needs nothing of this one but the tokens that it samples."""
        return bool(started.ready) and self._sampling.looks_ahead([request.sampler for request in started.ready])

    def _advance(self, started: "_Started") -> None:
        """Count what a started iteration computes and samples as there."""
        self.scheduler.advance(started.batch)
        for request in started.ready:
            request.num_tokens += 1
            request.is_ending = request.num_tokens - len(request.output.prompt_token_ids) >= request.max_tokens
        started.is_advanced = True

    def _complete(self, started: "_Started") -> None:
        sampled = self._sampling.finish()
        if not started.is_advanced:
            self._advance(started)
        self._append(started.ready, sampled)

    def _recover(self, started: "_Started | None") -> None:
        """After a failure: nothing is under way, and what counted as computed before it was is computed anew."""
        if self._started is not None or (started is not None and started.is_advanced):
            self.scheduler.restart()
        self._started = None
        for request in self._requests.values():
            request.num_tokens, request.is_ending = len(request.tokens), False

    def _is_alive(self, request: Request) -> bool:
        return self._requests.get(request.output.request_id) is request

    def _step_input(self, batch: list[Request], rows: Mapping[Request, int]) -> tuple[StepInput, Int32 | None]:
        """The batch, and where its tokens are still being sampled: in which row of the iteration under way."""
        # Lists: a dozen operations on arrays of a few tokens take several times as long.
        input_ids: list[int] = []
        sampled_rows: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        logit_rows: list[int] = []
        query_start = [0]
        for request in batch:
            span = range(request.num_computed, request.num_computed + request.num_scheduled)
            known = request.tokens[span.start : span.stop]
            input_ids += known
            if rows:
                sampled_rows += [-1] * len(known)
                if len(known) < len(span):  # one is not known yet
                    input_ids.append(0)
                    sampled_rows.append(rows[request])
            positions += span
            slots += request.table.slots(span, self.executor.page_size)
            query_start.append(len(positions))
            if request.reaches_end:
                logit_rows.append(len(positions) - 1)
        batch_input = StepInput(
            input_ids=np.array(input_ids, np.int32),
            positions=np.array(positions, np.int32),
            slot_mapping=np.array(slots, np.int32),
            block_table=BlockTable.stack([request.table for request in batch]),
            seq_lens=np.array([request.num_computed + request.num_scheduled for request in batch], np.int32),
            query_start=np.array(query_start, np.int32),
            logit_rows=np.array(logit_rows, np.int32),
        )
        return batch_input, np.array(sampled_rows, np.int32) if rows else None

    def _append(self, requests: list[Request], sampled: Sampled) -> None:
        """One token for each request that is still there."""
        now = time.monotonic()
        columns = zip(requests, sampled.tokens, sampled.maxima, sampled.logprobs, strict=True)
        for request, token, maximum, logprobs in columns:
            if not self._is_alive(request):
                continue
            if math.isfinite(maximum):
                self._append_token(request, token, logprobs, now)
            else:
                self._finish(request, "error", _not_finite_error(request))

    def _append_token(self, request: Request, token: int, logprobs: dict[int, float] | None, now: float) -> None:
        completion = request.output.outputs[0]
        if completion.logprobs is not None and logprobs is not None:
            completion.logprobs.append(logprobs)
        request.tokens.append(token)
        completion.token_ids.append(token)
        if len(completion.token_ids) == 1:
            request.output.metrics.first_token = now
        self._check_end(request, completion, token)

    def _check_end(self, request: Request, completion: CompletionOutput, token: int) -> None:
        if token in request.stop_ids:
            completion.stop_reason = None if token in self.eos_token_ids else token
            return self._finish(request, "stop")
        if request.decoder is not None:
            _extend_text(request, completion, request.decoder.push(token))
        if request.stops.matched is not None:
            completion.stop_reason = request.stops.matched
            self._finish(request, "stop")
        elif len(completion.token_ids) >= request.max_tokens:
            self._finish(request, "length")
        elif request.streams:
            self._changed.append(request.output)

    def _finish(self, request: Request, reason: FinishReason, error: MlcgenError | None = None) -> None:
        self.scheduler.remove(request)
        self._retire(request, reason, error)

    def _retire(self, request: Request, reason: FinishReason, error: MlcgenError | None = None) -> None:
        """Complete the output of a request that the scheduler no longer has."""
        del self._requests[request.output.request_id]
        self._complete_text(request, request.output.outputs[0])
        request.output.metrics.num_preemptions = request.num_preemptions
        self._end(request.output, reason, error)

    def _end(self, output: RequestOutput, reason: FinishReason, error: MlcgenError | None = None) -> None:
        output.error = error
        output.outputs[0].finish_reason = reason
        output.metrics.finished = time.monotonic()
        output.metrics.num_prompt_tokens = len(output.prompt_token_ids)
        output.metrics.num_tokens = len(output.token_ids)
        self._changed.append(output)

    def _complete_text(self, request: Request, completion: CompletionOutput) -> None:
        """Give out the text that was held back, or decode all of it if it was not decoded on the way."""
        if request.decoder is not None:
            if request.stops.matched is None:
                completion.text += request.stops.push(request.decoder.flush()) + request.stops.flush()
        elif self.tokenizer is not None:
            stopped_by_token = completion.token_ids[-1:] and completion.token_ids[-1] in request.stop_ids
            shown = completion.token_ids[:-1] if stopped_by_token else completion.token_ids
            completion.text = self.tokenizer.decode(shown, request.params.skip_special_tokens)

    def _token_ids(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return _checked_token_ids(prompt, self.executor.vocab_size)
        if self.tokenizer is None:
            raise RequestError("the artifact has no tokenizer; give the prompt as token ids")
        return self.tokenizer.encode(prompt)

    def _new_request(self, output: RequestOutput, params: SamplingParams, stream: bool) -> Request:
        self._check_prompt(len(output.prompt_token_ids))
        self._check_params(params)
        room = self.context_length - len(output.prompt_token_ids)
        stop_ids = frozenset(params.stop_token_ids or ()) | (frozenset() if params.ignore_eos else self.eos_token_ids)
        request = Request(output, params, stop_ids, min(room, params.max_tokens or room))
        if params.logprobs is not None:
            output.outputs[0].logprobs = []
        if self.tokenizer is not None and (stream or params.stop):
            request.decoder = IncrementalDecoder(self.tokenizer, params.skip_special_tokens)
        request.streams = stream
        return request

    def _check_prompt(self, num_tokens: int) -> None:
        if not num_tokens:
            raise RequestError("the prompt is empty; give it at least one token")
        if num_tokens >= self.context_length:
            raise RequestError(
                f"the prompt has {num_tokens} tokens, which leaves no room for one more in the context of "
                f"{self.context_length}; shorten it or compile with a larger --context-length"
            )

    def _check_params(self, params: SamplingParams) -> None:
        if params.stop and self.tokenizer is None:
            raise RequestError(f"stop={params.stop!r} needs a tokenizer, which the artifact lacks; use stop_token_ids")
        for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            outside = [token for token in ids or () if token >= self.executor.vocab_size]
            if outside:
                raise RequestError(f"{name} names token {outside[0]}; token ids go to {self.executor.vocab_size - 1}")

    def _outgrown_error(self, request: Request) -> RequestError:
        return RequestError(
            f"the sequence has grown to {request.num_tokens} tokens but the KV cache holds {self.scheduler.capacity}; "
            "lower max_tokens or raise num_pages"
        )


def _mark_scheduled(batch: list[Request]) -> None:
    now = time.monotonic()
    for request in batch:
        if request.output.metrics.scheduled is None:
            request.output.metrics.scheduled = now


def _extend_text(request: Request, completion: CompletionOutput, text: str) -> None:
    may_stop = len(completion.token_ids) >= request.params.min_tokens
    completion.text += request.stops.push(text) if may_stop else text


def _not_finite_error(request: Request) -> RequestError:
    return RequestError(
        f"the model gave NaN or infinite logits after {request.num_tokens} tokens; "
        "check the artifact with `mlcgen verify`"
    )


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

"""The engine: requests in, tokens out, one iteration at a time. Runs in one thread, on any executor."""

import heapq
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from mlcgen.errors import MlcgenError, RequestError
from mlcgen.runtime.adapters import Adapter, Adapters
from mlcgen.runtime.executor import Executor, SamplingExecutor
from mlcgen.runtime.host_pages import HostPages
from mlcgen.runtime.host_sampling import HostSampling
from mlcgen.runtime.kv_cache import PagePool
from mlcgen.runtime.options import EngineOptions
from mlcgen.runtime.outputs import CompletionOutput, FinishReason, RequestMetrics, RequestOutput
from mlcgen.runtime.peft import read_adapter
from mlcgen.runtime.request import Intake, Prompt, Request
from mlcgen.runtime.sampler import Sampled, SamplingParams
from mlcgen.runtime.scheduler import Scheduler, Transfer
from mlcgen.runtime.speculation import MAX_ROWS, StepCost
from mlcgen.runtime.stats import EngineStats, Rates
from mlcgen.runtime.step_input import step_input
from mlcgen.runtime.tokenizer import Tokenizer

__all__ = ["Engine", "Prompt"]

PRIORITY_SECONDS = 60.0  # a level of priority is worth so much waiting
SAVED_PER_PAGE = 8  # pages on the host for each on the device, at most


@dataclass
class _Started:
    """An iteration that the executor works on."""

    batch: list[Request]
    ready: list[Request]  # those whose next token it samples
    sampling: SamplingExecutor | HostSampling  # who samples
    rows: list[int]  # the first row of logits of each that is ready; its drafts have the next ones
    drafts: dict[Request, list[int]] = field(default_factory=dict)
    num_tokens: int = 0
    begun: float = 0.0
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
        options: EngineOptions | None = None,
    ) -> None:
        self.executor = executor
        self.options = options = options or EngineOptions()
        self.adapters = Adapters(executor)
        self._host_sampling = HostSampling(executor)
        self._sampling = executor if isinstance(executor, SamplingExecutor) else self._host_sampling
        self.tokenizer = tokenizer
        self.eos_token_ids = frozenset(eos_token_ids)
        self.context_length = context_length
        self.pool = PagePool(executor.num_pages)
        layers, layer_bytes = executor.page_shape
        # More would only be lists of numbers: what is preempted has been in the pages.
        num_saved = min(options.swap_bytes // (layers * layer_bytes), SAVED_PER_PAGE * executor.num_pages)
        self._host_pages = HostPages(num_saved, layers, layer_bytes, options.swap_file)
        self.scheduler: Scheduler[Request] = Scheduler(
            self.pool,
            executor.page_size,
            max_batch,
            min(options.tokens_per_step or executor.max_tokens_per_step, executor.max_tokens_per_step),
            prefix_cache=options.prefix_cache,
            host_pool=PagePool(num_saved),
            prefers_saving=self._prefers_saving,
        )
        self._intake = Intake(tokenizer, executor.vocab_size, self.eos_token_ids, context_length)
        self._requests: dict[str, list[Request]] = {}  # samples that are unfinished
        self._deadlines: list[tuple[float, str]] = []  # a heap
        self._stats = EngineStats()
        self._rates = Rates()
        self._step_cost = StepCost()
        self._last_finish = 0.0  # of an iteration
        self._changed: list[RequestOutput] = []  # for `step` to return
        self._started: _Started | None = None  # the iteration under way between two calls of `step`

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        stream: bool = True,
        priority: int = 0,
        deadline: float | None = None,
        adapter: str | None = None,
    ) -> RequestOutput:
        """Queue a prompt (text, or token ids taken as they are) and return the output that `step` will fill.

        With stream=False `step` returns it only when it has finished, and text is decoded only then. A prompt that
        cannot be served does not raise: its output has the error. priority: a request of a higher one is served as if
        it had come a minute earlier for each level, so that none waits for ever. deadline: seconds from now after which
        nobody wants it any more; it then ends with finish_reason "timeout", and before that, one due within a minute is
        served as if it had come earlier. adapter: one that is loaded. Raises RequestError if the id is in use.
        """
        if request_id in self._requests:
            raise RequestError(f"request id {request_id!r} is in use; choose another or abort that request")
        now, params = time.monotonic(), params or SamplingParams()
        text = prompt if isinstance(prompt, str) else None
        completions = [CompletionOutput(index) for index in range(params.n)]
        output = RequestOutput(request_id, text, [], completions, RequestMetrics(now))
        due = math.inf if deadline is None else now + deadline
        rank = min(now, due - PRIORITY_SECONDS) - priority * PRIORITY_SECONDS
        try:
            output.prompt_token_ids = self._intake.token_ids(prompt)
            requests = self._intake.new_requests(output, params, stream, rank)
            if adapter is not None:
                _give_adapter(requests, self.adapters.find(adapter))
            self.scheduler.add(requests[0])
        except MlcgenError as error:
            for completion in completions:
                self._end(output, completion, "error", error)
            return output
        requests[0].is_queued = True
        for request in requests:
            request.due = due
        self._requests[request_id] = requests
        if deadline is not None:
            heapq.heappush(self._deadlines, (due, request_id))
        return output

    def load_adapter(self, name: str, path: str | Path) -> None:
        """Load a LoRA adapter, as PEFT saves it, for requests to name.

        Raises CheckpointError or UnsupportedError for what cannot be loaded (runtime/peft.py), RequestError if the name
        is in use, or all slots are.
        """
        self.adapters.load(name, read_adapter(path, self.adapters.layout))

    def unload_adapter(self, name: str) -> None:
        """Make room for another. Raises RequestError if there is no such adapter, or unfinished requests use it."""
        slot = self.adapters.find(name).slot
        users = [id for id, requests in self._requests.items() if requests[0].adapter_slot == slot]
        if users:
            raise RequestError(
                f"{len(users)} unfinished requests use adapter {name!r}; wait for them, or abort {users[0]!r:.60}"
            )
        self.adapters.unload(name)

    def abort(self, request_id: str) -> bool:
        """End a request and free its pages; the next step returns its output. False if it has ended already."""
        return self._finish_all(request_id, "abort")

    def stats(self) -> EngineStats:
        """What the engine has done so far, and what it holds now."""
        pool, host_pool = self.pool, self.scheduler.host_pool
        return replace(
            self._stats,
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            num_pages=pool.num_pages,
            num_free_pages=pool.num_free,
            num_idle_pages=pool.num_idle,
            num_saved_pages=host_pool.num_pages - host_pool.num_free,
            num_prompt_tokens=self.scheduler.num_prompt_tokens,
            num_cached_tokens=self.scheduler.num_cached_tokens,
        )

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
        self._end_overdue()
        try:
            started, self._started = self._started or self._start(None), None
            if started is not None:
                self._started = self._start(started) if self._can_look_ahead(started) else None
                self._complete(started)
            if self._started is not None and not any(map(self._is_alive, self._started.batch)):
                self._started.sampling.finish()  # nobody waits for it
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
        else:
            self._draft()
        begun = time.perf_counter()
        step = self.scheduler.schedule()
        self._stats.policy_seconds += time.perf_counter() - begun
        for request in step.outgrown:
            self._retire(request, "error", self._outgrown_error(request))
        if not step.batch:
            return None
        _mark_scheduled(step.batch)
        self._transfer(step.transfers)
        return self._begin(step.batch, before)

    def _begin(self, batch: list[Request], before: "_Started | None") -> "_Started":
        """Have the executor start the batch."""
        ready = [request for request in batch if request.reaches_end]  # in the order of the logit rows
        before_rows = dict(zip(before.ready, before.rows, strict=True)) if before is not None else {}
        batch_input, sampled_rows, rows = step_input(batch, before_rows, self.executor.page_size)
        drafts = {request: request.draft for request in ready if request.draft}
        samplers = [request.sampler for request in ready]
        started = _Started(batch, ready, self._sampling, rows, drafts, len(batch_input.input_ids), time.perf_counter())
        if not drafts:
            self._sampling.start(batch_input, samplers, sampled_rows)
        elif all(sampler.is_argmax and sampler.params.logprobs is None for sampler in samplers):
            each_row = [request.sampler for request in ready for _ in range(1 + len(request.draft))]
            self._sampling.start(batch_input, each_row)
        else:  # which row is the last one that counts is known only when those before it were sampled
            started.sampling = self._host_sampling
            self._host_sampling.start_drafts(batch_input, samplers, [request.draft for request in ready])
        return started

    def _draft(self) -> None:
        """Guess what those that decode will say next."""
        running = self.scheduler.running
        spare = MAX_ROWS - len(running)
        for request in running:
            # The last token that is generated needs no keys and values, and is not guessed either.
            most = min(spare, request.max_tokens - len(request.completion.token_ids) - 1)
            request.draft = self._guess(request, most) if request.num_uncomputed == 1 and most > 0 else []
            spare -= len(request.draft)

    def _guess(self, request: Request, most: int) -> list[int]:
        """The tokens that the grammar leaves no choice about, or a guess."""
        grammar = request.sampler.grammar
        if grammar is not None:
            return grammar.forced()[:most]
        if self.options.speculation == "off":
            return []
        cost = self._step_cost.of_another(len(self.scheduler.running))
        length = request.acceptance.length(min(self.options.max_draft, most), cost)
        return request.drafter.propose(request.tokens, length) if length else []

    def _transfer(self, transfers: list[Transfer]) -> None:
        """Copy pages on the device, to the host and back."""
        if not transfers:
            return
        begun, num_moved = time.perf_counter(), 0
        for transfer in transfers:
            if transfer.kind == "copy":
                self.executor.copy_page(transfer.source, transfer.to)
            elif transfer.kind == "save":
                self.executor.read_page(transfer.source, self._host_pages[transfer.to])
                self._stats.num_saved += 1
                num_moved += 1
            else:
                self.executor.write_page(transfer.to, self._host_pages[transfer.source])
                self._stats.num_loaded += 1
                num_moved += 1
        if num_moved:
            self._rates.moved(num_moved, time.perf_counter() - begun)

    def _prefers_saving(self, request: Request) -> bool:
        """Whether a sequence's pages are sooner saved and brought back than computed anew."""
        return 2 * len(request.table) * self._rates.page_seconds < request.num_computed * self._rates.token_seconds

    def _can_look_ahead(self, started: "_Started") -> bool:
        """Whether the next iteration needs nothing of this one but the tokens that it samples."""
        if started.drafts or self.options.speculation != "off" or any(request.siblings for request in started.ready):
            return False
        return bool(started.ready) and self._sampling.looks_ahead([request.sampler for request in started.ready])

    def _advance(self, started: "_Started") -> None:
        """Count what a started iteration computes and samples as there."""
        self.scheduler.advance(started.batch)
        for request in started.ready:
            request.num_tokens += 1
            request.is_ending = request.num_tokens - len(request.output.prompt_token_ids) >= request.max_tokens
        started.is_advanced = True

    def _complete(self, started: "_Started") -> None:
        sampled = started.sampling.finish()
        now = time.perf_counter()
        self._measure(started, now - max(started.begun, self._last_finish))  # the device did the one before first
        self._last_finish = now
        if not started.is_advanced:
            self._advance(started)
        self._stats.num_steps += 1
        self._append(started, sampled)

    def _measure(self, started: "_Started", seconds: float) -> None:
        if started.num_tokens == len(started.batch) + sum(map(len, started.drafts.values())):
            self._step_cost.record(started.num_tokens, seconds)
        else:
            self._rates.computed(started.num_tokens, seconds)

    def _recover(self, started: "_Started | None") -> None:
        """After a failure: nothing is under way, and what counted as computed before it was is computed anew."""
        if self._started is not None or (started is not None and started.is_advanced):
            self.scheduler.restart()
        self._started = None
        for requests in self._requests.values():
            for request in requests:
                request.num_tokens, request.is_ending = len(request.tokens), False

    def _is_alive(self, request: Request) -> bool:
        return request.completion.finish_reason is None

    def _append(self, started: _Started, sampled: Sampled) -> None:
        """A token for each request that is still there, and those of its draft that were right."""
        now = time.monotonic()
        for request, row in zip(started.ready, started.rows, strict=True):
            if not self._is_alive(request):
                continue
            self._fork_siblings(request)
            draft = started.drafts.get(request, [])
            accepted, goes_on = 0, True
            while goes_on:
                is_right = accepted < len(draft) and sampled.tokens[row + accepted] == draft[accepted]
                goes_on = self._append_row(request, sampled, row + accepted, now) and is_right
                accepted += is_right
            grammar = request.sampler.grammar  # which has accepted all of these tokens
            if grammar is not None and grammar.is_finished and self._is_alive(request):
                self._finish(request, "stop")
            if draft:
                self._count_draft(request, len(draft), accepted)

    def _count_draft(self, request: Request, drafted: int, accepted: int) -> None:
        metrics = request.output.metrics
        for counts in (metrics, self._stats):
            counts.num_drafted += drafted
            counts.num_accepted += accepted
        if request.sampler.grammar is None:
            request.acceptance.record(drafted, accepted)
        if self._is_alive(request):
            request.num_tokens = len(request.tokens)
            self.scheduler.accept(request, accepted)

    def _append_row(self, request: Request, sampled: Sampled, row: int, now: float) -> bool:
        """The token of a row of logits. Whether the request goes on."""
        if request.sampler.error is not None:
            self._finish(request, "error", request.sampler.error)
        elif math.isfinite(sampled.maxima[row]):
            self._append_token(request, sampled.tokens[row], sampled.logprobs[row], now)
        else:
            self._finish(request, "error", _not_finite_error(request))
        return self._is_alive(request)

    def _fork_siblings(self, request: Request) -> None:
        """The prompt is in the cache: the other samples can begin."""
        siblings, request.siblings = request.siblings, []
        for sibling in siblings:
            if self._is_alive(sibling):
                self.scheduler.fork(sibling, request)
                sibling.is_queued = True

    def _append_token(self, request: Request, token: int, logprobs: dict[int, float] | None, now: float) -> None:
        completion = request.completion
        self._stats.num_generated_tokens += 1
        if completion.logprobs is not None and logprobs is not None:
            completion.logprobs.append(logprobs)
        request.tokens.append(token)
        completion.token_ids.append(token)
        if request.output.metrics.first_token is None:
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

    def _end_overdue(self) -> None:
        while self._deadlines and self._deadlines[0][0] <= time.monotonic():
            due, request_id = heapq.heappop(self._deadlines)
            requests = self._requests.get(request_id)
            if requests and any(request.due == due for request in requests):  # the id may be another request's by now
                self._finish_all(request_id, "timeout")

    def _finish_all(self, request_id: str, reason: FinishReason) -> bool:
        """End all samples of a request; False if there is no such request."""
        requests = list(self._requests.get(request_id, ()))
        for request in requests:
            if self._is_alive(request):  # the first one ends those that wait for it
                self._finish(request, reason)
        return bool(requests)

    def _finish(self, request: Request, reason: FinishReason, error: MlcgenError | None = None) -> None:
        if request.is_queued:
            self.scheduler.remove(request)
        self._retire(request, reason, error)

    def _retire(self, request: Request, reason: FinishReason, error: MlcgenError | None = None) -> None:
        """Complete the output of a sample that the scheduler does not have (any more)."""
        request_id = request.output.request_id
        self._requests[request_id].remove(request)
        if not self._requests[request_id]:
            del self._requests[request_id]
        self._complete_text(request, request.completion)
        metrics = request.output.metrics
        metrics.num_preemptions += request.num_preemptions
        metrics.num_cached_tokens = max(metrics.num_cached_tokens, request.num_cached)
        self._stats.num_preemptions += request.num_preemptions
        self._end(request.output, request.completion, reason, error)
        for sibling in request.siblings:  # they would wait for its prompt for ever
            self._finish(sibling, reason, error)

    def _end(
        self,
        output: RequestOutput,
        completion: CompletionOutput,
        reason: FinishReason,
        error: MlcgenError | None = None,
    ) -> None:
        output.error = output.error or error
        completion.finish_reason = reason
        if output.finished:
            output.metrics.finished = time.monotonic()
            output.metrics.num_prompt_tokens = len(output.prompt_token_ids)
            output.metrics.num_tokens = sum(len(each.token_ids) for each in output.outputs)
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

    def _outgrown_error(self, request: Request) -> RequestError:
        return RequestError(
            f"the sequence has grown to {request.num_tokens} tokens but the KV cache holds {self.scheduler.capacity}; "
            "lower max_tokens or raise num_pages"
        )


def _give_adapter(requests: list[Request], adapter: Adapter) -> None:
    for request in requests:
        request.adapter_slot, request.cache_root = adapter.slot, adapter.cache_root


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

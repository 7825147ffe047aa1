"""The engine: requests in, tokens out, one iteration at a time. Runs in one thread, on any executor."""

import heapq
import math
import time
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from mlcgen.errors import DeviceError, MlcgenError, RequestError
from mlcgen.runtime.adapters import Adapters
from mlcgen.runtime.beam_search import BeamSearch
from mlcgen.runtime.check_numerics import not_finite_error
from mlcgen.runtime.draft import ROOT, Draft
from mlcgen.runtime.executor import Executor, SamplingExecutor
from mlcgen.runtime.grammar import Grammar
from mlcgen.runtime.heavy_hitters import KeyLayout
from mlcgen.runtime.host_sampling import HostSampling
from mlcgen.runtime.iteration import Iteration, StepError, begin, concerning
from mlcgen.runtime.kv_cache import PagePool
from mlcgen.runtime.lookahead import LookaheadDrafter
from mlcgen.runtime.ngram import NgramDrafter
from mlcgen.runtime.options import EngineOptions
from mlcgen.runtime.outputs import CompletionOutput, FinishReason, RequestMetrics, RequestOutput
from mlcgen.runtime.page_mover import PageMover
from mlcgen.runtime.peft import read_adapter
from mlcgen.runtime.prefix_cache import new_roots
from mlcgen.runtime.request import Intake, Prompt, Request
from mlcgen.runtime.sampler import NO_TOKEN, Sampled, SamplingParams
from mlcgen.runtime.scheduler import Scheduler
from mlcgen.runtime.speculation import Drafter, Speculation
from mlcgen.runtime.stats import EngineStats
from mlcgen.runtime.text_window import TextWindow
from mlcgen.runtime.tokenizer import Tokenizer

__all__ = ["Engine", "Prompt"]

PRIORITY_SECONDS = 60.0  # a level of priority is worth so much waiting
PATIENCE_SECONDS = 0.01  # of a step that has nothing to do but to wait for a grammar: who drives it has other requests


class Engine:
    """Continuous batching over an executor.

    What is wrong with one request ends that request alone: its output has `finish_reason` "error" and `error`, and the
    others go on. So do an exception of the executor and the requests of that step.
    """

    def __init__(
        self,
        executor: Executor,
        tokenizer: Tokenizer | None,
        eos_token_ids: Iterable[int],
        context_length: int,
        max_batch: int,
        options: EngineOptions | None = None,
        drafter: Drafter | None = None,
        model_window: int = 0,
        keys: KeyLayout | None = None,
    ) -> None:
        """drafter: who guesses tokens; None: nobody, or who `options` names. model_window: last tokens that the model
        sees from a token; 0: all. keys: how pages hold them, for those that move there."""
        self.executor = executor
        self.options = options = options or EngineOptions()
        roots = new_roots()
        self.adapters = Adapters(executor, roots)
        self._host_sampling = HostSampling(executor)
        self._sampling = executor if isinstance(executor, SamplingExecutor) else self._host_sampling
        self.tokenizer = tokenizer
        self.eos_token_ids = frozenset(eos_token_ids)
        self.context_length = context_length
        self.pool = PagePool(executor.num_pages)
        self._mover = PageMover(executor, options)
        self.scheduler: Scheduler[Request] = Scheduler(
            self.pool,
            executor.page_size,
            max_batch,
            min(options.tokens_per_step or executor.max_tokens_per_step, executor.max_tokens_per_step),
            prefix_cache=options.prefix_cache,
            chunked_prefill=options.chunked_prefill,
            window=model_window,
            host_pool=PagePool(self._mover.num_host_pages),
            prefers_saving=self._mover.prefers_saving,
        )
        if options.window is not None and options.window > context_length:
            raise RequestError(
                f"window={options.window} is beyond the artifact's context of {context_length}; lower it"
            )
        self._window = None if options.window is None else TextWindow(options, executor, self.scheduler, keys, roots)
        is_endless = self._window is not None
        self._intake = Intake(tokenizer, executor.vocab_size, self.eos_token_ids, context_length, is_endless)
        self._limit = options.window or context_length  # tokens of a sequence
        self._requests: dict[str, list[Request]] = {}  # samples that are unfinished
        self._compiling: dict[str, Future[list[Grammar]]] = {}  # for requests that wait for theirs
        self._deadlines: list[tuple[float, str]] = []  # a heap
        self._stats = EngineStats()
        if options.speculation == "ngram":
            drafter = drafter or NgramDrafter(options.branches)
        elif options.speculation == "lookahead":
            drafter = drafter or LookaheadDrafter(options.branches)
        self._speculation = Speculation(drafter, options.max_draft, options.branches, self._limit)
        if options.branches > 1 and drafter is not None and not executor.supports_trees:
            raise RequestError(f"branches={options.branches}: this artifact knows no trees; compile the model again")
        self._last_finish = 0.0  # of an iteration
        self._is_moving = False  # pages, for an iteration that is about to begin
        self._changed: list[RequestOutput] = []  # for `step` to return
        self._started: Iteration | None = None  # the iteration under way between two calls of `step`

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
            its_adapter = None if adapter is None else self.adapters.find(adapter)
            requests = self._intake.new_requests(output, params, stream, rank, due, its_adapter)
            if params.structured is not None:
                self._compiling[request_id] = self._intake.grammars(params)
            else:
                self._queue(requests[0])
        except MlcgenError as error:
            for completion in completions:
                output.end(completion, "error", error)
            self._changed.append(output)
            return output
        if params.beam_width:
            new_beam = partial(self._intake.new_beam, output, params, rank)
            requests[0].search = BeamSearch(requests, params, self.scheduler, new_beam)
        self._requests[request_id] = requests
        if deadline is not None:
            heapq.heappush(self._deadlines, (due, request_id))
        return output

    def _queue(self, request: Request) -> None:
        self.scheduler.add(request)
        request.is_queued = True

    def _queue_compiled(self) -> None:
        """Queue requests whose grammars are there by now; a while is waited for one where nothing else is to do."""
        if self._compiling and not (self._changed or self._started or self.scheduler.has_work):
            wait(self._compiling.values(), PATIENCE_SECONDS, FIRST_COMPLETED)
        for request_id in [id for id, grammars in self._compiling.items() if grammars.done()]:
            grammars, requests = self._compiling.pop(request_id), self._requests[request_id]
            try:
                for request, grammar in zip(requests, grammars.result(), strict=True):
                    request.constrain(grammar)
                self._queue(requests[0])
            except MlcgenError as error:
                self._finish(requests[0], "error", error)

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
            num_saved=self._mover.num_saved,
            num_loaded=self._mover.num_loaded,
            swap_seconds=self._mover.seconds,
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting) + len(self._compiling),
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
        self._queue_compiled()
        try:
            started, self._started = self._started or self._start(None), None
            if started is not None:
                self._started = self._start(started) if self._can_look_ahead(started) else None
                self._complete(started)
            if self._started is not None and not any(map(self._is_alive, self._started.batch)):
                self._started.sampling.finish()  # nobody waits for it
                self._started = None
        except StepError as failure:
            self._recover(started)
            self._fail(failure)
        except BaseException:
            self._recover(started)
            raise
        changed, self._changed = self._changed, []
        return changed

    def _start(self, before: Iteration | None) -> Iteration | None:
        """Schedule and begin an iteration, `before` being under way; None if there is nothing to do."""
        if before is not None:
            self._advance(before)
        else:
            self._move_windows()
            self._speculation.draft(self.scheduler.running)
        begun = time.perf_counter()
        step = self.scheduler.schedule()
        self._stats.policy_seconds += time.perf_counter() - begun
        for request in step.outgrown:
            request.is_queued = False
        for request in step.outgrown:
            if self._is_alive(request):
                self._finish(request, "error", self.scheduler.outgrown_error(request))
        batch = list(filter(self._is_alive, step.batch))  # other beams of one that has outgrown are not
        with concerning(batch):
            self._is_moving = bool(step.transfers)
            self._mover.move(step.transfers)
            self._is_moving = False
            return begin(batch, before, self._sampling, self._host_sampling) if batch else None

    def _move_windows(self) -> None:
        """Have those that fill their window go on with a part of it."""
        if self._window is None:
            return
        for request in filter(self._window.is_full, [*self.scheduler.running, *self.scheduler.waiting]):
            self._speculation.forget(request)
            with concerning([request]):
                self._is_moving = True
                self._window.move(request)
                self._is_moving = False

    def _can_look_ahead(self, started: Iteration) -> bool:
        """Whether the next iteration needs nothing of this one but the tokens that it samples."""
        if self.options.window is not None and any(r.num_tokens + 1 >= self._limit for r in started.batch):
            return False
        if self.options.check_numerics:  # tokens that the host does not know yet are not in a step's input
            return False
        if (
            started.drafts
            or self._speculation.drafter is not None
            or any(request.siblings or request.search for request in started.ready)
        ):
            return False
        return bool(started.ready) and self._sampling.looks_ahead([request.sampler for request in started.ready])

    def _advance(self, started: Iteration) -> None:
        """Count what a started iteration computes and samples as there."""
        self.scheduler.advance(started.batch)
        for request in started.ready:
            request.num_tokens += 1
            request.is_ending = request.num_tokens - request.num_before >= request.max_tokens
        started.is_advanced = True

    def _complete(self, started: Iteration) -> None:
        started.is_finished = True
        with concerning(started.batch):
            sampled = started.sampling.finish()
        now = time.perf_counter()
        self._measure(started, now - max(started.begun, self._last_finish))  # the device did the one before first
        self._last_finish = now
        if not started.is_advanced:
            self._advance(started)
        self._stats.num_steps += 1
        self._append(started, sampled)

    def _measure(self, started: Iteration, seconds: float) -> None:
        num_tokens = len(started.input.input_ids)
        if started.is_decode:
            self._speculation.measured(num_tokens, seconds)
        else:
            self._mover.rates.computed(num_tokens, seconds)

    def _recover(self, started: Iteration | None) -> None:
        """After a failure: nothing is under way, and what counted as computed before it was is computed anew."""
        if self._is_moving or self._started is not None or (started is not None and started.is_advanced):
            self.scheduler.restart()
        self._is_moving = False
        for each in (started, self._started):
            if each is not None and not each.is_finished:
                with suppress(Exception):
                    each.sampling.finish()
        self._started = None
        for requests in self._requests.values():
            for request in requests:
                request.num_tokens, request.is_ending = len(request.tokens), False

    def _fail(self, failure: StepError) -> None:
        error = DeviceError(f"the device failed in the step that had this request: {failure.__cause__}")
        error.__cause__ = failure.__cause__
        for request in failure.batch:
            if self._is_alive(request):
                self._finish(request, "error", error)

    def _is_alive(self, request: Request) -> bool:
        return request.completion.finish_reason is None

    def _append(self, started: Iteration, sampled: Sampled) -> None:
        """A token for each request that is still there, and those of its draft that were right."""
        now = time.monotonic()
        for request, row in zip(started.ready, started.rows, strict=True):
            if not self._is_alive(request):
                continue
            self._fork_siblings(request)
            draft = started.drafts.get(request, _NO_DRAFT)
            right: list[int] = []  # nodes
            node: int | None = ROOT
            while node is not None and sampled.tokens[row + 1 + node] != NO_TOKEN:
                sampled.tokens[row + 1 + node] = token = draft.chosen(node, sampled.tokens[row + 1 + node])
                goes_on = self._append_row(started, request, sampled, row + 1 + node, now)
                node = draft.child(node, token) if goes_on else None
                right += [] if node is None else [node]
            grammar = request.sampler.grammar  # which has accepted all of these tokens
            if grammar is not None and grammar.is_finished and self._is_alive(request):
                self._finish(request, "stop")
            if draft:
                self._speculation.judge(request, draft, len(right), sampled.tokens[row : row + 1 + len(draft)])
                self._count_draft(request, len(draft), right)

    def _count_draft(self, request: Request, num_drafted: int, right: list[int]) -> None:
        for counts in (request.output.metrics, self._stats):
            counts.num_drafted += num_drafted
            counts.num_accepted += len(right)
        if self._is_alive(request):
            request.num_tokens = len(request.tokens)
            in_place = next((i for i, node in enumerate(right) if node != i), len(right))
            self.scheduler.accept(request, in_place)

    def _append_row(self, started: Iteration, request: Request, sampled: Sampled, row: int, now: float) -> bool:
        """The token of a row of logits. Whether the request goes on."""
        if request.sampler.error is not None:
            self._finish(request, "error", request.sampler.error)
        elif math.isfinite(sampled.maxima[row]):
            self._append_token(request, sampled.tokens[row], sampled.logprobs[row], now)
        else:
            checked = self.executor if self.options.check_numerics else None
            self._finish(request, "error", not_finite_error(request.num_tokens, checked, started.input))
        return self._is_alive(request)

    def _fork_siblings(self, request: Request) -> None:
        """The prompt is in the cache: the other samples can begin."""
        siblings, request.siblings = request.siblings, []
        for sibling in siblings:
            if self._is_alive(sibling):
                self.scheduler.fork(sibling, request)
                sibling.is_queued = True

    def _append_token(self, request: Request, token: int, logprobs: dict[int, float] | None, now: float) -> None:
        self._stats.num_generated_tokens += 1
        if request.output.metrics.first_token is None:
            request.output.metrics.first_token = now
        try:
            reason = request.append(token, logprobs)
        except RequestError as error:
            return self._finish(request, "error", error)
        if reason is not None:
            self._finish(request, reason)
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
        """End one sample of a request, or all beams of its search."""
        request_id, output, metrics = request.output.request_id, request.output, request.output.metrics
        if request.search is not None:
            del self._requests[request_id]
            request.search.finish(reason, error, self.tokenizer)
            return self._changed.append(output)
        if request.is_queued:
            self.scheduler.remove(request)
        self._speculation.forget(request)
        self._requests[request_id].remove(request)
        if not self._requests[request_id]:
            del self._requests[request_id]
            if grammars := self._compiling.pop(request_id, None):
                grammars.cancel()
        request.complete_text(request.completion, self.tokenizer)
        metrics.num_preemptions += request.num_preemptions
        metrics.num_cached_tokens = max(metrics.num_cached_tokens, request.num_cached)
        self._stats.num_preemptions += request.num_preemptions
        output.end(request.completion, reason, error)
        if output.finished:
            self._changed.append(output)
        for sibling in request.siblings:  # they would wait for its prompt for ever
            self._finish(sibling, reason, error)


_NO_DRAFT = Draft()

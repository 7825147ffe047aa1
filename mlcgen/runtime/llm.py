"""The two ways to use an artifact from Python: `LLM` in the caller's thread, `AsyncEngine` in one of its own."""

import asyncio
import itertools
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, cast

from mlcgen.errors import MlcgenError, RequestError
from mlcgen.runtime.engine import Engine, Prompt
from mlcgen.runtime.options import EngineOptions
from mlcgen.runtime.outputs import Delta, DeltaCursor, RequestOutput
from mlcgen.runtime.peft import read_adapter
from mlcgen.runtime.sampler import SamplingParams
from mlcgen.runtime.tokenizer import Message, Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from Python 3.11 on

__all__ = ["LLM", "AsyncEngine", "Serving", "load_engine"]

T = TypeVar("T")


def load_engine(
    path: str | Path,
    target: str = "auto",
    num_pages: int | None = None,
    max_batch: int | None = None,
    num_threads: int | None = None,
    gpu_memory_utilization: float = 0.9,
    options: EngineOptions | None = None,
    weight_memory: int | str | None = None,
) -> Engine:
    """An engine on the artifact at `path`. Arguments and errors as in `LLM`."""
    from mlcgen.runtime.draft_model import load_drafter
    from mlcgen.runtime.load import load_executor  # late: it brings the device's libraries

    options = options or EngineOptions()

    model = load_executor(
        path,
        target=target,
        num_pages=num_pages,
        max_batch=max_batch,
        num_threads=num_threads,
        gpu_memory_utilization=gpu_memory_utilization,
        weight_memory=weight_memory,
    )
    tokenizer = Tokenizer(model.tokenizer_path, model.tokenizer_config) if model.tokenizer_path else None
    drafter = None
    if options.draft_model is not None:
        drafter = load_drafter(options.draft_model, model, target, num_threads, options.branches, options.trust)
    sizes = model.context_length, model.max_batch
    return Engine(model.executor, tokenizer, model.eos_token_ids, *sizes, options, drafter, model.window, model.keys)


class LLM:
    """An artifact, ready to generate. For one thread: use it from the thread that made it.

    path: an artifact directory. target: "auto" or a name as in `mlcgen run --target`. num_pages: size of the KV cache
    (None: what memory allows). max_batch: sequences per step (None: as compiled). num_threads: CPU threads (None: all
    cores). gpu_memory_utilization: share of a GPU's memory that weights, workspace and KV cache may take together.
    options: how the engine serves. weight_memory: bytes ("4GiB" too) that weights may take of the
    device's memory, or of a CPU's; layers that do not fit are streamed in each step. None: all are there.
    Raises ArtifactError or TargetError if the artifact cannot run here, DeviceError where memory is short, RequestError
    for an option that cannot be.
    """

    def __init__(
        self,
        path: str | Path,
        target: str = "auto",
        num_pages: int | None = None,
        max_batch: int | None = None,
        num_threads: int | None = None,
        gpu_memory_utilization: float = 0.9,
        options: EngineOptions | None = None,
        weight_memory: int | str | None = None,
    ) -> None:
        self.engine = load_engine(
            path, target, num_pages, max_batch, num_threads, gpu_memory_utilization, options, weight_memory
        )
        self._ids = itertools.count()

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises RequestError if the artifact has none."""
        if self.engine.tokenizer is None:
            raise RequestError("the artifact has no tokenizer; give prompts as token ids")
        return self.engine.tokenizer

    def generate(
        self,
        prompts: Prompt | list[str] | list[list[int]],
        params: SamplingParams | list[SamplingParams] | None = None,
        adapter: str | list[str | None] | None = None,
    ) -> list[RequestOutput]:
        """Complete one prompt or several (texts or token ids), batched; outputs in the order of the prompts.

        adapter: the name of one that is loaded, or a list with a name or None for each prompt.

        A prompt that cannot be served gives an output with `finish_reason` "error" and `error`; the others go on.
        Raises RequestError if `params` or `adapter` is a list of another length than `prompts`.
        """
        batch = _as_batch(prompts)
        each = params if isinstance(params, list) else [params] * len(batch)
        if len(each) != len(batch):
            raise RequestError(f"{len(each)} SamplingParams for {len(batch)} prompts; give one, or one per prompt")
        adapters = adapter if isinstance(adapter, list) else [adapter] * len(batch)
        if len(adapters) != len(batch):
            raise RequestError(f"{len(adapters)} adapters for {len(batch)} prompts; give one, or one per prompt")
        outputs: list[RequestOutput] = []
        try:
            for prompt, its_params, its in zip(batch, each, adapters, strict=True):
                output = self.engine.add_request(self._next_id(), prompt, its_params, stream=False, adapter=its)
                outputs.append(output)
            while not all(output.finished for output in outputs):
                self.engine.step()
        finally:
            self._abort_unfinished(outputs)
        return outputs

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, adapter: str | None = None
    ) -> Iterator[Delta]:
        """Complete one prompt, yielding what each step adds. Leaving the loop aborts the request.

        Raises the request's RequestError, after what was generated before it.
        """
        output = self.engine.add_request(self._next_id(), prompt, params, adapter=adapter)
        cursor = DeltaCursor(output)
        try:
            while not cursor.is_done:
                if not output.finished:  # another stream's steps may have finished this one
                    self.engine.step()
                if delta := cursor.advance():
                    yield delta
        finally:
            self._abort_unfinished([output])
        if output.error is not None:
            raise output.error

    def chat(
        self,
        messages: list[Message] | list[list[Message]],
        params: SamplingParams | list[SamplingParams] | None = None,
        *,
        adapter: str | list[str | None] | None = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or several; `options` are those of `Tokenizer.render_chat`.

        Raises RequestError if the model has no chat template or the template refuses the messages.
        """
        conversations = messages if messages and isinstance(messages[0], list) else [messages]
        prompts = [self.tokenizer.encode_chat(cast(list[Message], each), **options) for each in conversations]
        return self.generate(prompts, params, adapter)

    def load_adapter(self, name: str, path: str | Path) -> None:
        """Load a LoRA adapter, a folder that PEFT saved, for requests to name.

        Raises CheckpointError or UnsupportedError for what cannot be loaded (docs/howto/adapters.md), RequestError if
        the name is in use, or as many adapters are loaded as the artifact was compiled for.
        """
        self.engine.load_adapter(name, path)

    def unload_adapter(self, name: str) -> None:
        """Make room for another. Raises RequestError if there is no such adapter, or unfinished requests use it."""
        self.engine.unload_adapter(name)

    def close(self) -> None:
        """Let go of the device's memory. The LLM cannot be used afterwards."""
        self.__dict__.pop("engine", None)

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _next_id(self) -> str:
        return f"llm-{next(self._ids)}"

    def _abort_unfinished(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            if not output.finished:
                self.engine.abort(output.request_id)


def _as_batch(prompts: Prompt | list[str] | list[list[int]]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    is_one = len(prompts) > 0 and not isinstance(prompts[0], str) and not hasattr(prompts[0], "__len__")
    return [cast(list[int], prompts)] if is_one else list(cast(list[Prompt], prompts))


class Serving(TypedDict, total=False):
    """How a request is served; what they mean says Engine.add_request."""

    request_id: str | None
    priority: int
    deadline: float | None
    adapter: str | None


class AsyncEngine:
    """An artifact served to many asyncio tasks (of any event loop) from one background thread.

    Arguments and errors are those of `LLM`. The executor is loaded and run in that one thread only, because thread
    pools such as TVM's belong to the thread that started them.
    """

    def __init__(
        self,
        path: str | Path,
        target: str = "auto",
        num_pages: int | None = None,
        max_batch: int | None = None,
        num_threads: int | None = None,
        gpu_memory_utilization: float = 0.9,
        options: EngineOptions | None = None,
        weight_memory: int | str | None = None,
    ) -> None:
        self._commands: queue.SimpleQueue[Callable[[Engine], None] | None] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}  # the engine's thread only
        self._ids = itertools.count()
        self._lock = threading.Lock()
        self._is_closed = False
        loaded: Future[Engine] = Future()
        sizes = num_pages, max_batch, num_threads, gpu_memory_utilization
        load = partial(load_engine, path, target, *sizes, options, weight_memory)
        self._thread = threading.Thread(target=self._run, args=(load, loaded), name="mlcgen-engine", daemon=True)
        self._thread.start()
        engine = loaded.result()
        self.tokenizer = engine.tokenizer
        self.context_length = engine.context_length

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **how: "Unpack[Serving]"
    ) -> AsyncGenerator[Delta, None]:
        """Complete one prompt, yielding what each step adds; the last delta has `finish_reason` and `output`.

        Cancelling or leaving the iteration aborts the request. Raises the request's RequestError, after what was
        generated before it, and MlcgenError if the device fails or the engine is closed.
        """
        return self._deltas(prompt, params, True, **how)

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, **how: "Unpack[Serving]"
    ) -> RequestOutput:
        """The whole completion of one prompt. Raises the request's RequestError."""
        async for delta in self._deltas(prompt, params, False, **how):
            last = delta
        assert last.output is not None
        return last.output

    async def load_adapter(self, name: str, path: str | Path) -> None:
        """As LLM.load_adapter; requests go on while the files are read."""
        layout = await self._between_steps(lambda engine: engine.adapters.layout)
        matrices = await asyncio.to_thread(read_adapter, path, layout)
        await self._between_steps(lambda engine: engine.adapters.load(name, matrices))

    async def unload_adapter(self, name: str) -> None:
        """As LLM.unload_adapter."""
        await self._between_steps(lambda engine: engine.unload_adapter(name))

    def abort(self, request_id: str) -> None:
        """End a request from any thread; its stream ends with `finish_reason` "abort". Unknown ids are ignored."""
        self._submit(partial(_abort, request_id))

    def close(self) -> None:
        """Abort what runs, stop the thread and let go of the device's memory. May be called twice."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._commands.put(None)
        self._thread.join()

    def __enter__(self) -> "AsyncEngine":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    async def __aenter__(self) -> "AsyncEngine":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    async def _deltas(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        streams: bool,
        request_id: str | None = None,
        **how: Any,
    ) -> AsyncGenerator[Delta, None]:
        request_id = request_id if request_id is not None else f"async-{next(self._ids)}"
        stream = _Stream(request_id, asyncio.get_running_loop())
        self._submit(partial(self._add, stream, prompt, params, {"stream": streams, **how}))
        try:
            while not stream.is_done:
                delta = await stream.receive()
                yield delta
        finally:
            if not stream.is_done:
                self._submit(partial(self._abandon, stream), or_ignore=True)
        if delta.output is not None and delta.output.error is not None:
            raise delta.output.error

    async def _between_steps(self, function: Callable[[Engine], T]) -> T:
        """What the engine's thread gets from `function`."""
        done: Future[T] = Future()

        def command(engine: Engine) -> None:
            try:
                done.set_result(function(engine))
            except Exception as error:
                done.set_exception(error)

        self._submit(command)
        return await asyncio.wrap_future(done)

    def _submit(self, command: Callable[[Engine], None], or_ignore: bool = False) -> None:
        """Have the engine's thread run `command` between two steps."""
        with self._lock:
            if not self._is_closed:
                self._commands.put(command)
            elif not or_ignore:
                raise MlcgenError("the engine is closed; make a new AsyncEngine")

    # From here on everything runs in the engine's thread.

    def _run(self, load: Callable[[], Engine], loaded: "Future[Engine]") -> None:
        try:
            engine = load()
        except BaseException as error:
            loaded.set_exception(error)
            return
        loaded.set_result(engine)
        del loaded  # it holds the engine
        while self._run_commands(engine):
            try:
                self._publish(engine, engine.step())
            except Exception as error:
                self._fail_all(engine, error)
        for request_id in self._streams:
            engine.abort(request_id)
        self._publish(engine, engine.step())

    def _run_commands(self, engine: Engine) -> bool:
        """Run what was submitted, waiting for a command if there is nothing else to do. False when closed."""
        while not (engine.has_unfinished and self._commands.empty()):
            command = self._commands.get()
            if command is None:
                return False
            command(engine)
        return True

    def _add(
        self, stream: "_Stream", prompt: Prompt, params: SamplingParams | None, how: dict[str, Any], engine: Engine
    ) -> None:
        try:
            if stream.request_id in self._streams:
                raise RequestError(f"request id {stream.request_id!r} is in use; choose another or abort that request")
            stream.cursor = DeltaCursor(engine.add_request(stream.request_id, prompt, params, **how))
            self._streams[stream.request_id] = stream
        except Exception as error:
            self._send(engine, stream.loop, [(stream, error)])

    def _abandon(self, stream: "_Stream", engine: Engine) -> None:
        """Abort the request of a stream that nobody reads any more, unless its id is another's by now."""
        if self._streams.get(stream.request_id) is stream:
            engine.abort(stream.request_id)

    def _publish(self, engine: Engine, outputs: list[RequestOutput]) -> None:
        """Send each stream its delta, waking each event loop once."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, Delta | Exception]]] = {}
        for output in outputs:
            stream = self._streams.get(output.request_id)
            delta = stream.cursor.advance() if stream else None
            if stream and delta:
                by_loop.setdefault(stream.loop, []).append((stream, delta))
            if output.finished:
                self._streams.pop(output.request_id, None)
        for loop, items in by_loop.items():
            self._send(engine, loop, items)

    def _send(
        self, engine: Engine, loop: asyncio.AbstractEventLoop, items: list[tuple["_Stream", Delta | Exception]]
    ) -> None:
        try:
            loop.call_soon_threadsafe(_deliver, items)
        except RuntimeError:  # the event loop was closed under its streams
            for stream, _ in items:
                self._abandon(stream, engine)

    def _fail_all(self, engine: Engine, cause: Exception) -> None:
        """The device failed in a step, so every request of that step is lost; the next ones may fare better."""
        for request_id, stream in list(self._streams.items()):
            engine.abort(request_id)
            error = MlcgenError(f"the device failed while it ran request {request_id!r}: {cause}")
            error.__cause__ = cause
            self._send(engine, stream.loop, [(stream, error)])
        self._streams.clear()


class _Stream:
    """One request's way from the engine's thread to an event loop."""

    def __init__(self, request_id: str, loop: asyncio.AbstractEventLoop) -> None:
        self.request_id = request_id
        self.loop = loop
        self.items: asyncio.Queue[Delta | Exception] = asyncio.Queue()
        self.cursor: DeltaCursor
        self.is_done = False

    async def receive(self) -> Delta:
        item = await self.items.get()
        if isinstance(item, Exception):
            self.is_done = True
            raise item
        self.is_done = item.finish_reason is not None
        return item


def _deliver(items: list[tuple[_Stream, Delta | Exception]]) -> None:
    for stream, item in items:
        stream.items.put_nowait(item)


def _abort(request_id: str, engine: Engine) -> None:
    engine.abort(request_id)

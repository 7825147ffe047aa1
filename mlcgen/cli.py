"""The command line: one function per verb. `main` turns every error into one line on stderr and an exit status."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand

from mlcgen import cli_output as output
from mlcgen.errors import MlcgenError

if TYPE_CHECKING:
    from mlcgen.runtime.options import EngineOptions
    from mlcgen.runtime.sampler import SamplingParams
    from mlcgen.simulate.step_times import StepTimes

# The verbs import what they need when they run, so that `--help` is quick and `run` needs no compiler.


class _Command(TyperCommand):
    """A verb: takes -v after its name too, and lets Ctrl-C through as an error of ours."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        if set(args[:end]) & {"-v", "--verbose"}:
            output.settings.verbose = True
            args = [arg for arg in args[:end] if arg not in ("-v", "--verbose")] + args[end:]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise MlcgenError("interrupted") from None
        except _UsageError as error:
            error.ctx = ctx  # type: ignore[attr-defined]
            raise
        except Exception as error:
            if output.settings.interrupted:
                raise MlcgenError("interrupted") from error
            raise


app = typer.Typer(
    name="mlcgen", add_completion=False, pretty_exceptions_enable=False, help="Compile LLMs once and run them anywhere."
)
_Verb = TypeVar("_Verb", bound=Callable[..., None])
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # click's, which newer typers carry inside


targets_app = typer.Typer(help="The targets of an artifact that is there.", no_args_is_help=True)
app.add_typer(targets_app, name="targets")


def verb(function: _Verb) -> _Verb:
    return app.command(cls=_Command)(function)


def main(args: Sequence[str] | None = None) -> int:
    """Run one command line (default: sys.argv) and return its exit status: 0, 1 (failed) or 2 (usage)."""
    output.settings.verbose = False
    output.notice_interrupts()
    try:
        status = app(args=args, prog_name="mlcgen", standalone_mode=False)
    except _UsageError as error:
        return output.usage_error(error)
    except (MlcgenError, OSError) as error:
        status = output.failure(str(error) or type(error).__name__, error)
        if output.settings.interrupted:
            output.silence_stderr()
        return status
    except KeyboardInterrupt as error:  # before or after the verb
        return output.failure("interrupted", error)
    except Exception as error:
        text = f"internal error, {type(error).__name__}: {error}"
        return output.failure(text if output.settings.verbose else f"{text}; -v shows where", error)
    return status if isinstance(status, int) else 0


def _show_version(wanted: bool) -> None:
    if wanted:
        import mlcgen

        print(f"mlcgen {mlcgen.__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Times of each pass; tracebacks of errors.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")] = False,
) -> None:
    output.settings.verbose = output.settings.verbose or verbose


Model = Annotated[str, typer.Argument(help="HF directory, .gguf, hub id, or installed model (smollm2-135m).")]
Artifact = Annotated[Path, typer.Argument(help="Directory that `mlcgen compile` wrote.")]
Quantization = Annotated[str, typer.Option("-q", "--quantization", help="f32, f16, bf16, q8, q4, or gguf.")]
ContextLength = Annotated[int | None, typer.Option(min=1, help="Tokens per sequence; default: the model's.")]
MaxBatch = Annotated[int, typer.Option(min=1, help="Sequences per step.")]
EngineBatch = Annotated[int | None, typer.Option(min=1, help="Sequences per step; default: the artifact's.")]
KvDtype = Annotated[str, typer.Option(help="auto, float32, float16, or bfloat16.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RunTarget = Annotated[str, typer.Option("--target", "-t", help="auto, or a target that the artifact holds.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all cores.")]
GpuMemory = Annotated[
    float, typer.Option("--gpu-memory-utilization", min=0.05, max=1.0, help="Share of a GPU's memory to use.")
]
WeightMemory = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Device memory for weights, such as 4GiB; layers beyond it are streamed."),
]
NumPages = Annotated[int | None, typer.Option(min=1, help="KV cache size; default: what memory allows.")]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="Tokens to generate at most.")]
Temperature = Annotated[float, typer.Option(help="0 always takes the most likely token.")]
TopK = Annotated[int, typer.Option(help="Keep this many most likely tokens; 0: all.")]
TopP = Annotated[float, typer.Option(help="Keep the most likely tokens of this total probability.")]
MinP = Annotated[float, typer.Option(help="Keep tokens at least this likely relative to the best.")]
Speculation = Annotated[
    str | None, typer.Option(help="Guess tokens, which changes none: off, ngram, lookahead, or model; default: off.")
]
DraftModel = Annotated[Path | None, typer.Option(help="Artifact of a smaller model that guesses.")]
Branches = Annotated[int, typer.Option(min=1, help="Guesses at one place.")]
Trust = Annotated[float | None, typer.Option(help="Take the draft model's word where it is so sure: 0 to 1.")]
CheckNumerics = Annotated[bool, typer.Option("--check-numerics", help="Name the kernel where numbers are not finite.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]


@verb
def compile(
    model: Model,
    target: Annotated[list[str] | None, typer.Option("-t", "--target", help="Default: cpu. Repeatable.")] = None,
    quantization: Quantization = "q4",
    out: Annotated[Path | None, typer.Option("-o", "--output", help="Default: dist/<model>-<quant>.")] = None,
    context_length: ContextLength = None,
    max_batch: MaxBatch = 64,
    kv_dtype: KvDtype = "auto",
    page_size: Annotated[int, typer.Option(min=1, max=256, help="Tokens per page of the KV cache.")] = 16,
    layers: Annotated[int | None, typer.Option(min=1, help="Only the first ones, for a draft model.")] = None,
    dump_ir: Annotated[Path | None, typer.Option(help="Write the module after each pass here.")] = None,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="From config alone.")] = False,
    lora_rank: Annotated[int | None, typer.Option(min=1, help="Take LoRA adapters of up to this rank.")] = None,
    adapters: Annotated[int, typer.Option(min=1, help="With --lora-rank: adapters loaded at once.")] = 8,
    as_json: Json = False,
) -> None:
    """Compile a model into an artifact."""
    import mlcgen

    with output.Progress() as progress:
        path = mlcgen.compile(
            model,
            target or ["cpu"],
            quantization,
            out,
            context_length=context_length,
            max_batch=max_batch,
            kv_dtype=kv_dtype,
            page_size=page_size,
            layers=layers,
            dump_ir=dump_ir,
            random_weights=random_weights,
            lora_rank=lora_rank,
            adapters=adapters,
            progress=progress.update,
            log=output.log if output.settings.verbose else None,
        )
    output.compiled(path, as_json)


@targets_app.command("add", cls=_Command)
def add_targets(
    artifact: Artifact,
    target: Annotated[list[str], typer.Option("-t", "--target", help="As for compile. Repeatable.")],
    as_json: Json = False,
) -> None:
    """Compile an artifact's model for more targets; its weights stay as they are."""
    from mlcgen.add_targets import add_targets as add

    with output.Progress() as progress:
        add(artifact, target, progress.update, output.log if output.settings.verbose else None)
    output.compiled(artifact, as_json)


@verb
def run(
    artifact: Artifact,
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="Several make one batch.")],
    target: RunTarget = "auto",
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="Ends the text; repeat for several.")] = None,
    logprobs: Annotated[int | None, typer.Option(min=1, help="With --json: the best tokens of each step.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="LoRA adapter: a folder that PEFT saved.")] = None,
    num_pages: NumPages = None,
    max_batch: EngineBatch = None,
    threads: Threads = None,
    gpu_memory_utilization: GpuMemory = 0.9,
    speculation: Speculation = None,
    draft_model: DraftModel = None,
    branches: Branches = 1,
    trust: Trust = None,
    check_numerics: CheckNumerics = False,
    weight_memory: WeightMemory = None,
    as_json: Json = False,
) -> None:
    """Complete prompts; one prompt streams, several run as one batch."""
    if logprobs is not None and not as_json:
        raise typer.BadParameter("--logprobs needs --json")
    from mlcgen.runtime.llm import LLM
    from mlcgen.runtime.sampler import SamplingParams

    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        max_tokens=max_tokens,
        stop=stop or None,
        logprobs=logprobs,
    )
    with output.waiting("loading"):
        options = _engine_options(speculation, draft_model, branches, trust, check_numerics)
        sizes = num_pages, max_batch, threads, gpu_memory_utilization
        llm = LLM(artifact, target, *sizes, options, weight_memory=weight_memory)
        if adapter is not None:
            llm.load_adapter(str(adapter), adapter)
    name = None if adapter is None else str(adapter)
    if target == "auto":
        output.chosen_target(artifact)
    if len(prompts) == 1 and not as_json:
        return output.stream(llm.stream(prompts[0], params, name))
    with output.waiting("generating"):
        outputs = llm.generate(prompts, params, name)
    output.completions(outputs, logprobs, as_json)
    if any(each.error for each in outputs):
        raise typer.Exit(1)


def _engine_options(
    speculation: str | None, draft_model: Path | None, branches: int, trust: float | None, check_numerics: bool
) -> "EngineOptions":
    from mlcgen.runtime.options import EngineOptions

    kind: Any = speculation or ("model" if draft_model else "off")
    return EngineOptions(
        speculation=kind, draft_model=draft_model, branches=branches, trust=trust, check_numerics=check_numerics
    )


@verb
def chat(
    artifact: Artifact,
    system: Annotated[str | None, typer.Option(help="Instructions before the first message.")] = None,
    target: RunTarget = "auto",
    max_tokens: MaxTokens = None,
    temperature: Temperature = 0.7,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    seed: Seed = None,
    num_pages: NumPages = None,
    threads: Threads = None,
    gpu_memory_utilization: GpuMemory = 0.9,
    speculation: Speculation = None,
    draft_model: DraftModel = None,
    branches: Branches = 1,
    trust: Trust = None,
    check_numerics: CheckNumerics = False,
    weight_memory: WeightMemory = None,
) -> None:
    """Talk with a model. /reset forgets, /exit or end of input leaves, Ctrl-C stops an answer."""
    from mlcgen.runtime.llm import LLM
    from mlcgen.runtime.sampler import SamplingParams

    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, max_tokens=max_tokens
    )
    with output.waiting("loading"):
        options = _engine_options(speculation, draft_model, branches, trust, check_numerics)
        sizes = num_pages, 1, threads, gpu_memory_utilization
        llm = LLM(artifact, target, *sizes, options, weight_memory=weight_memory)
    _converse(llm, params, [{"role": "system", "content": system}] if system else [])


def _converse(llm: Any, params: "SamplingParams", opening: list[dict[str, Any]]) -> None:
    messages = list(opening)
    while (line := output.ask("> ")) not in (None, "/exit"):
        if line == "/reset":
            messages = list(opening)
        elif line and line.strip():
            messages = _answered(llm, params, [*messages, {"role": "user", "content": line}])


def _answered(llm: Any, params: "SamplingParams", messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with the model's answer, or without the last message if the model cannot answer it."""
    parts: list[str] = []
    output.settings.interrupted = False
    try:
        output.stream(llm.stream(llm.tokenizer.encode_chat(messages), params), parts)
    except KeyboardInterrupt:
        pass
    except MlcgenError as error:
        output.failure(str(error), error)
        return messages[:-1]
    except Exception:
        if not output.settings.interrupted:
            raise
    return [*messages, {"role": "assistant", "content": "".join(parts)}]


@verb
def eval(
    artifact: Artifact,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to score.")] = None,
    ids: Annotated[Path | None, typer.Option(help="Token ids to score: JSON, [1, 2, ...].")] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens per independent window.")] = 512,
    target: RunTarget = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Perplexity of a text over non-overlapping windows."""
    if (text is None) == (ids is None):
        raise typer.BadParameter("give one of --text FILE and --ids FILE")
    from mlcgen.evaluate import perplexity, read_ids, read_text
    from mlcgen.runtime.load import load_executor

    with output.waiting("loading"):
        model = load_executor(artifact, target=target, num_threads=threads)
    if window > model.context_length:
        raise MlcgenError(f"--window {window} is beyond the artifact's context of {model.context_length}; lower it")
    tokens = read_ids(ids) if ids else read_text(model, text or Path())
    with output.Progress() as progress:
        result = perplexity(model.executor, tokens, window, lambda done, total: progress.update("scoring", done, total))
    output.values(dict(result), as_json)


@verb
def verify(
    artifact: Artifact,
    model: Annotated[str | None, typer.Option(help="The source, if it has moved since compiling.")] = None,
    target: RunTarget = "auto",
    as_json: Json = False,
) -> None:
    """Compare the numbers with the un-optimised reference build; the artifact keeps the result."""
    from mlcgen.verify import verify as run_verify

    with output.Progress() as progress:
        result = run_verify(artifact, model, target, progress.update)
    output.values(result, as_json)
    if not result["passed"]:
        raise MlcgenError(
            f"{artifact} is further from its reference than {result['quantization']} may be; recompile it"
        )


@verb
def bench(
    artifacts: Annotated[list[Path], typer.Argument(metavar="ARTIFACT...", help="Builds of one model.")],
    target: Annotated[
        list[str] | None, typer.Option("--target", "-t", help="auto, all, or targets of the artifacts. Repeatable.")
    ] = None,
    peer: Annotated[list[str] | None, typer.Option(help="llama.cpp, openvino, or on a GPU torch. Repeatable.")] = None,
    peer_model: Annotated[Path | None, typer.Option(help="GGUF file for the peers; default: the source's.")] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 128,
    long_context: Annotated[int, typer.Option(min=1, help="Cached tokens of the long test.")] = 4096,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of the batch test.")] = 8,
    batch_prompt: Annotated[int, typer.Option(min=0, help="Tokens of each of its prompts; 0: 512 together.")] = 0,
    threads: Threads = None,
    repeat: Annotated[int, typer.Option(min=1, help="Turns that count, after one to warm up.")] = 5,
    weight_memory: WeightMemory = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8, or token ids in .json: measure its perplexity too.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all samples here.")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page here.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Measure nothing: the arguments are --json files.")] = False,
) -> None:
    """Speed, memory and load time of artifacts, beside other engines and this machine's peaks."""
    if merge:
        return _merge(artifacts, json_file, html_file)
    from mlcgen.bench.contestants import Options
    from mlcgen.bench.engines import PEERS
    from mlcgen.bench.matrix import page
    from mlcgen.bench.run import bench as run_bench
    from mlcgen.runtime.cpu import usable_cores

    if unknown := set(peer or ()) - set(PEERS):
        raise typer.BadParameter(f"no peer {min(unknown)!r}; have: {', '.join(PEERS)}")
    sizes = prompt, tokens, long_context, batch
    options = Options(*sizes, threads or usable_cores(), repeat, batch_prompt, weight_memory)
    with output.Progress() as progress:
        result = run_bench(artifacts, target or ["auto"], peer or (), peer_model, options, progress.update, text)
    output.benchmark(result, json_file)
    if html_file:
        html_file.write_text(page([result]), encoding="utf-8")


def _merge(files: Sequence[Path], json_file: Path | None, html_file: Path | None) -> None:
    if not (json_file or html_file):
        raise typer.BadParameter("--merge writes --html FILE, --json FILE, or both; name one")
    from mlcgen.artifact import write_json
    from mlcgen.bench.matrix import page
    from mlcgen.bench.result import merged, read_results

    results = read_results(files)
    if json_file:
        write_json(json_file, merged(results))
    if html_file:
        html_file.write_text(page(results), encoding="utf-8")


@verb
def inspect(artifact: Artifact, as_json: Json = False) -> None:
    """What an artifact holds: targets, weights, kernels and how each was made, fallbacks as warnings."""
    from mlcgen.artifact import read_manifest, read_report

    output.inspection(read_manifest(artifact), read_report(artifact), as_json)


@verb
def plan(
    model: Model,
    quantization: Quantization = "q4",
    context_length: ContextLength = None,
    max_batch: MaxBatch = 64,
    kv_dtype: KvDtype = "auto",
    as_json: Json = False,
) -> None:
    """Will it fit: weights, KV cache and workspace against this machine's free memory, before compiling."""
    from mlcgen.plan import plan_model

    output.plan(plan_model(model, quantization, context_length, max_batch, kv_dtype), as_json)


@verb
def simulate(
    artifact: Annotated[Path | None, typer.Argument(help="Time its steps; or give --cost.")] = None,
    cost: Annotated[Path | None, typer.Option(help="Step times: of --save-cost, or of mlcgen bench --json.")] = None,
    row: Annotated[str | None, typer.Option(help="Which row of a bench result: BUILD, or 'BUILD on TARGET'.")] = None,
    save_cost: Annotated[Path | None, typer.Option(help="Keep the artifact's step times here.")] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests of each run.")] = 1000,
    rate: Annotated[list[float] | None, typer.Option(min=1e-6, help="Requests a second. Repeatable.")] = None,
    arrivals: Annotated[str, typer.Option(help="poisson, or bursty: gaps vary three times as much.")] = "poisson",
    prompt: Annotated[str, typer.Option(help="Tokens of prompts: N, or MEDIAN:P95.")] = "128:512",
    output_tokens: Annotated[str, typer.Option("--output", help="Tokens to generate, likewise.")] = "64:256",
    shared_prefix: Annotated[int, typer.Option(min=0, help="Tokens before each prompt that all share.")] = 0,
    trace: Annotated[Path | None, typer.Option(help="JSON lines to replay instead.")] = None,
    num_pages: NumPages = None,
    page_size: Annotated[int | None, typer.Option(min=1, help="Tokens per page; default: as measured.")] = None,
    max_batch: EngineBatch = None,
    tokens_per_step: Annotated[list[int] | None, typer.Option(min=1, help="Of a step at most. Repeatable.")] = None,
    whole_prompts: Annotated[bool, typer.Option(help="Also without chunks: prompts first, decodes wait.")] = False,
    prefix_cache: Annotated[bool, typer.Option(help="Reuse the pages of equal beginnings.")] = True,
    replicas: Annotated[list[int] | None, typer.Option(min=1, help="Engines to spread over. Repeatable.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of arrivals and lengths.")] = 0,
    target: RunTarget = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Latency and throughput under a load of requests, from step times: the engine's own scheduler, without a model."""
    if (artifact is None) == (cost is None):
        raise typer.BadParameter("give one of ARTIFACT and --cost FILE")
    if arrivals not in ("poisson", "bursty"):
        raise typer.BadParameter(f"no --arrivals {arrivals!r}; have: poisson, bursty, and --trace FILE")
    if (row and artifact) or (save_cost and cost):
        raise typer.BadParameter("--row goes with --cost FILE, and --save-cost with ARTIFACT")
    from mlcgen.simulate.run import Options
    from mlcgen.simulate.run import simulate as run_simulation
    from mlcgen.simulate.step_times import read_step_times, write_step_times
    from mlcgen.simulate.trace import Load, parse_lengths

    lengths = parse_lengths(prompt), parse_lengths(output_tokens)
    load = Load(requests, arrivals, *lengths, shared_prefix, seed)  # type: ignore[arg-type]
    options = Options(
        load,
        rate or (1.0,),
        trace,
        tokens_per_step or (),
        ("chunked", "whole") if whole_prompts else ("chunked",),
        replicas or (1,),
        num_pages,
        page_size,
        max_batch,
        prefix_cache,
    )
    with output.Progress() as progress:
        times = read_step_times(cost, row) if cost else _step_times(artifact or Path(), target, threads, progress)
        if save_cost:
            write_step_times(save_cost, times)
        result = run_simulation(times, options, progress.update)
    output.simulation(result, as_json)


def _step_times(artifact: Path, target: str, threads: int | None, progress: output.Progress) -> "StepTimes":
    from mlcgen.runtime.llm import load_engine
    from mlcgen.simulate.calibrate import calibrate

    engine = load_engine(artifact, target, num_threads=threads)
    return calibrate(engine, str(artifact), lambda done, total: progress.update("measuring steps", done, total))


@verb
def devices(as_json: Json = False) -> None:
    """What this machine can compile for and run, and what is missing for the rest."""
    from mlcgen.devices import devices as find_devices

    output.devices(find_devices(), as_json)

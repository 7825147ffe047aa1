"""How the command line prints: results on stdout, everything else on stderr. rich is imported when it is needed."""

import contextlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlcgen.devices import Device
    from mlcgen.plan import Plan
    from mlcgen.runtime.outputs import Delta, RequestOutput
    from mlcgen.simulate.run import Simulation


@dataclass
class Settings:
    verbose: bool = False
    interrupted: bool = False  # Ctrl-C was pressed; TVM may make an error of its own from the KeyboardInterrupt


settings = Settings()


def log(line: str) -> None:
    print(line, file=sys.stderr)


def failure(message: str, error: BaseException) -> int:
    """Print a failed command's one line, after the traceback if verbose."""
    if settings.verbose:
        traceback.print_exception(error)
    log(f"mlcgen: {_one_line(message)}")
    return 1


def usage_error(error: Any) -> int:
    """Print what is wrong with a command line and where its help is. `error` is click's UsageError."""
    command = error.ctx.command_path if error.ctx else "mlcgen"
    log(f"{command}: {_one_line(error.format_message()).rstrip('.')}; see {command} --help")
    return 2


def chosen_target(path: Path) -> None:
    """Of an artifact with several targets: which `auto` takes, and why not the others."""
    from mlcgen.artifact import read_manifest
    from mlcgen.runtime.target_choice import choose_target, not_taken

    entries = read_manifest(path)["targets"]
    taken = choose_target(entries, "auto")["name"]
    if reasons := not_taken(entries, taken):
        log(f"target {taken}; not " + "; not ".join(f"{name}: {reason}" for name, reason in reasons.items()))


def notice_interrupts() -> None:
    """Ctrl-C raises KeyboardInterrupt as ever, and is remembered in `settings`."""
    settings.interrupted = False
    is_ours_to_set = threading.current_thread() is threading.main_thread()
    if is_ours_to_set and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    settings.interrupted = True
    raise KeyboardInterrupt


def silence_stderr() -> None:
    """Keep native libraries from talking while an interrupted process takes down what they were building."""
    sys.stderr.flush()
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)


def warning(message: str) -> None:
    log(f"warning: {_one_line(message)}")


def _one_line(message: str) -> str:
    return " ".join(message.split())


def print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False), flush=True)


def values(result: Mapping[str, Any], as_json: bool) -> None:
    """A flat result, one `name  value` per line."""
    if as_json:
        return print_json(result)
    width = max(map(len, result))
    for name, value in result.items():
        print(f"{name:{width}}  {f'{value:.6g}' if isinstance(value, float) else value}")


# Waiting


class Progress:
    """Bars on stderr, one per stage; silent when stderr is no terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Bars(*columns, console=console, disable=not console.is_terminal)
        self._tasks: dict[str, Any] = {}

    def update(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total)
        self._bars.update(self._tasks[stage], completed=done, total=total)

    def __enter__(self) -> "Progress":
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bars.stop()


def waiting(what: str) -> AbstractContextManager[Any]:
    """A spinner on stderr while something of unknown length runs."""
    if not sys.stderr.isatty():
        return contextlib.nullcontext()
    from rich.console import Console

    return Console(stderr=True).status(what)


# Generated text


def stream(deltas: Iterable["Delta"], parts: list[str] | None = None) -> None:
    """Print a completion as it comes, keeping it in `parts` too."""
    started = False
    try:
        for delta in deltas:
            print(delta.text, end="", flush=True)
            started = started or delta.finish_reason != "error"
            if parts is not None:
                parts.append(delta.text)
    finally:
        if started:
            print()


def completions(outputs: Sequence["RequestOutput"], num_logprobs: int | None, as_json: bool) -> None:
    for index, each in enumerate(outputs):
        if as_json:
            print_json(completion(each, num_logprobs))
            continue
        if len(outputs) > 1:
            print(f"{chr(10) if index else ''}==> {each.prompt} <==")
        print(each.text)
        if each.error:
            log(f"mlcgen: prompt {index + 1}: {_one_line(str(each.error))}")


def completion(output: "RequestOutput", num_logprobs: int | None) -> dict[str, Any]:
    """The JSON object of one prompt."""
    times = output.metrics
    result: dict[str, Any] = {
        "prompt": output.prompt,
        "prompt_token_ids": output.prompt_token_ids,
        "token_ids": output.token_ids,
        "text": output.text,
        "finish_reason": output.finish_reason,
        "timings": {
            "ttft_ms": times.ttft_ms,
            "prefill_tokens_per_s": times.prefill_tokens_per_s,
            "decode_tokens_per_s": times.decode_tokens_per_s,
        },
    }
    if num_logprobs is not None:
        steps = output.outputs[0].logprobs or []
        result["top_logprobs"] = [_best(step, num_logprobs) for step in steps]
    if output.error is not None:
        result["error"] = str(output.error)
    return result


def _best(step: Mapping[int, float], count: int) -> list[list[float]]:
    """The `count` best [token id, logprob]; the chosen token is in `step` even where it is none of them."""
    return [[token, logprob] for token, logprob in sorted(step.items(), key=lambda item: -item[1])[:count]]


def ask(prompt: str) -> str | None:
    """A line from the user; None at the end of input, "" after Ctrl-C."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() editing and history)
    try:
        return input(prompt if sys.stdin.isatty() else "")
    except KeyboardInterrupt:
        print()
        return ""
    except EOFError:
        return None


# Reports


def compiled(path: Path, as_json: bool) -> None:
    """What a compile made, and what it had to fall back on."""
    from mlcgen.artifact import read_manifest, read_report

    manifest, report = read_manifest(path), read_report(path)
    _warn_of_fallbacks(report)
    if as_json:
        print_json({"artifact": str(path), "manifest": manifest})
    else:
        targets = ", ".join(target["name"] for target in manifest["targets"])
        size = format_bytes(sum(file["bytes"] for file in manifest["weights"]))
        print(f"{path}: {manifest['quantization']} for {targets}, {size} of weights")


def benchmark(result: Mapping[str, Any], file: Path | None) -> None:
    from mlcgen.bench.table import print_result

    print_result(result)
    if file:
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def simulation(result: "Simulation", as_json: bool) -> None:
    for line in result.warnings:
        warning(line)
    if as_json:
        return print_json(result.as_dict())
    from mlcgen.simulate.table import print_simulation

    print_simulation(result)


def inspection(manifest: Mapping[str, Any], report: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        return print_json({"manifest": manifest, "report": report})
    _print_manifest(manifest)
    for target, entry in report.items():
        print(f"\nkernels of {target}")
        rows = [
            [k["name"], k["how"], str(k["calls"]), f"{k['flops_per_token']:,}", format_bytes(k["weight_bytes"])]
            for k in entry["kernels"]
        ]
        _table(["kernel", "how", "calls", "FLOPs/token", "weights"], rows)
    _warn_of_fallbacks(report)


def _print_manifest(manifest: Mapping[str, Any]) -> None:
    model, kv = manifest["model"], manifest["kv"]
    size = format_bytes(sum(file["bytes"] for file in manifest["weights"]))
    layers = f"{model['num_layers']} layers, hidden {model['hidden_size']}, vocabulary {model['vocab_size']}"
    lines = {
        "name": manifest["name"],
        "model": f"{model['model_type']}, {layers}",
        "source": manifest.get("source"),
        "quantization": f"{manifest['quantization']}, {size} of weights",
        "KV cache": f"{kv['dtype']}, {kv['page_size']} tokens per page",
        "context": f"{manifest['context_length']} tokens, {manifest['max_batch']} sequences per step",
        **_adapters_line(manifest),
        "made with": ", ".join(f"{name} {version}" for name, version in manifest["versions"].items()),
        "verified": json.dumps(manifest["verify"]) if manifest.get("verify") else "no; run mlcgen verify",
    }
    values(lines, as_json=False)
    for target in manifest["targets"]:
        features = " ".join(target["features"]) or "none"
        print(f"target        {target['name']} ({target['arch']}, {target['executor']}), needs: {features}")


def _adapters_line(manifest: Mapping[str, Any]) -> dict[str, str]:
    if "adapters" not in manifest:
        return {}
    adapters = manifest["adapters"]
    return {"adapters": f"{adapters['slots']} at once, of rank {adapters['rank']} at most"}


def _warn_of_fallbacks(report: Mapping[str, Any]) -> None:
    for target, entry in report.items():
        for fallback in entry["fallbacks"]:
            warning(f"{target}: {fallback}")


def plan(plan: "Plan", as_json: bool) -> None:
    if as_json:
        return print_json({**plan.as_dict(), "fits": plan.fits})
    lines = {
        "model": f"{plan.model}, {plan.quantization}",
        "weights": format_bytes(plan.weight_bytes),
        "KV per token": format_bytes(plan.kv_bytes_per_token),
        "KV cache": f"{format_bytes(plan.kv_bytes)} for {plan.max_batch} x {plan.context_length} tokens "
        f"({format_bytes(plan.kv_bytes_one_sequence)} for one)",
        "workspace": f"about {format_bytes(plan.workspace_bytes)}",
        "free here": format_bytes(plan.free_bytes),
        "verdict": f"{plan.verdict}: {plan.advice}" if plan.advice else plan.verdict,
    }
    values(lines, as_json=False)


def devices(found: Sequence["Device"], as_json: bool) -> None:
    if as_json:
        return print_json([device.as_dict() for device in found])
    for device in found:
        can = f"compile: {_yes(device.can_compile)}, run: {_yes(device.can_run)}"
        memory = format_bytes(device.memory_bytes) if device.memory_bytes else ""
        driver = f"driver for {device.driver}" if device.driver else ""
        about = ", ".join(filter(None, (device.name, memory, driver)))
        print(f"{device.kind:7} {can}  {about}".rstrip())
        if device.features:
            print(f"        features: {' '.join(device.features)}")
        for missing in device.missing:
            print(f"        missing: {missing.what}; {missing.remedy}")


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        print("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def format_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"

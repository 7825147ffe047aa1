"""Measured steps, with what else a simulation needs of the engine: kept in a file, or taken from a bench result."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mlcgen.errors import SimulationError
from mlcgen.simulate.cost import MeasuredStep, StepCost, StepShape, fit

__all__ = ["Limits", "StepTimes", "read_step_times", "write_step_times"]

VERSION = 1
LARGEST = 1 << 40  # of any count in a file
FIRST_TOKEN_OF_LONG = 16  # half of the tokens that the bench generates after its long prompt


@dataclass(frozen=True)
class Limits:
    """Of the engine that was measured; where nothing is known of it, what an artifact has by default."""

    num_pages: int | None = None  # None: as many as the batch can fill
    page_size: int = 16
    max_batch: int = 64
    tokens_per_step: int = 512
    context_length: int | None = None  # None: no limit
    page_bytes: int = 0  # of all layers; 0: not known
    looks_ahead: bool = False  # it chooses a step when the one before it begins


@dataclass(frozen=True)
class StepTimes:
    source: str
    steps: list[MeasuredStep]
    limits: Limits = field(default_factory=Limits)
    page_seconds: float | None = None  # to move a page to the host or back; None: not known

    @cached_property
    def cost(self) -> StepCost:
        return fit(self.steps)


def write_step_times(file: Path, times: StepTimes) -> None:
    """One line for each step, so that the file can be read and edited."""
    head = {
        "version": VERSION,
        "source": times.source,
        "limits": asdict(times.limits),
        "page_seconds": times.page_seconds,
    }
    lines = [json.dumps({**asdict(step.shape), "seconds": round(step.seconds, 9)}) for step in times.steps]
    text = json.dumps(head, indent=1)[:-2] + ',\n "steps": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"
    file.write_text(text, encoding="utf-8")


def read_step_times(file: Path, row: str | None = None) -> StepTimes:
    """From a file of `write_step_times`, or of `mlcgen bench --json`.

    row: of a bench result with several builds or targets, "BUILD" or "BUILD on TARGET". Raises SimulationError, which
    names the file, or BenchError for a bench result of another version.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SimulationError(f"cannot read the step times {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise SimulationError(f"the step times {file} are not JSON: {error}") from error
    if isinstance(value, dict) and ("engines" in value or "results" in value):
        return _of_bench(file, row)
    times = _of_value(f"the step times {file}", value)
    if row is not None:
        raise SimulationError(f"--row {row!r} is for a file of mlcgen bench; {file} has the steps of one engine")
    return times


# Our own file


def _of_value(where: str, value: Any) -> StepTimes:
    if not isinstance(value, dict) or not isinstance(value.get("steps"), list):
        raise SimulationError(f"{where} have no steps; write them with --save-cost, or mlcgen bench --json")
    if value.get("version") != VERSION:
        raise SimulationError(
            f"{where} have version {value.get('version')!r:.40}, this mlcgen reads {VERSION}; measure again"
        )
    steps = [_step(f"{where}, step {number}", step) for number, step in enumerate(value["steps"], 1)]
    page_seconds = value.get("page_seconds")
    return StepTimes(
        str(value.get("source", ""))[:200],
        steps,
        _limits(where, value.get("limits")),
        None if page_seconds is None else _seconds(where, "page_seconds", page_seconds),
    )


def _step(where: str, value: Any) -> MeasuredStep:
    if not isinstance(value, dict):
        raise SimulationError(f"{where} is no JSON object")
    names = {"tokens": 1, "rows": 0, "cached": 0, "pairs": 0}
    shape = StepShape(**{name: _count(where, name, value.get(name), least) for name, least in names.items()})
    return MeasuredStep(shape, _seconds(where, "seconds", value.get("seconds")))


def _limits(where: str, value: Any) -> Limits:
    if not isinstance(value, dict):
        raise SimulationError(f"{where} have no limits of the engine; measure again with --save-cost")
    least = {"num_pages": 1, "page_size": 1, "max_batch": 1, "tokens_per_step": 1, "context_length": 2, "page_bytes": 0}
    counts: dict[str, Any] = {
        name: None
        if value.get(name) is None and name in ("num_pages", "context_length")
        else _count(where, name, value.get(name), at_least)
        for name, at_least in least.items()
    }
    looks_ahead = value.get("looks_ahead", False)
    if type(looks_ahead) is not bool:
        raise SimulationError(f"{where}: looks_ahead is {looks_ahead!r:.40}; it must be true or false")
    return Limits(**counts, looks_ahead=looks_ahead)


def _count(where: str, name: str, value: Any, least: int) -> int:
    if type(value) is not int or not least <= value <= LARGEST:
        raise SimulationError(f"{where}: {name} is {value!r:.40}; it must be an integer of at least {least}")
    return value


def _seconds(where: str, name: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < 1e6:
        raise SimulationError(f"{where}: {name} is {value!r:.40}; it must be more than 0 seconds")
    return float(value)


# A bench result


def _of_bench(file: Path, name: str | None) -> StepTimes:
    from mlcgen.bench.result import read_results

    rows = {
        f"{row['name']} on {row['target']}": (row, result["options"])
        for result in read_results([file])
        for row in result["engines"]
        if row["engine"] == "mlcgen"
    }
    chosen = [label for label, (row, _) in rows.items() if name in (None, row["name"], label)]
    if len(chosen) != 1:
        what = "no build of mlcgen" if not rows else f"{len(chosen)} builds{f' named {name!r}' if name else ''}"
        raise SimulationError(f"{file} has {what}; name one with --row: {', '.join(rows) or 'none'}")
    row, options = rows[chosen[0]]
    steps = _bench_steps({key: each["median"] for key, each in row["metrics"].items()}, options)
    tokens = max([Limits.tokens_per_step, *(step.shape.tokens for step in steps)])
    batch = max(Limits.max_batch, options["batch"])
    limits = Limits(max_batch=batch, tokens_per_step=tokens, looks_ahead=row["kind"] != "cpu")
    return StepTimes(f"{chosen[0]} on {row['device']}, mlcgen bench", steps, limits)


def _bench_steps(medians: Mapping[str, float], options: Mapping[str, int]) -> list[MeasuredStep]:
    """The steps that a result's rates stand for: decodes at the tests' average contexts, and a prompt as one step."""
    prompt, half, batch = options["prompt"], options["tokens"] // 2, options["batch"]
    decodes = {
        "decode_tokens_per_s": (1, prompt + half),
        "long_decode_tokens_per_s": (1, options["long_context"] + FIRST_TOKEN_OF_LONG),
        "batch_decode_tokens_per_s": (batch, options["batch_prompt"] + half),
    }
    steps = [
        MeasuredStep(StepShape(count, count, count * context), count / medians[name])
        for name, (count, context) in decodes.items()
        if medians.get(name)
    ]
    if medians.get("prefill_tokens_per_s"):
        shape = StepShape.of([(0, prompt, True)])
        steps.append(MeasuredStep(shape, prompt / medians["prefill_tokens_per_s"]))
    return steps

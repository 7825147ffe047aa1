"""`mlcgen simulate` on files and on an engine that takes no time; no figure is a measurement."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mlcgen.cli import app, main
from mlcgen.errors import SimulationError
from mlcgen.simulate.calibrate import calibrate
from mlcgen.simulate.cost import MeasuredStep, StepShape
from mlcgen.simulate.step_times import Limits, StepTimes, read_step_times, write_step_times
from mlcgen.simulate.trace import parse_lengths, read_trace

from .tiny_engine import CONTEXT, NumpyExecutor, make_engine

SHAPES = [
    *(StepShape(count, count, 100 * count) for count in (1, 4, 16)),
    *(StepShape(count, 1, 0, count**2 // 2) for count in (32, 128, 512)),
]
TIMES = StepTimes(
    "a made-up device",
    [MeasuredStep(shape, round(0.01 + 0.0001 * shape.tokens + 1e-6 * shape.cached, 6)) for shape in SHAPES],
    Limits(num_pages=500, context_length=2048, page_bytes=1000),
    page_seconds=0.001,
)


@pytest.fixture
def cost(tmp_path: Path) -> Path:
    write_step_times(tmp_path / "cost.json", TIMES)
    return tmp_path / "cost.json"


def run(*args: Any) -> Any:
    result = CliRunner().invoke(app, ["simulate", *map(str, args)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_table_for_people_and_json_for_programs(cost: Path) -> None:
    options = ["--cost", cost, "--requests", 40, "--rate", 2, "--rate", 200, "--tokens-per-step", 64]
    text = run(*options)
    result = json.loads(run(*options, "--json"))
    assert [case["rate"] for case in result["cases"]] == [2, 200]
    assert result["server"]["num_pages"] == 500
    assert result["source"] == "a made-up device"
    assert result["fit_error"]["max"] < 1e-6
    first, second = (case["summary"] for case in result["cases"])
    assert first["num_finished"] == second["num_finished"] == 40
    assert f"{first['tokens_per_s']:.4g}" in text
    assert f"{second['queue_at_end']} overloaded" in text
    assert "500 pages of 16 tokens" in text


def test_what_is_compared_is_in_the_table(cost: Path) -> None:
    text = run("--cost", cost, "--requests", 20, "--whole-prompts", "--replicas", 1, "--replicas", 2)
    assert "whole" in text
    assert "chunked" in text
    assert "repli-" in text


def test_a_trace_is_replayed(cost: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    line = {"arrival_s": 1.5, "prompt_tokens": 64, "output_tokens": 4}
    shared = {"group": "a", "shared_tokens": 48}
    trace.write_text("\n".join([json.dumps(line | shared), "", json.dumps(line | shared | {"arrival_s": 0})]))
    result = json.loads(run("--cost", cost, "--trace", trace, "--json"))
    (case,) = result["cases"]
    assert case["summary"]["num_finished"] == 2
    assert case["summary"]["hit_rate"] == pytest.approx(48 / 128)


def test_step_times_come_back_from_their_file(cost: Path) -> None:
    assert read_step_times(cost) == TIMES


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"version": 7}, "version 7"),
        ({"steps": []}, "not even two"),
        ({"steps": 3}, "have no steps"),
        ({"steps": [{"tokens": 1}]}, "step 1: rows is None"),
        ({"steps": [{"tokens": 1, "rows": 1, "cached": 0, "pairs": 0, "seconds": -1}]}, "seconds is -1"),
        ({"limits": {"page_size": 0}}, "page_size is 0"),
        ({"limits": {"looks_ahead": 1}}, "looks_ahead is 1"),
        ({"limits": None}, "limits"),
        ({"page_seconds": "fast"}, "page_seconds is 'fast'"),
    ],
)
def test_a_wrong_file_of_step_times_is_said_to_be(
    cost: Path, changed: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    value = json.loads(cost.read_text())
    if changed.get("limits"):
        changed = {"limits": value["limits"] | changed["limits"]}
    cost.write_text(json.dumps(value | changed))
    assert main(["simulate", "--cost", str(cost)]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe", b"[" * 100_000, b"[]"])
def test_what_is_no_json_is_no_file_of_step_times(tmp_path: Path, text: bytes) -> None:
    file = tmp_path / "cost.json"
    file.write_bytes(text)
    with pytest.raises(SimulationError, match=r"cost\.json"):
        read_step_times(file)
    with pytest.raises(SimulationError, match="cannot read"):
        read_step_times(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "is not JSON"),
        ("3", "no JSON object"),
        ('{"arrival_s": -1, "prompt_tokens": 1, "output_tokens": 1}', "arrival_s is -1"),
        ('{"arrival_s": NaN, "prompt_tokens": 1, "output_tokens": 1}', "arrival_s is nan"),
        ('{"arrival_s": 0, "prompt_tokens": 0, "output_tokens": 1}', "prompt_tokens is 0"),
        ('{"arrival_s": 0, "prompt_tokens": 1, "output_tokens": true}', "output_tokens is True"),
        ('{"arrival_s": 0, "prompt_tokens": 1, "output_tokens": 1, "prompt": 1}', "unknown field 'prompt'"),
        ('{"arrival_s": 0, "prompt_tokens": 1, "output_tokens": 1, "group": "a"}', "shared_tokens 0 of 1"),
        (
            '{"arrival_s": 0, "prompt_tokens": 1, "output_tokens": 1, "group": "a", "shared_tokens": 2}',
            "shared_tokens 2 of 1",
        ),
        ("", "has no requests"),
    ],
)
def test_a_wrong_trace_is_said_to_be(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text("\n" + line + "\n")
    with pytest.raises(SimulationError, match=said) as caught:
        read_trace(file)
    assert "trace.jsonl" in str(caught.value)


@pytest.mark.parametrize("text", ["", "a", "0", "10:5", "1:2:3", "-1", "1.5", "99999999999"])
def test_lengths_that_are_none(text: str) -> None:
    with pytest.raises(SimulationError):
        parse_lengths(text)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "ARTIFACT and --cost"),
        (["a", "--cost", "b"], "ARTIFACT and --cost"),
        (["--cost", "b", "--arrivals", "often"], "poisson, bursty"),
        (["--cost", "b", "--save-cost", "c"], "--save-cost with ARTIFACT"),
    ],
)
def test_a_wrong_command_line(args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *args]) == 2
    assert said in capsys.readouterr().err


def bench_result(*names: str) -> dict[str, Any]:
    rates = {
        "decode_tokens_per_s": 100.0,
        "prefill_tokens_per_s": 1000.0,
        "batch_decode_tokens_per_s": 400.0,
        "long_decode_tokens_per_s": 50.0,
    }
    row = {
        "engine": "mlcgen",
        "target": "cpu",
        "kind": "cpu",
        "targets": ["cpu"],
        "quantization": "q8",
        "size": {},
        "quality": {},
        "versions": {},
        "device": "a CPU",
        "metrics": {name: {"median": rate, "min": rate, "max": rate} for name, rate in rates.items()},
        "achieved": {},
        "skipped": {},
    }
    sizes = {"prompt": 512, "tokens": 128, "long_context": 4096, "batch": 8, "batch_prompt": 64, "repeat": 1}
    return {
        "version": 1,
        "command": "mlcgen bench",
        "model": {"name": "m"},
        "options": sizes,
        "machine": {"cpu": "a CPU", "cores": 2, "threads": 2},
        "versions": {},
        "devices": {"cpu": {"name": "a CPU", "peaks": {"bytes_per_s": {}, "ops_per_s": {}}}},
        "engines": [{"name": name, **row} for name in names],
        "not_run": [],
    }


def test_a_bench_result_gives_the_costs_that_it_measured(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(bench_result("q8")))
    times = read_step_times(file)
    assert "q8 on cpu" in times.source
    assert times.cost.seconds(StepShape(1, 1, 512 + 64)) == pytest.approx(0.01)
    assert times.cost.seconds(StepShape(1, 1, 4096 + 16)) == pytest.approx(0.02)
    assert times.cost.seconds(StepShape(8, 8, 8 * 128)) == pytest.approx(0.02)
    assert times.cost.seconds(StepShape.of([(0, 512, True)])) == pytest.approx(0.512)


@pytest.mark.parametrize(("kind", "ahead"), [("cpu", False), ("cuda", True), ("webgpu", True)])
def test_engines_on_gpus_choose_their_steps_ahead(tmp_path: Path, kind: str, ahead: bool) -> None:
    file, result = tmp_path / "bench.json", bench_result("q8")
    result["engines"][0]["kind"] = kind
    result["devices"][kind] = result["devices"]["cpu"]
    file.write_text(json.dumps(result))
    assert read_step_times(file).limits.looks_ahead == ahead
    assert json.loads(run("--cost", file, "--requests", 10, "--json"))["cases"][0]["summary"]["num_finished"] == 10


def test_of_several_rows_one_is_named(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(bench_result("q8", "q4")))
    with pytest.raises(SimulationError, match="q8 on cpu, q4 on cpu"):
        read_step_times(file)
    assert read_step_times(file, "q4").source.startswith("q4")
    with pytest.raises(SimulationError, match="'q5'"):
        read_step_times(file, "q5")


def test_an_engine_is_measured_in_shapes_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1_000_000))
    monkeypatch.setattr("mlcgen.simulate.calibrate.perf_counter", lambda: float(next(clock)))
    executor = NumpyExecutor(num_pages=120)  # checks every batch that it is given
    engine = make_engine(executor=executor, max_batch=4)
    done: list[tuple[int, int]] = []
    times = calibrate(engine, "tiny", lambda *at: done.append(at))
    assert {step.seconds for step in times.steps} == {1.0}, "the clock ticks once a step"
    assert {step.shape.tokens for step in times.steps} >= {1, 2, 4, 8, 64}
    assert times.limits == Limits(120, 4, 4, 64, CONTEXT, executor.page_shape[1])
    assert done[-1][0] == done[-1][1]
    assert engine.pool.num_free == 120
    assert times.cost.seconds(StepShape(4, 4, 40)) == pytest.approx(1.0)


@pytest.mark.parametrize(("max_batch", "max_tokens_per_step"), [(1, 2), (1, 64), (8, 8), (3, 5)])
def test_small_engines_are_measured_too(max_batch: int, max_tokens_per_step: int) -> None:
    executor = NumpyExecutor(num_pages=40, max_tokens_per_step=max_tokens_per_step)
    times = calibrate(make_engine(executor=executor, max_batch=max_batch), "tiny")
    assert max(step.shape.tokens for step in times.steps) <= max_tokens_per_step
    assert times.cost.seconds(StepShape(1, 1, 10)) > 0


def test_an_artifact_is_measured_and_its_steps_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("mlcgen.runtime.llm.load_engine", lambda *args, **options: make_engine())
    file = tmp_path / "cost.json"
    short = ["--requests", 5, "--prompt", 10, "--output", 4, "--json"]
    measured = json.loads(run("some-artifact", "--save-cost", file, *short))
    assert measured["source"] == "some-artifact"
    again = json.loads(run("--cost", file, *short))
    assert again["measured_steps"] == measured["measured_steps"]
    assert again["server"]["num_pages"] == measured["server"]["num_pages"] == 64

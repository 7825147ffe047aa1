"""`mlcgen bench` with engines of a few lines in the place of real ones; no figure is a measurement."""

import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from mlcgen.bench import link, process
from mlcgen.bench.contestants import Contestant, Options
from mlcgen.bench.engines import PEERS
from mlcgen.bench.link import open_link_probe
from mlcgen.bench.process import Worker
from mlcgen.bench.result import read_results
from mlcgen.bench.run import PROBES, bench, sizes
from mlcgen.bench.summary import ratios, summaries
from mlcgen.bench.table import footer, tables
from mlcgen.bench.work import DecodeReads
from mlcgen.checkpoint.source import gguf_file
from mlcgen.cli import main
from mlcgen.errors import BenchError, TargetError

from .fake_driver import install_cuda

# Answers as a worker does; peers are twice as fast.
ENGINE = """
import json, os, sys
spec = json.loads(sys.stdin.readline())
def answer(result):
    print(json.dumps({"result": result, "seconds": 0.5, "peak_memory_bytes": 1 << 20}), flush=True)
answer(None)
for line in sys.stdin:
    request = json.loads(line)
    if spec["engine"] == "perplexity":
        answer({"ppl": 8.5})
        continue
    if spec["engine"] == "probe":
        sizes = {str(size): 1e9 for size in request["sizes"]}
        answer({"bytes_per_s": sizes, "ops_per_s": {"float32": 1e10, "int8": 4e10}})
        continue
    if spec["engine"] == "link probe":
        assert spec["file"].endswith("weights/model.safetensors")
        answer(4e9)
        continue
    speed = 1 if spec["engine"] == "mlcgen" else 2
    tokens = sum(map(len, request["prompts"]))
    assert tokens + request["tokens"] * len(request["prompts"]) <= spec["context"], (tokens, request["tokens"], spec)
    decode = 10.0 * speed if request["tokens"] > 1 else None
    streamed = {"streamed_bytes_per_step": 3 << 20, "streamed_bytes_per_s": 1e9} if spec.get("weight_memory") else {}
    answer({"first_token_s": tokens / 100 / speed, "decode_tokens_per_s": decode} | streamed)
"""
MANIFEST: dict[str, Any] = {
    "schema_version": 2,
    "name": "small",
    "source": "nowhere",
    "model": {
        "model_type": "llama",
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "head_dim": 16,
        "vocab_size": 100,
        "max_position_embeddings": 256,
        "eos_token_ids": [],
        "rope": {"inv_freq": [1.0] * 8},
    },
    "quantization": "q4",
    "context_length": 128,
    "max_batch": 4,
    "kv": {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16, "page_size": 16, "dtype": "float16"},
    "entry": {"name": "forward", "inputs": [], "weights": []},
    "targets": [
        {
            "name": "cpu",
            "kind": "cpu",
            "arch": os.uname().machine,
            "features": [],
            "executor": "vm",
            "max_tokens_per_step": 512,
        }
        | {"file": "lib/cpu.so", "sha256": ""}
    ],
    "runtime_libraries": [],
    "weights": [{"file": "weights/model.safetensors", "sha256": "", "is_hashed_by_blocks": True, "bytes": 1}],
    "random_weights": False,
    "versions": {},
}
KERNELS = [
    {"name": "embedding_q8", "how": "", "calls": 1, "flops_per_token": 0, "weight_bytes": 9999},
    {"name": "linear_q4", "how": "", "calls": 2, "flops_per_token": 1000, "weight_bytes": 5000},
    {"name": "linear_q8", "how": "", "calls": 1, "flops_per_token": 2 * 64 * 100, "weight_bytes": 6400},
]
OPTIONS = Options(prompt=16, tokens=4, long_context=64, batch=8, threads=1, repeat=2)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    path = tmp_path / "small"
    path.mkdir()
    (path / "manifest.json").write_text(json.dumps(MANIFEST))
    (path / "report.json").write_text(json.dumps({"cpu": {"kernels": KERNELS, "fallbacks": []}}))
    (path / "lib").mkdir()
    (path / "lib/cpu.so").write_bytes(b"1234")
    return path


@pytest.fixture
def with_more_targets(artifact: Path) -> Path:
    """Two that every CPU runs, and one that no machine does."""
    cpu = MANIFEST["targets"][0]
    others = [{**cpu, "name": "cpu:plain"}, {**cpu, "name": "cpu:pdp11", "arch": "pdp11"}]
    verified = {"target": "cpu", "kl_divergence": 0.25, "top1_agreement": 0.75}
    (artifact / "manifest.json").write_text(
        json.dumps({**MANIFEST, "targets": [cpu, *others], "verify": verified, "versions": {"mlcgen": "0.1.0"}})
    )
    report = {"kernels": KERNELS, "fallbacks": []}
    (artifact / "report.json").write_text(json.dumps({"cpu": report, "cpu:plain": report, "cpu:pdp11": report}))
    return artifact


@pytest.fixture
def fake_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "COMMAND", [sys.executable, "-c", ENGINE])
    monkeypatch.setattr(process, "REST_S", 0.001)
    monkeypatch.setattr("mlcgen.bench.contestants._require", lambda peer: None)
    monkeypatch.setattr("mlcgen.bench.contestants.gguf_reads", lambda file, kv: DecodeReads(5000, 256))


@pytest.fixture
def result(artifact: Path, tmp_path: Path, fake_engines: None) -> dict[str, Any]:
    (tmp_path / "m.gguf").touch()
    return bench([artifact], peers=["llama.cpp", "openvino"], peer_model=tmp_path / "m.gguf", options=OPTIONS)


def worker_that(does: str, monkeypatch: pytest.MonkeyPatch) -> Worker:
    code = f"import sys, json, os, time\nsys.stdin.readline()\n{does}"
    monkeypatch.setattr(process, "COMMAND", [sys.executable, "-c", code])
    return Worker("an engine", {})


def test_medians_of_what_was_measured() -> None:
    samples = [{"a": 3.0, "b": 1.0}, {"a": 1.0}, {"a": 2.0}]
    assert summaries(samples) == {
        "a": {"median": 2.0, "min": 1.0, "max": 3.0, "samples": [3.0, 1.0, 2.0]},
        "b": {"median": 1.0, "min": 1.0, "max": 1.0, "samples": [1.0]},
    }


def test_ratios_of_what_both_have() -> None:
    assert ratios({"a": {"median": 3.0}, "b": {"median": 1.0}}, {"a": {"median": 2.0}}) == {"a": 1.5}


def test_what_a_short_context_and_a_small_batch_skip() -> None:
    short = Contestant("it", "mlcgen", "path", context=4100, max_batch=4)
    assert set(short.skipped(Options(threads=1))) == {"long", "batch"}
    assert short.spec(Options(threads=1), only_plain=False)["context"] == 640
    able = Contestant("it", "mlcgen", "path", context=4128, max_batch=8)
    assert able.skipped(Options(threads=1)) == {}
    assert able.spec(Options(threads=1), only_plain=False)["context"] == 4128
    assert able.spec(Options(threads=1), only_plain=True)["context"] == 640


def test_every_engine_has_every_figure_that_it_can_have(result: dict[str, Any]) -> None:
    ours, llama_cpp, openvino = result["engines"]
    speeds = {"prefill_tokens_per_s", "first_token_s", "decode_tokens_per_s", "long_decode_tokens_per_s"}
    every = {*speeds, "batch_decode_tokens_per_s", "load_s", "load_to_first_token_s", "peak_memory_bytes"}
    assert set(ours["metrics"]) == every - {"batch_decode_tokens_per_s"}
    assert "4 sequences" in ours["skipped"]["batch"]
    assert set(llama_cpp["metrics"]) == set(openvino["metrics"]) == every
    assert all(len(each["samples"]) == 2 for each in ours["metrics"].values())
    assert ours["metrics"]["load_to_first_token_s"]["median"] == 1.0
    assert ours["ratios"]["llama.cpp"]["prefill_tokens_per_s"] == pytest.approx(0.5)
    assert ours["ratios"]["llama.cpp"]["decode_tokens_per_s"] == pytest.approx(0.5)
    assert set(llama_cpp["ratios"]) == {"openvino"}
    json.dumps(result)


def test_achieved_is_from_the_report(result: dict[str, Any]) -> None:
    ours, llama_cpp, openvino = (row["achieved"] for row in result["engines"])
    kv_per_token = 2 * 2 * 2 * 16 * 2  # layers, key and value, heads, head_dim, float16
    assert ours["decode_bytes_per_s"] == pytest.approx(10 * (11400 + kv_per_token * 18))
    assert ours["decode_peak_share"] == pytest.approx(ours["decode_bytes_per_s"] / 1e9)
    flops = 16 * 2000 + 2 * 64 * 100 + 4 * 4 * 16 * 2 * 16 * 17 // 2
    assert ours["prefill_flops_per_s"] == pytest.approx(flops * 100 / 16)
    assert llama_cpp["decode_bytes_per_s"] == pytest.approx(20 * (5000 + 256 * 18))
    assert "decode_bytes_per_s" not in openvino


def test_the_tables(result: dict[str, Any]) -> None:
    speed, cost, compared = tables(result)
    names = [result["engines"][0]["name"], "llama.cpp", "openvino"]
    assert [row[0] for row in speed[1]] == [row[0] for row in cost[1]] == names
    assert speed[1][0][1:] == ["100", "160", "10.0", "10.0", "-"]
    assert cost[1][0][1:4] == ["0.50", "1.00", "1.0 MiB"]
    assert compared[1] == [[f"{names[0]} / {peer}", "0.50", "0.50", "0.50", "-"] for peer in names[1:]]
    text = "\n".join(footer(result))
    assert "10 GFLOP/s float32, 40 Gop/s int8" in text
    assert "decode of a batch: it was compiled for 4 sequences at most, not 8" in text


def test_streamed_weights(
    artifact: Path, tmp_path: Path, fake_engines: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m.gguf").touch()
    peer = ["--peer", "llama.cpp", "--peer-model", str(tmp_path / "m.gguf")]
    line = ["bench", str(artifact), *peer, "--prompt", "16", "--tokens", "4", "--repeat", "2", "--threads", "1"]
    files = ["--json", str(tmp_path / "out.json"), "--html", str(tmp_path / "out.html")]
    assert main([*line, "--weight-memory", "2GiB", *files]) == 0
    (result,) = read_results([tmp_path / "out.json"])
    ours, theirs = result["engines"]
    assert ours["metrics"]["streamed_bytes_per_step"]["median"] == 3 << 20
    assert (ours["achieved"]["streamed_bytes_per_s"], ours["achieved"]["link_share"]) == (1e9, 0.25)
    assert not {"streamed_bytes_per_s", "link_share"} & theirs["achieved"].keys()
    streaming = tables(result)[2]
    assert streaming[1] == [[str(artifact), "3.0 MiB", "1.0 (25%)"]]
    assert "4.0 GB/s over the link" in capsys.readouterr().out
    assert "weights in\n2GiB" in (tmp_path / "out.html").read_text()
    assert main([*line, "--weight-memory", "much"]) == 1
    assert "much" in capsys.readouterr().err


def test_the_rate_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(1 << 20))
    assert 0 < open_link_probe("cpu", str(tmp_path / "weights"))() < math.inf
    with pytest.raises(BenchError, match="random weights have no file"):
        open_link_probe("cpu")


def test_the_rate_of_copies_to_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver = install_cuda(monkeypatch, tmp_path)
    monkeypatch.setattr(link, "COPY", 4096)
    assert 0 < open_link_probe("cuda")() < math.inf
    assert driver.logged("cuMemcpyHtoDAsync_v2") == ["cuMemcpyHtoDAsync_v2 4096"] * 3 * link.COPIES
    assert "cuMemHostAlloc 4096 0" in driver.log, "from memory that is pinned"


def test_every_target_is_a_row(with_more_targets: Path, fake_engines: None) -> None:
    result = bench([with_more_targets], ["all"], options=OPTIONS)
    assert [row["target"] for row in result["engines"]] == ["cpu", "cpu:plain"]
    for row in result["engines"]:
        assert (row["kind"], row["device"]) == ("cpu", result["devices"]["cpu"]["name"])
        assert row["metrics"]["decode_tokens_per_s"]["samples"] == [10.0, 10.0]
        assert row["size"] == {"weights_bytes": 1, "code_bytes": 4}
        assert row["versions"] == {"mlcgen": "0.1.0"}
    assert [row["quality"] for row in result["engines"]] == [{"kl_divergence": 0.25, "top1_agreement": 0.75}, {}]
    (absent,) = result["not_run"]
    assert absent["target"] == "cpu:pdp11"
    assert absent["reason"].startswith("compiled, not run: needs pdp11, this is ")
    assert [row[0].rpartition(" ")[2] for row in tables(result)[0][1]] == ["cpu", "cpu:plain"]
    assert any("cpu:pdp11: compiled, not run" in line for line in footer(result))
    assert any("kl divergence 0.25" in line for line in footer(result))


def test_named_targets(with_more_targets: Path, fake_engines: None) -> None:
    result = bench([with_more_targets], ["cpu:plain", "cpu:plain"], options=OPTIONS)
    assert [row["target"] for row in result["engines"]] == ["cpu:plain"]
    assert [row[0] for row in tables(result)[0][1]] == [str(with_more_targets)]
    with pytest.raises(TargetError, match="target 'cuda' is not in this artifact"):
        bench([with_more_targets], ["cpu", "cuda"], options=OPTIONS)
    with pytest.raises(TargetError, match="needs pdp11"):
        bench([with_more_targets], ["cpu:pdp11"], options=OPTIONS)


def test_no_target_that_runs_here(artifact: Path) -> None:
    target = {**MANIFEST["targets"][0], "arch": "pdp11"}
    (artifact / "manifest.json").write_text(json.dumps({**MANIFEST, "targets": [target]}))
    with pytest.raises(TargetError, match="no target that runs here"):
        bench([artifact], ["all"], options=OPTIONS)


def test_the_peaks_of_each_device(artifact: Path) -> None:
    contestants = [
        Contestant("a", "mlcgen", "a", 1, reads=DecodeReads(100, 1), kind="cpu"),
        Contestant("a", "mlcgen", "a", 1, reads=DecodeReads(50, 1), kind="cuda"),
        Contestant("b", "mlcgen", "b", 1, reads=DecodeReads(10, 1), kind="cpu"),
        Contestant("openvino", "openvino", "c", 1, kind="webgpu"),
    ]
    assert {kind: sizes(contestants, kind) for kind in PROBES} == {"cpu": [10, 100], "cuda": [50], "webgpu": []}


def test_a_device_without_a_probe_has_no_shares(
    artifact: Path, fake_engines: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlcgen.bench.run.PROBES", {})
    result = bench([artifact], options=OPTIONS)
    assert result["devices"]["cpu"]["peaks"] == {"bytes_per_s": {}, "ops_per_s": {}}
    assert set(result["engines"][0]["achieved"]) == {"decode_bytes_per_s", "prefill_flops_per_s"}
    assert "not measured" in footer(result)[0]


def test_perplexity_is_measured_where_there_is_a_text(artifact: Path, tmp_path: Path, fake_engines: None) -> None:
    result = bench([artifact], options=OPTIONS, text=tmp_path / "some.txt")
    assert result["engines"][0]["quality"] == {"perplexity": 8.5}
    assert result["options"]["text"] == "some.txt"


def test_the_verb_prints_and_writes(
    artifact: Path, tmp_path: Path, fake_engines: None, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["bench", str(artifact), "--prompt", "16", "--tokens", "4", "--repeat", "1", "--threads", "1"]
    files = ["--json", str(tmp_path / "out.json"), "--html", str(tmp_path / "out.html")]
    assert main([*line, "-t", "cpu", "-t", "auto", *files]) == 0
    assert "machine" in capsys.readouterr().out
    assert 'value="10.0"' in (tmp_path / "out.html").read_text()
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["options"]["prompt"] == 16
    assert written["engines"][0]["metrics"]["decode_tokens_per_s"]["samples"] == [10.0]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--peer vllm", "no peer 'vllm'; have: llama.cpp, openvino"),
        ("--tokens 1", "--tokens"),
        ("--repeat 0", "--repeat"),
    ],
)
def test_usage_errors(line: str, says: str, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(artifact), *line.split()]) == 2
    assert says in capsys.readouterr().err


def test_a_peer_that_is_not_installed(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BenchError, match=r"openvino is not installed: pip install 'mlcgen\[bench\]'"):
        bench([artifact], peers=["openvino"], options=OPTIONS)


def test_a_peer_without_a_model(artifact: Path, fake_engines: None) -> None:
    with pytest.raises(BenchError, match="source 'nowhere'; name one with --peer-model"):
        bench([artifact], peers=["llama.cpp"], options=OPTIONS)
    with pytest.raises(BenchError, match="is not a file"):
        bench([artifact], peers=["llama.cpp"], peer_model="missing.gguf", options=OPTIONS)


def test_a_prompt_beyond_the_context(artifact: Path) -> None:
    with pytest.raises(BenchError, match="a context of 128 tokens, too short for --prompt 512"):
        bench([artifact], options=Options(threads=1))


def test_builds_of_different_models(artifact: Path) -> None:
    other = shutil.copytree(artifact, artifact.parent / "other")
    manifest = {**MANIFEST, "model": {**MANIFEST["model"], "num_layers": 3}}
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BenchError, match="not builds of one model"):
        bench([artifact, other], options=OPTIONS)


def test_the_gguf_file_of_a_source(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").touch()
    assert gguf_file(tmp_path / "m.gguf") == tmp_path / "m.gguf"
    assert gguf_file(str(tmp_path)) is None
    assert gguf_file("") is None


ANSWER = 'print(json.dumps({"result": 1, "seconds": 2, "peak_memory_bytes": 3}), flush=True)\n'


@pytest.mark.parametrize(
    ("does", "says"),
    [
        ("raise ValueError('no such model')", "ValueError: no such model (exit status 1)"),
        ("sys.exit(3)", "exit status 3"),
        ("print('bad magic', file=sys.stderr, flush=True)\nos.abort()", "bad magic (signal 6)"),
    ],
)
def test_an_engine_that_dies(does: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BenchError) as caught:
        worker_that(does, monkeypatch)
    assert str(caught.value) == f"an engine failed: {says}"
    with worker_that(f"{ANSWER}sys.stdin.readline()\n{does}", monkeypatch) as worker:
        assert worker.opened.result == 1
        with pytest.raises(BenchError, match="an engine failed: "):
            worker.call(prompts=[])


def test_nothing_is_left_running(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt), worker_that(f"{ANSWER}time.sleep(600)", monkeypatch) as worker:
        raise KeyboardInterrupt
    with pytest.raises(ProcessLookupError):
        os.kill(worker._process.pid, 0)


def test_an_engine_has_gone_to_sleep_before_the_next_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    spin = "end = time.process_time() + 0.3\nwhile time.process_time() < end: pass\ntime.sleep(600)"
    with worker_that(f"{ANSWER}sys.stdin.readline()\n{ANSWER}{spin}", monkeypatch) as worker:
        worker.call()
        assert process._cpu_ticks(worker._process.pid) >= 0.3 * os.sysconf("SC_CLK_TCK")


def test_the_peers_are_imported_only_where_they_run() -> None:
    assert set(PEERS) == {"llama.cpp", "openvino", "torch"}
    assert not {"xllamacpp", "openvino_genai"} & set(sys.modules)

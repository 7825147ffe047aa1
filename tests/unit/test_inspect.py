import json
import sys
from types import ModuleType
from typing import Any

import pytest

from mlcgen.cli import main
from mlcgen.cli_output import format_bytes
from mlcgen.errors import ArtifactError

MANIFEST: dict[str, Any] = {
    "schema_version": 2,
    "name": "tiny-q4",
    "model": {"model_type": "llama", "num_layers": 2, "hidden_size": 64, "vocab_size": 100, "eos_token_ids": [2]},
    "quantization": "q4",
    "kv": {"dtype": "float16", "page_size": 16, "num_layers": 2, "num_kv_heads": 2, "head_dim": 32},
    "context_length": 128,
    "max_batch": 8,
    "targets": [{"name": "cpu:x86-64-v3", "arch": "x86_64", "features": ["avx2", "fma"], "executor": "vm"}],
    "weights": [{"file": "weights/a.safetensors", "sha256": "0", "bytes": 3 << 20}],
    "versions": {"mlcgen": "0.1.0", "apache-tvm": "0.27"},
    "source": "tiny",
    "verify": None,
}
KERNEL = {"name": "linear", "how": "kernel: linear.py", "calls": 7, "flops_per_token": 12345, "weight_bytes": 2048}
REPORT = {"cpu:x86-64-v3": {"kernels": [KERNEL], "fallbacks": ["softmax: no rule,\ngeneric schedule"]}}


@pytest.fixture(autouse=True)
def artifact(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("mlcgen.artifact")
    module.__dict__.update(read_manifest=lambda path: MANIFEST, read_report=lambda path: REPORT)
    monkeypatch.setitem(sys.modules, "mlcgen.artifact", module)
    return module


def test_shows_every_kernel_with_how_it_was_made(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "dist/tiny"]) == 0
    out = capsys.readouterr().out
    assert "cpu:x86-64-v3 (x86_64, vm), needs: avx2 fma" in out
    assert "q4, 3.0 MiB of weights" in out
    assert "no; run mlcgen verify" in out
    (row,) = [line for line in out.splitlines() if line.startswith("linear")]
    assert row.split() == ["linear", "kernel:", "linear.py", "7", "12,345", "2.0", "KiB"]


def test_warns_of_each_fallback_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", "dist/tiny"])
    assert capsys.readouterr().err == "warning: cpu:x86-64-v3: softmax: no rule, generic schedule\n"


def test_json_has_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "dist/tiny", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"manifest": MANIFEST, "report": REPORT}
    assert captured.err == ""


def test_a_damaged_artifact_is_one_line(artifact: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def damaged(path: object) -> None:
        raise ArtifactError("manifest.json is not JSON; compile again")

    artifact.__dict__["read_manifest"] = damaged
    assert main(["inspect", "dist/tiny"]) == 1
    assert capsys.readouterr().err == "mlcgen: manifest.json is not JSON; compile again\n"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 << 29, "2.5 GiB"), (3 << 40, "3.0 TiB")]
)
def test_format_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text

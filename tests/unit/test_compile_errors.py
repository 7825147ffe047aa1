"""A compile that fails says why in one typed error and leaves nothing behind; one that works is repeatable."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from mlcgen.artifact import WeightWriter, read_manifest
from mlcgen.compile import compile
from mlcgen.errors import ArtifactError, CheckpointError, CompileError, TargetError, UnsupportedError

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 48,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}
LAYER = {
    "input_layernorm": (32,),
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32),
    "post_attention_layernorm": (32,),
    "mlp.gate_proj": (64, 32),
    "mlp.up_proj": (64, 32),
    "mlp.down_proj": (32, 64),
}
SHAPES = {
    "model.embed_tokens.weight": (48, 32),
    **{f"model.layers.0.{name}.weight": shape for name, shape in LAYER.items()},
    "model.norm.weight": (32,),
}


def write_model(path: Path, **shapes: Any) -> Path:
    """A random llama; a tensor's shape can be changed, or None leaves it out."""
    rng = np.random.default_rng(0)
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    wanted = {name: shape for name, shape in {**SHAPES, **shapes}.items() if shape}
    tensors = {name: rng.standard_normal(shape, np.float32) for name, shape in wanted.items()}
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "dist").mkdir()
    return tmp_path / "dist" / "tiny"


def check_fails(error: type[BaseException], match: str | None, model: Path, output: Path, **options: Any) -> None:
    with pytest.raises(error, match=match):
        compile(model, output=output, quantization=options.pop("quantization", "f32"), **options)
    assert os.listdir(output.parent) == []


def test_missing_tensor(tmp_path: Path, output: Path) -> None:
    model = write_model(tmp_path / "model", **{"model.norm.weight": None})
    check_fails(CheckpointError, r"has no tensor 'model\.norm\.weight'", model, output)


def test_wrong_shape(tmp_path: Path, output: Path) -> None:
    model = write_model(tmp_path / "model", **{"model.layers.0.mlp.up_proj.weight": (64, 31)})
    check_fails(CheckpointError, r"up_proj\.weight' has shape \(64, 31\), its config says \(64, 32\)", model, output)


def test_truncated_weights(model: Path, output: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    check_fails(CheckpointError, "is damaged", model, output)


def test_no_model(tmp_path: Path, output: Path) -> None:
    (tmp_path / "empty").mkdir()
    check_fails(CheckpointError, "config.json", tmp_path / "empty", output)


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (UnsupportedError, "quantization 'q3' is not supported; have: f32, f16", {"quantization": "q3"}),
        (UnsupportedError, "--page-size 0 is not between 1 and 256", {"page_size": 0}),
        (UnsupportedError, "--page-size 257 is not between 1 and 256", {"page_size": 257}),
        (UnsupportedError, "--context-length 65 is not between 1 and the model's 64", {"context_length": 65}),
        (UnsupportedError, "--context-length 0 is not", {"context_length": 0}),
        (UnsupportedError, "--max-batch 0 is not", {"max_batch": 0}),
        (UnsupportedError, "--layers 0 is not between 1 and", {"layers": 0}),
        (UnsupportedError, "--layers 99 is not between 1 and", {"layers": 99}),
        (UnsupportedError, "--kv-dtype 'int3' is not supported; have: auto", {"kv_dtype": "int3"}),
        (TargetError, "target 'tpu' is not supported; have: cpu", {"targets": ["tpu"]}),
        (TargetError, "target 'cpu:z80' is not known; have: cpu", {"targets": ["cpu", "cpu:z80"]}),
    ],
)
def test_options(model: Path, output: Path, error: type[Exception], match: str, options: dict[str, Any]) -> None:
    check_fails(error, match, model, output, **options)


def test_output_that_is_no_artifact(model: Path, output: Path) -> None:
    output.write_text("precious")
    with pytest.raises(ArtifactError, match="exists and is no artifact; choose another output"):
        compile(model, output=output, quantization="f32")
    assert output.read_text() == "precious"


def test_full_disk(model: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also: the artifact of an earlier compile stays as it was."""

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    output.mkdir()
    old = json.dumps({"schema_version": 1, "targets": [], "weights": []})
    (output / "manifest.json").write_text(old)
    monkeypatch.setattr(WeightWriter, "write", fail)
    with pytest.raises(CompileError, match=r"no space left on the disk of .*dist; nothing was written"):
        compile(model, output=output, quantization="f32")
    assert os.listdir(output.parent) == ["tiny"]
    assert os.listdir(output) == ["manifest.json"]
    assert (output / "manifest.json").read_text() == old


def test_ctrl_c_while_weights_are_converted(model: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, seen = WeightWriter.write, []

    def interrupt(self: WeightWriter, name: str, array: Any) -> None:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(name)
        write(self, name, array)

    monkeypatch.setattr(WeightWriter, "write", interrupt)
    check_fails(KeyboardInterrupt, None, model, output)
    assert len(seen) == 2


def test_two_compiles_give_the_same_files(model: Path, output: Path) -> None:
    again = output.parent / "again"
    for path in (output, again):
        compile(model, output=path, quantization="q4")
    first, second = read_manifest(output), read_manifest(again)
    for kind in ("targets", "weights", "runtime_libraries"):
        assert [entry["sha256"] for entry in first[kind]] == [entry["sha256"] for entry in second[kind]]
    assert first == second
    assert sorted(os.listdir(output.parent)) == ["again", "tiny"]


def test_heads_that_no_kernel_takes(model: Path, output: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "head_dim": 12}))
    check_fails(UnsupportedError, "multiples of 16, not of 12", model, output, random_weights=True)

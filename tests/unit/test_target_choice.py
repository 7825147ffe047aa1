"""Which of an artifact's targets run on which NVIDIA GPU, and which of them is taken."""

from pathlib import Path
from typing import Any

import pytest

from mlcgen.errors import TargetError
from mlcgen.runtime import target_choice
from mlcgen.runtime.target_choice import cannot_run, choose_target, not_taken

from .fake_driver import FakeDriver, install_cuda

CPU = {"name": "cpu:x86-64-v2", "kind": "cpu", "arch": "x86_64", "executor": "vm", "features": ["popcnt", "sse4.2"]}


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeDriver:
    return install_cuda(monkeypatch, tmp_path)


def cuda_entry(arch: str) -> dict[str, Any]:
    return {"name": f"cuda:{arch}", "kind": "cuda", "arch": arch, "executor": "plan", "features": []}


@pytest.mark.parametrize(
    ("gpu", "arch", "runs"),
    [
        (90, "sm_90", True),
        (90, "sm_80", False),
        (90, "sm_89", False),
        (90, "compute_80", True),
        (90, "compute_90", True),
        (86, "sm_80", True),
        (86, "sm_86", True),
        (86, "sm_89", False),
        (86, "sm_90", False),
        (86, "compute_80", True),
        (86, "compute_90", False),
        (89, "sm_86", True),
        (100, "sm_90", False),
        (103, "sm_100", False),
        (120, "sm_120", True),
        (121, "sm_120", False),
        (120, "sm_90", False),
        (120, "compute_80", True),
        (75, "sm_80", False),
        (75, "compute_80", False),
    ],
)
def test_what_runs_where(driver: FakeDriver, gpu: int, arch: str, runs: bool) -> None:
    driver.set(arch=gpu)
    assert cannot_run(cuda_entry(arch)) == (None if runs else f"needs {arch}, this GPU is sm_{gpu}")


@pytest.mark.parametrize(
    ("gpu", "best"),
    [(90, "sm_90"), (80, "sm_80"), (86, "sm_86"), (89, "sm_86"), (100, "compute_80"), (120, "compute_80")],
)
@pytest.mark.parametrize("order", [1, -1])
def test_the_newest_machine_code_wins(driver: FakeDriver, gpu: int, best: str, order: int) -> None:
    driver.set(arch=gpu)
    entries = [CPU, *map(cuda_entry, ("sm_80", "sm_86", "sm_90", "compute_80"))][::order]
    assert choose_target(entries, "auto")["arch"] == best
    assert choose_target(entries, "cuda")["arch"] == best
    assert choose_target(entries, "cuda:compute_80")["arch"] == "compute_80"


def test_no_target_for_this_gpu(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(target_choice, "host_features", lambda: frozenset(["popcnt", "sse4.2"]))
    driver.set(arch=75)
    entries = [CPU, *map(cuda_entry, ("sm_80", "compute_80"))]
    assert choose_target(entries, "auto")["name"] == CPU["name"]
    says = r"\(cuda:sm_80: needs sm_80, this GPU is sm_75; cuda:compute_80: needs compute_80, .*\); compile it for this"
    with pytest.raises(TargetError, match=says):
        choose_target(entries, "cuda")
    with pytest.raises(TargetError, match=r"'cuda:sm_90' is not in this artifact; it has: cpu:x86-64-v2, cuda:sm_80"):
        choose_target(entries, "cuda:sm_90")


def test_targets_without_a_gpu(driver: FakeDriver) -> None:
    driver.set(devices=0)
    with pytest.raises(TargetError, match=r"\(cuda:sm_90: the NVIDIA driver finds no GPU\)"):
        choose_target([cuda_entry("sm_90")], "auto")


def test_why_the_others_were_not_taken(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(target_choice, "host_features", lambda: frozenset(["popcnt", "sse4.2"]))
    driver.set(arch=90)
    entries = [CPU, *map(cuda_entry, ("sm_90", "sm_80"))]
    assert not_taken(entries, "cuda:sm_90") == {
        CPU["name"]: "slower here, as a rule",
        "cuda:sm_80": "needs sm_80, this GPU is sm_90",
    }

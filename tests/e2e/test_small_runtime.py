"""An artifact runs where the compiler, torch and transformers are absent, on the runtime library that it carries."""

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest

import mlcgen
from mlcgen.artifact import read_manifest

ABSENT = ["tvm", "torch", "transformers", "ml_dtypes", "safetensors", "ziglang", "huggingface_hub"] + [
    f"mlcgen.{name}" for name in ("passes", "targets", "models", "compile", "link", "checkpoint", "weights")
]
NEEDED = ["numpy", "tokenizers", "jinja2", "MarkupSafe", "apache-tvm-ffi"]  # distributions

# Every finder of this Python, less what is absent: find_spec says None and import fails, as if never installed.
HIDE = """
import sys
absent = {absent}
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if any(name == each or name.startswith(each + ".") for each in absent):
            return None
        return self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
assert not any(name in sys.modules for name in absent)
"""
RUN = """
import json, sys, time
start = time.perf_counter()
from mlcgen.runtime.llm import LLM
imported = time.perf_counter()
from mlcgen.runtime.sampler import SamplingParams
llm = LLM({path!r}, num_pages=16)
loaded = time.perf_counter()
outputs = llm.generate({prompts}, SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True))
assert not any(output.error for output in outputs), outputs
print(json.dumps({{
    "ids": [list(output.token_ids) for output in outputs],
    "import_s": imported - start,
    "load_s": loaded - imported,
    "modules": sorted(sys.modules),
    "libraries": [line.split()[-1] for line in open("/proc/self/maps") if line.rstrip().endswith("libtvm_runtime.so")],
}}))
"""
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [5], list(range(40))]


def run(path: Path, prelude: str = "") -> dict[str, Any]:
    program = prelude + RUN.format(path=str(path), prompts=PROMPTS)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def among(modules: list[str], names: list[str]) -> list[str]:
    return [module for module in modules if any(module == name or module.startswith(f"{name}.") for name in names)]


def directory_size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and file.suffix != ".pyc")


def installed_size(name: str) -> int:
    files = distribution(name).files or []
    return sum(file.locate().stat().st_size for file in files if file.suffix != ".pyc" and file.locate().exists())


def test_runs_without_the_compiler(small_artifact: Path, record_property: Callable[[str, object], None]) -> None:
    usual, small = run(small_artifact), run(small_artifact, HIDE.format(absent=ABSENT))

    assert small["ids"] == usual["ids"]
    assert [len(ids) for ids in small["ids"]] == [24, 24, 24]
    assert among(small["modules"], ABSENT) == []
    carried = small_artifact / read_manifest(small_artifact)["runtime_libraries"][0]["file"]
    assert set(small["libraries"]) == {str(carried.resolve())}
    # The usual run has all of it installed, and leaves it alone too (tvm_ffi looks for ml_dtypes).
    assert among(usual["modules"], [name for name in ABSENT if name != "ml_dtypes"]) == []

    sizes = {name: installed_size(name) for name in NEEDED}
    sizes["libtvm_runtime.so"] = carried.stat().st_size
    sizes["mlcgen.runtime"] = directory_size(Path(mlcgen.__path__[0]) / "runtime")
    total = sum(sizes.values()) / 1e6
    print(f"\nimport of mlcgen.runtime.llm: {small['import_s']:.2f} s, load: {small['load_s']:.2f} s")
    print(f"installed: {total:.1f} MB (" + ", ".join(f"{name} {size / 1e6:.1f}" for name, size in sizes.items()) + ")")
    record_property("import_seconds", round(small["import_s"], 3))
    record_property("load_seconds", round(small["load_s"], 3))
    record_property("installed_megabytes", round(total, 1))
    assert small["import_s"] < 5  # generous: other work may share the machine
    assert total < 150


def test_the_simulated_absence_is_one(small_artifact: Path) -> None:
    """Without the library in the artifact, the same run must fail, and say what to install."""
    manifest = read_manifest(small_artifact)
    bare = shutil.copytree(small_artifact, small_artifact.parent / "bare")
    (bare / "manifest.json").write_text(json.dumps({**manifest, "runtime_libraries": []}))
    program = HIDE.format(absent=ABSENT) + RUN.format(path=str(bare), prompts=PROMPTS)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "ArtifactError" in done.stderr


def test_two_artifacts_in_one_process(small_artifact: Path) -> None:
    """Each carries the library, and it can be loaded once only."""
    other = shutil.copytree(small_artifact, small_artifact.parent / "other")
    alone = HIDE.format(absent=ABSENT) + RUN.format(path=str(small_artifact), prompts=PROMPTS)
    done = subprocess.run(
        [sys.executable, "-c", alone + RUN.format(path=str(other), prompts=PROMPTS)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads(line)["ids"] for line in done.stdout.splitlines())
    assert first == second


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
@pytest.mark.parametrize("first", [True, False])
def test_torch_can_still_be_used(small_artifact: Path, first: bool) -> None:
    """Keeping torch out of tvm_ffi's import must not keep it from the user, before or after."""
    use = "\nimport torch\nassert torch.ones(2).sum().item() == 2\n"
    program = RUN.format(path=str(small_artifact), prompts=PROMPTS)
    program = use + program if first else program + use
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert ("torch" in json.loads(done.stdout.splitlines()[-1])["modules"]) == first

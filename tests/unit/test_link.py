"""Linking: a compiler of this machine, else zig, and libraries that are really for the machine they claim."""

import importlib.util
import json
import os
import platform
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlcgen import link
from mlcgen.artifact import library_file, read_manifest
from mlcgen.compile import compile
from mlcgen.errors import CompileError
from mlcgen.runtime.executor import StepInput
from mlcgen.runtime.load import load_executor
from mlcgen.runtime.target_choice import cannot_run

CONFIG = {
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
}
MACHINES = {"cpu:x86-64-v3": 62, "cpu:aarch64": 183}  # e_machine, from <elf.h>
HERE = platform.machine()
HAS_ZIG = importlib.util.find_spec("ziglang") is not None
needs_zig = pytest.mark.skipif(not HAS_ZIG, reason="needs ziglang")


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes PATH hold these programs alone."""

    def install(*names: str) -> Path:
        for name in names:
            (tmp_path / name).write_text("#!/bin/sh\n")
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        return tmp_path

    return install


def without_zig(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@pytest.mark.parametrize("names", [("cc", "gcc", "clang"), ("gcc", "clang"), ("clang",)])
def test_a_compiler_of_this_machine(programs: Any, names: tuple[str, ...]) -> None:
    path = programs(*names)
    assert link.linker(HERE) == [str(path / names[0])]


@pytest.mark.parametrize(("here", "there"), [("x86_64", "aarch64"), ("aarch64", "x86_64")])
def test_a_cross_compiler(programs: Any, monkeypatch: pytest.MonkeyPatch, here: str, there: str) -> None:
    monkeypatch.setattr(platform, "machine", lambda: here)
    path = programs("cc", f"{there}-linux-gnu-gcc")
    assert link.linker(there) == [str(path / f"{there}-linux-gnu-gcc")]
    assert link.linker(here) == [str(path / "cc")]


@needs_zig
@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
def test_zig_where_there_is_no_compiler(programs: Any, arch: str) -> None:
    programs()
    assert link.linker(arch) == [sys.executable, "-m", "ziglang", "cc", "-target", f"{arch}-linux-gnu"]


@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
def test_no_linker(programs: Any, monkeypatch: pytest.MonkeyPatch, arch: str) -> None:
    programs()
    without_zig(monkeypatch)
    with pytest.raises(
        CompileError, match=rf"no linker for {arch}: install a C compiler, or pip install mlcgen\[cross"
    ):
        link.linker(arch)


def test_the_linker_s_words(programs: Any, tmp_path: Path) -> None:
    programs("cc")
    (tmp_path / "cc").write_text("#!/bin/sh\necho 'undefined symbol: f' >&2\nexit 1\n")

    class Executable:
        def export_library(self, path: str, fcompile: Any) -> None:
            fcompile(path, ["a.o"])

    with pytest.raises(CompileError, match=r"linking cpu\.so with .*cc failed: undefined symbol: f"):
        link.link_library(Executable(), tmp_path / "lib" / "cpu.so", HERE)


@needs_zig
def test_zig_keeps_its_cache_where_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_CACHE_HOME", "ZIG_GLOBAL_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with link._zig_cache() as environment:
        assert environment["ZIG_GLOBAL_CACHE_DIR"] == str(tmp_path / ".cache" / "zig")
    monkeypatch.setenv("HOME", os.devnull)  # no directory can be made there, even by root
    with link._zig_cache() as environment:
        cache = Path(environment["ZIG_GLOBAL_CACHE_DIR"])
        assert cache.is_dir()
    assert not cache.exists()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Linked by zig alone: there is no PATH."""
    if not HAS_ZIG:
        pytest.skip("needs ziglang")
    path = tmp_path_factory.mktemp("link")
    (path / "config.json").write_text(json.dumps(CONFIG))
    targets = ["cpu", *MACHINES]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")
        return compile(path, targets, "f32", path / "artifact", random_weights=True)


@pytest.mark.parametrize("target", MACHINES)
def test_libraries_for_the_right_machine(compiled: Path, target: str) -> None:
    header = (compiled / library_file(target)).read_bytes()[:20]
    assert header[:6] == b"\x7fELF\x02\x01"  # 64 bits, little endian
    assert struct.unpack_from("<HH", header, 16) == (3, MACHINES[target])  # a shared object


def test_variants_agree(compiled: Path) -> None:
    variant = next(entry for entry in read_manifest(compiled)["targets"] if entry["name"] == "cpu:x86-64-v3")
    if problem := cannot_run(variant):
        pytest.skip(problem)
    length = 7
    batch = StepInput(
        input_ids=np.arange(3, 3 + length, dtype=np.int32),
        positions=np.arange(length, dtype=np.int32),
        slot_mapping=np.arange(length, dtype=np.int32),
        block_table=np.zeros((1, 1), np.int32),
        seq_lens=np.array([length], np.int32),
        query_start=np.array([0, length], np.int32),
        logit_rows=np.arange(length, dtype=np.int32),
    )
    logits = [
        load_executor(compiled, target=name, num_pages=1).executor.step(batch) for name in ("cpu", variant["name"])
    ]
    assert np.abs(logits[0]).max() > 0.01
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-3)

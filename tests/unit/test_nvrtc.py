"""CUDA C++ to machine code: what users read when it fails, and the assembler's report of what kernels need."""

import ctypes
from pathlib import Path

import pytest

from mlcgen import nvrtc
from mlcgen.errors import CompileError
from mlcgen.nvrtc import compile_cuda, find_library, resources

needs_nvrtc = pytest.mark.skipif(find_library() is None, reason=f"needs NVRTC: {nvrtc.INSTALL}")
KERNEL = 'extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= 2; }'
# As ptxas of CUDA 13 writes it.
LOG = """
ptxas info    : 11 bytes gmem
ptxas info    : Compiling entry function 'plain' for 'sm_90a'
ptxas info    : Function properties for plain
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 1024 bytes smem
ptxas info    : Compile time = 3.211 ms
ptxas info    : Compiling entry function 'spilling' for 'sm_90a'
ptxas info    : Function properties for spilling
    56 bytes stack frame, 44 bytes spill stores, 48 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 56 bytes cumulative stack size
ptxas info    : Compiling entry function 'unfinished' for 'sm_90a'
"""


def test_resources() -> None:
    expected = {
        "plain": {"registers": 32, "spill_bytes": 0},
        "spilling": {"registers": 255, "spill_bytes": 44},
    }
    assert resources(LOG) == expected


def test_no_kernels_need_nothing() -> None:
    assert resources("") == resources("ptxas info    : 11 bytes gmem\n") == {}


def test_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "find_library", lambda: None)
    with pytest.raises(CompileError) as caught:
        compile_cuda(KERNEL, "sm_80")
    assert str(caught.value) == "the CUDA compiler NVRTC is not installed: pip install 'mlcgen[cuda]'"


def test_no_library_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(nvrtc, "_wheel_folders", list)
    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert find_library() is None


def test_the_wheel_comes_before_the_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "lib" / "libnvrtc.so.13"
    file.parent.mkdir()
    file.touch()
    monkeypatch.setattr(nvrtc, "_wheel_folders", lambda: [tmp_path / "none", tmp_path])
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("the loader was asked"))
    assert find_library() == file


@needs_nvrtc
def test_missing_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    library = nvrtc._library()
    monkeypatch.setattr(nvrtc, "_library", lambda: library)
    monkeypatch.setattr(nvrtc, "_wheel_folders", list)
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    with pytest.raises(CompileError, match=r"headers are not installed: pip install"):
        compile_cuda(KERNEL, "sm_80")


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_a_kernel(arch: str) -> None:
    cubin, log = compile_cuda(KERNEL, arch)
    assert cubin.startswith(b"\x7fELF")
    found = resources(log)
    assert found.keys() == {"twice"}
    assert 1 < found["twice"]["registers"] < 64
    assert found["twice"]["spill_bytes"] == 0


@needs_nvrtc
def test_spills_are_counted() -> None:
    body = "float v[64]; for (int i = 0; i < 64; i++) v[i] = x[i * 32]; __syncthreads();"
    body += "for (int i = 0; i < 64; i++) x[i * 32 + 1] = v[i] * v[63 - i] + v[(i * 7) % 64];"
    source = f'extern "C" __global__ void __launch_bounds__(1024, 2) many(float* x) {{ {body} }}'
    found = resources(compile_cuda(source, "sm_80")[1])["many"]
    assert found["registers"] <= 32
    assert found["spill_bytes"] > 0


@needs_nvrtc
def test_a_bad_source_is_an_error_in_the_compilers_words() -> None:
    source = f'{KERNEL}\nextern "C" __global__ void wrong() {{ float value = missing_name; }}'
    with pytest.raises(CompileError) as caught:
        compile_cuda(source, "sm_86")
    message = str(caught.value)
    assert message.startswith("NVRTC could not compile the kernels for sm_86: mlcgen.cu(2): error:")
    assert "missing_name" in message
    assert "\n" not in message


@needs_nvrtc
def test_an_unknown_architecture_is_an_error() -> None:
    with pytest.raises(CompileError, match=r"for sm_1: .*architecture"):
        compile_cuda(KERNEL, "sm_1")


@needs_nvrtc
def test_a_missing_header_is_an_error() -> None:
    with pytest.raises(CompileError, match=r"nothing\.cuh"):
        compile_cuda('#include "nothing.cuh"', "sm_80")

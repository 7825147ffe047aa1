import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from mlcgen import cli_output, nvrtc
from mlcgen import devices as module
from mlcgen.devices import Device, devices
from mlcgen.errors import CompileError
from mlcgen.runtime import cuda

GIB = 1 << 30


def compiles(source: str, arch: str) -> tuple[bytes, str]:
    return b"", ""


def does_not_compile(source: str, arch: str) -> tuple[bytes, str]:
    raise CompileError("CUDA's headers are not installed")


def with_gpu(
    monkeypatch: pytest.MonkeyPatch,
    arch: str = "sm_90",
    cuda_version: int = 13000,
    has_failed: bool = False,
    has_nvrtc: bool = True,
) -> Device:
    """The CUDA entry of a machine with such a GPU and driver."""

    def set_name(buffer: ctypes.Array[ctypes.c_char], size: int, ordinal: int) -> int:
        buffer.value = b"NVIDIA H100 80GB HBM3"
        return int(has_failed)

    def set_value(value: int) -> Callable[..., int]:
        def call(pointer: Any, *ordinal: int) -> int:
            pointer._obj.value = value
            return 0

        return call

    driver = SimpleNamespace(
        cuDeviceGetName=set_name,
        cuDeviceTotalMem_v2=set_value(79 * GIB),
        cuDriverGetVersion=set_value(cuda_version),
    )
    monkeypatch.setattr(cuda, "missing", lambda: None)
    monkeypatch.setattr(cuda, "compute_capability", lambda: arch)
    monkeypatch.setattr(nvrtc, "compile_cuda", compiles if has_nvrtc else does_not_compile)
    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", lambda name: driver)
        return module._cuda()


def test_every_kind_is_listed_once() -> None:
    assert [device.kind for device in devices()] == ["cpu", "cuda", "vulkan", "rocm", "metal"]


def test_every_no_says_what_is_missing_and_how_to_get_it() -> None:
    for device in devices():
        can = device.can_compile and device.can_run
        assert can == (not device.missing)
        assert all(missing.what and missing.remedy for missing in device.missing)


def test_this_cpu_runs_what_it_compiles() -> None:
    cpu = devices()[0]
    assert cpu.can_run
    assert cpu.name
    assert cpu.features == sorted(cpu.features)


def test_without_the_compiler_artifacts_still_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_installed", lambda name: name == "tvm_ffi")
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    cpu = devices()[0]
    assert cpu.can_run
    assert not cpu.can_compile
    assert [missing.what for missing in cpu.missing] == ["the package apache-tvm", "a linker"]


def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = with_gpu(monkeypatch)
    assert found == Device(
        "cuda", "NVIDIA H100 80GB HBM3", True, True, ["sm_90"], memory_bytes=79 * GIB, driver="CUDA 13.0"
    )
    cli_output.devices([found], as_json=False)
    assert capsys.readouterr().out.splitlines() == [
        "cuda    compile: yes, run: yes  NVIDIA H100 80GB HBM3, 79.0 GiB, driver for CUDA 13.0",
        "        features: sm_90",
    ]


def test_without_a_gpu_cuda_is_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "missing", lambda: "the NVIDIA driver finds no GPU")
    monkeypatch.setattr(cuda, "compute_capability", lambda: None)
    monkeypatch.setattr(nvrtc, "compile_cuda", compiles)
    found = devices()[1]
    assert (found.can_compile, found.can_run) == (True, False)
    assert [missing.what for missing in found.missing] == ["a GPU that can be used: the NVIDIA driver finds no GPU"]
    assert "580" in found.missing[0].remedy


def test_without_nvrtc_cuda_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    found = with_gpu(monkeypatch, has_nvrtc=False)
    assert (found.can_compile, found.can_run) == (False, True)
    assert [missing.remedy for missing in found.missing] == ["pip install 'mlcgen[cuda]'"]


def test_without_tvm_cuda_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_installed", lambda name: False)
    found = with_gpu(monkeypatch)
    assert (found.can_compile, found.can_run) == (False, True)
    assert [missing.what for missing in found.missing] == ["the package apache-tvm"]


@pytest.mark.parametrize(
    ("arch", "cuda_version", "what"),
    [
        ("sm_75", 13000, "a GPU of sm_80 or later; this one is sm_75"),
        ("sm_90", 12080, "a driver for CUDA 13; this one is for CUDA 12.8"),
    ],
)
def test_what_is_too_old(monkeypatch: pytest.MonkeyPatch, arch: str, cuda_version: int, what: str) -> None:
    found = with_gpu(monkeypatch, arch, cuda_version)
    assert (found.can_compile, found.can_run) == (True, False)
    assert [missing.what for missing in found.missing] == [what]


def test_newer_gpus_and_drivers_do(monkeypatch: pytest.MonkeyPatch) -> None:
    found = with_gpu(monkeypatch, "sm_120", 13020)
    assert found.can_run
    assert found.driver == "CUDA 13.2"


def test_a_driver_that_fails_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    found = with_gpu(monkeypatch, has_failed=True)
    assert not found.can_run
    assert "does not describe" in found.missing[0].what


def test_this_machine_compiles_for_cuda_where_the_wheels_are() -> None:
    pytest.importorskip("nvidia", reason="needs mlcgen[cuda]")
    assert devices()[1].can_compile

import pytest

from mlcgen import devices as module
from mlcgen.devices import devices


def test_every_kind_is_listed_once() -> None:
    assert [device.kind for device in devices()] == ["cpu", "cuda", "rocm", "metal", "vulkan"]


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

"""Code objects for AMD's GPUs, as far as they can be judged without one."""

import functools
import importlib.util

import pytest

from mlcgen.adapter_layout import AdapterLimits
from mlcgen.errors import CompileError
from mlcgen.formats import BF16, Q4, Q8, grouped
from mlcgen.targets import rocm_build
from mlcgen.targets.base import Attention, Linear, LowRank
from mlcgen.targets.device_kernel import Code, DeviceKernel
from mlcgen.targets.rocm_build import ARCHITECTURES, compile_hip, hip_source
from mlcgen.targets.webgpu_kernels import embedding, linear, low_rank, paged_attention, rope_append, sampling
from mlcgen.targets.wgsl_to_cpp import Module, modules

from .code_object import CodeObject, read
from .test_wgsl_to_cpp import TVM_KERNEL, generated

needs_zig = pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="needs the ziglang wheel")
WAVE = {"gfx90a": 64, "gfx942": 64, "gfx1100": 32, "gfx1201": 32}
EPS = 1e-5


def _attention(head_dim: int, kv_dtype: str, group: int, window: int = 0) -> DeviceKernel:
    return paged_attention(Attention(2 * group, 2, head_dim, 16, kv_dtype, 0.1, window))


KERNELS = [
    linear(Linear(Q4, 8192, 2048, norm_eps=EPS, gates_result=True)),
    linear(Linear(Q4, 2048, 4096, has_residual=True)),
    linear(Linear(Q8, 3000, 2048, norm_eps=EPS)),
    linear(Linear(BF16, 576, 1536, has_residual=True)),
    linear(Linear(grouped(4, 64, has_minimum=True), 512, 512, norm_eps=EPS, gates_result=True)),
    low_rank(LowRank(2048, (2048, 512, 512), AdapterLimits(64, 8, "float16"), norm_eps=EPS)),
    low_rank(LowRank(2048, (4096, 4096), AdapterLimits(256, 8, "float32"), norm_eps=EPS, gates_result=True)),
    embedding(Q8, 3000, 2048),
    rope_append(4, 2, 64, 16, "bfloat16"),
    _attention(64, "float16", 1),
    _attention(96, "float32", 3, window=64),
    _attention(128, "bfloat16", 4),
    _attention(256, "float16", 7),
]


@functools.cache
def codes() -> dict[str, Code]:
    found = {str(i): generated(kernel) for i, kernel in enumerate(KERNELS)}
    text = TVM_KERNEL.replace("NAME", "tvm_cosine").replace("FUNCTION", "cos")
    return found | {"sampling": sampling(), "tvm": Code((), {"tvm_cosine": text}, ())}


@functools.cache
def translated() -> dict[str, Module]:
    return {module.name: module for module in modules(codes())}


@functools.cache
def built(arch: str) -> CodeObject:
    return read(compile_hip(hip_source(codes()), arch))


each_architecture = pytest.mark.parametrize("arch", ARCHITECTURES)


@needs_zig
@each_architecture
def test_what_a_code_object_holds(arch: str) -> None:
    """A kernel is code and a descriptor of 64 bytes, and nothing else is asked for."""
    found = built(arch)
    assert (found.processor, found.abi) == (arch, 3)  # ABI 3 is version 5
    assert found.undefined == []
    assert set(found.symbols) == {name for kernel in translated() for name in (kernel, f"{kernel}.kd")}
    assert all(size == 64 for name, size in found.symbols.items() if name.endswith(".kd"))
    assert all(size > 0 for size in found.symbols.values())


@needs_zig
@each_architecture
def test_arguments(arch: str) -> None:
    """Addresses of 8 bytes, then numbers of 4, and nothing that a runtime would have to add."""
    for name, module in translated().items():
        kernel = built(arch).kernels[name]
        sizes = [8] * len(module.buffers) + [4] * len(module.fields)
        assert [(arg[".size"], arg[".offset"]) for arg in kernel[".args"]] == [
            (size, sum(sizes[:i])) for i, size in enumerate(sizes)
        ]
        assert kernel[".kernarg_segment_size"] == sum(sizes)
        kinds = ["global_buffer"] * len(module.buffers) + ["by_value"] * len(module.fields)
        assert [arg[".value_kind"] for arg in kernel[".args"]] == kinds


@needs_zig
@each_architecture
def test_resources(arch: str) -> None:
    """Nothing is kept in memory for want of registers, and workgroup memory is what every device has."""
    for name, module in translated().items():
        kernel = built(arch).kernels[name]
        assert kernel[".private_segment_fixed_size"] == 0, name
        assert (kernel[".vgpr_spill_count"], kernel[".sgpr_spill_count"]) == (0, 0), name
        assert not kernel[".uses_dynamic_stack"], name
        assert kernel[".max_flat_workgroup_size"] == module.threads, name
        assert kernel[".wavefront_size"] == WAVE[arch], name
        assert kernel[".group_segment_fixed_size"] <= 16384, name
        assert bool(kernel[".group_segment_fixed_size"]) == bool(module.workgroup), name


@needs_zig
def test_a_text_that_does_not_compile() -> None:
    with pytest.raises(CompileError, match=r"cannot be compiled for gfx90a: .*unknown type name 'nonsense'"):
        compile_hip("nonsense f();", "gfx90a")


@needs_zig
def test_an_architecture_that_there_is_not() -> None:
    with pytest.raises(CompileError, match=r"cannot be compiled for gfx000: .*gfx000"):
        compile_hip("", "gfx000")


@needs_zig
def test_a_function_that_is_not_there() -> None:
    text = 'void f(); extern "C" __attribute__((amdgpu_kernel)) void k() { f(); }'
    with pytest.raises(CompileError, match=r"cannot be compiled for gfx1100: .*undefined .*f\(\)"):
        compile_hip(text, "gfx1100")


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rocm_build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CompileError, match=r"needs the package ziglang; pip install 'mlcgen\[cross\]'"):
        compile_hip("", "gfx90a")

"""WGSL as C++: translated, compiled for this CPU, and compared with NumPy as test_webgpu_*.py compare WGSL."""

import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from mlcgen.adapter_layout import AdapterLimits
from mlcgen.errors import CompileError
from mlcgen.formats import BF16, F16, F32, Q4, Q8, WeightFormat, grouped
from mlcgen.runtime.sizes import evaluate
from mlcgen.targets import rocm_build
from mlcgen.targets.base import Linear, LowRank
from mlcgen.targets.device_kernel import Code, DeviceKernel, Variant
from mlcgen.targets.webgpu_kernels import argmax, embedding, linear, low_rank, rope_append, take_tokens
from mlcgen.targets.wgsl_to_cpp import prelude, translate

from . import test_webgpu_attention as attention
from . import test_webgpu_linear as products
from . import test_webgpu_lookup as lookup
from . import test_webgpu_low_rank as paths
from .cuda_build import _arguments
from .emulate_cuda import EmulatedKernel, Order, compile_kernels, compiler
from .emulate_metal import emulated_text

needs_clang = pytest.mark.skipif(
    sys.platform != "linux" or not any(word in " ".join(compiler()) for word in ("zig", "clang")),
    reason="needs Linux, and the ziglang wheel or clang: hip.h uses its vectors",
)
EPS = products.EPS
Q4_MINIMUM = grouped(4, 64, has_minimum=True)
LINEARS = [
    (Linear(Q4, 83, 192, has_bias=True), (1, 3, 9, 33)),
    (Linear(F32, 16, 40, norm_eps=EPS), (1, 9)),
    (Linear(F16, 168, 96, norm_eps=EPS, gates_result=True, has_residual=True), (1, 5, 9)),
    (Linear(BF16, 48, 40, has_residual=True, has_bias=True), (2, 33)),
    (Linear(Q8, 40, 96, norm_eps=EPS, gates_result=True, has_bias=True), (1, 6, 20)),
    (Linear(Q4_MINIMUM, 24, 128, norm_eps=EPS, has_residual=True, has_bias=True), (1, 2, 35)),
]
LOW_RANKS = [
    LowRank(96, (64, 32, 32), paths.LIMITS),
    LowRank(36, (48, 48), AdapterLimits(70, 3, "float32"), EPS, gates_result=True),
    LowRank(100, (5, 83), AdapterLimits(3, 3, "float16"), EPS),
]
EMBEDDINGS = [F32, F16, BF16, Q8, Q4, Q4_MINIMUM]
ROPES = [("float32", 1), ("float16", 16), ("bfloat16", 64)]
ATTENDED = [attention.LAYERS[1], attention.Layer("float16", 1, 7, 128, 16, window=20), attention.LAYERS[3]]
DECODED = [
    attention.DECODED[0],
    attention.Layer("float32", 1, 5, 96, 64, window=200),
    attention.Layer("bfloat16", 2, 1, 64, 4),
]
COLUMNS = (3, 1000)
TVM_KERNEL = """
@group(0) @binding(0) var<storage, read_write> out_ptr : array<f32>;
@group(0) @binding(1) var<storage, read_write> in_ptr : array<f32>;
struct PODArgs {
  n: i32,
  packGridDimX: u32
}
@group(0) @binding(2) var<uniform> podArgs : PODArgs;
@compute @workgroup_size(64, 1, 1)
fn NAME(
  @builtin(workgroup_id) blockIdx : vec3<u32>,
  @builtin(num_workgroups) gridDim : vec3<u32>,
  @builtin(local_invocation_id) threadIdx : vec3<u32>
) {
  if (blockIdx.z * gridDim.x + blockIdx.x > podArgs.packGridDimX) { return; }
  let v__1 : i32 = i32(blockIdx.z * gridDim.x + blockIdx.x);
  if (((v__1 * 64i) + i32(threadIdx.x)) < podArgs.n) {
    out_ptr[((v__1 * 64i) + i32(threadIdx.x))] = FUNCTION(in_ptr[((v__1 * 64i) + i32(threadIdx.x))]);
  }
}
"""
CALLED = {"sine": "sin", "cosine": "cos", "exponential": "exp"}


def kernels() -> list[DeviceKernel]:
    ropes = [rope_append(3, 2, 96, page, dtype) for dtype, page in ROPES]
    return [
        *(embedding(fmt, 37, 1216) for fmt in EMBEDDINGS),
        *ropes,
        rope_append(1, 1, 64, 4, "bfloat16"),
        *(layer.kernel for layer in (*ATTENDED, *DECODED)),
        *map(low_rank, LOW_RANKS),
        argmax(),
        take_tokens(),
    ]


@functools.cache
def generated(kernel: DeviceKernel) -> Code:
    """Without what only devices with f16 run, which is not translated."""
    code = kernel.generate([p.dtype for p in kernel.params])
    return replace(code, functions={name: text for name, text in code.functions.items() if "enable f16" not in text})


def variant(code: Code, symbols: Mapping[str, int]) -> Variant:
    return next(v for v in code.variants if evaluate(v.when, {"has_f16": 0, **symbols}))


def launched(spec: Linear, num_tokens: Sequence[int]) -> Code:
    """Only what runs for these tokens: the rest of it would take as long to compile."""
    code = generated(linear(spec))
    names = {launch.function for n in num_tokens for launch in variant(code, {"n": n}).launches}
    return replace(code, functions={name: code.functions[name] for name in sorted(names)})


@functools.cache
def codes() -> dict[str, Code]:
    texts = {name: TVM_KERNEL.replace("NAME", name).replace("FUNCTION", f) for name, f in CALLED.items()}
    found = [*(launched(*given) for given in LINEARS), *map(generated, kernels()), Code((), texts, ())]
    return {str(i): code for i, code in enumerate(found)}


@functools.cache
def emulated(text: str) -> Mapping[str, EmulatedKernel]:
    """All kernels of this file: one build takes little longer than one kernel's."""
    names = list(dict.fromkeys(name for code in codes().values() for name in code.functions))
    if text == "metal":
        return compile_kernels(emulated_text(codes()), names)
    builtins = Path(__file__).with_name("amd_builtins.h").read_text()
    return compile_kernels(builtins + rocm_build.hip_source(codes()), names)


@dataclass(frozen=True)
class Emulation:
    text: str
    order: Order

    def run(self, kernel: DeviceKernel, arrays: Sequence[np.ndarray], symbols: Mapping[str, int]) -> list[str]:
        """As webgpu_build.run."""
        code = generated(kernel)
        scratch = np.full(max(evaluate(code.scratch, symbols), 16), 0xFF, np.uint8)
        launches = variant(code, symbols).launches
        for launch in launches:
            grid = tuple(evaluate(size, symbols) for size in launch.grid)
            args = _arguments(launch, arrays, scratch, np.zeros(4, np.uint32), symbols)
            emulated(self.text)[launch.function](grid, launch.block, args, 0, self.order)
        return [launch.function for launch in launches]


@pytest.fixture(params=[("hip", "ascending"), ("hip", "descending"), ("metal", "ascending")], ids="-".join)
def emulation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Emulation:
    """The tests of WebGPU run what is translated. Results must not depend on the order of threads."""
    found = Emulation(*request.param)
    for module in (attention, products, lookup, paths):
        monkeypatch.setattr(module, "run", found.run)
    return found


emulates = pytest.mark.usefixtures("emulation")


@needs_clang
@emulates
@pytest.mark.parametrize(("spec", "num_tokens"), LINEARS, ids=lambda value: getattr(value, "name", ""))
def test_linear(spec: Linear, num_tokens: tuple[int, ...]) -> None:
    products.check(spec, num_tokens)


@needs_clang
@emulates
@pytest.mark.parametrize("spec", LOW_RANKS, ids=lambda spec: spec.name)
def test_low_rank(spec: LowRank) -> None:
    paths.check(spec, paths.BATCHES)


@needs_clang
@emulates
@pytest.mark.parametrize("fmt", EMBEDDINGS, ids=lambda fmt: fmt.name)
def test_embedding(fmt: WeightFormat) -> None:
    lookup.test_embedding(fmt)


@needs_clang
@emulates
@pytest.mark.parametrize(("kv_dtype", "page_size"), ROPES)
def test_rope_append(kv_dtype: str, page_size: int) -> None:
    lookup.test_rope_append(page_size, kv_dtype)


@needs_clang
@emulates
def test_bfloat16_pages_are_rounded_to_even() -> None:
    lookup.test_bfloat16_pages_are_rounded_to_even()


@needs_clang
@emulates
@pytest.mark.parametrize("columns", COLUMNS)
def test_argmax(columns: int) -> None:
    lookup.test_argmax(columns)


@needs_clang
@emulates
def test_argmax_notices_what_is_not_finite() -> None:
    lookup.test_argmax_notices_what_is_not_finite()


@needs_clang
@emulates
def test_take_tokens() -> None:
    lookup.test_take_tokens(300)


@needs_clang
@emulates
@pytest.mark.parametrize("layer", ATTENDED, ids=lambda layer: f"{layer.kv_dtype}-{layer.head_dim}")
@pytest.mark.parametrize("batch", ["whole prompts", "ragged", "trees beside others"])
def test_attention_of_any_step(layer: attention.Layer, batch: str) -> None:
    attention.test_any_step(layer, attention.BATCHES[batch])


@needs_clang
@emulates
@pytest.mark.parametrize("layer", DECODED, ids=lambda layer: f"{layer.kv_dtype}-{layer.head_dim}")
@pytest.mark.parametrize("contexts", ["few", "in pieces"])
def test_attention_of_decoding(layer: attention.Layer, contexts: str) -> None:
    attention.test_decode(layer, attention.CONTEXTS[contexts])


@needs_clang
@pytest.mark.parametrize("name", CALLED)
def test_functions_of_tvms_kernels(emulation: Emulation, name: str) -> None:
    """Angles of late positions keep their digits."""
    largest = 20 if name == "exponential" else 1 << 17
    x = np.random.default_rng(1).uniform(-largest, largest, 1000).astype(np.float32)
    x[:3] = 0, 1e-3, largest
    out = np.full_like(x, np.nan)
    emulated(emulation.text)[name](16, 64, [out, x, np.int32(len(x)), np.uint32(15)])
    expected = getattr(np, CALLED[name])(x.astype(np.float64))
    np.testing.assert_allclose(out, expected, rtol=3e-6 if name == "exponential" else 0, atol=1e-7)


# What is not known


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("let x = atan2(1.0, 2.0);", "'atan2' is not known"),
        ("let x = values[0] + y;", "'y' is not known"),
        ("let x = thread.length;", "the field length is not known"),
        ("let x = &values;", "addresses are not known"),
        ("let x = 1.0h;", "the number 1.0h is not known"),
        ("var x: vec4<f16>;", "the type vec4<f16> is not known"),
        ("var x: mat4x4;", "the type mat4x4 is not known"),
        ("let x = 2147483648;", "the number 2147483648 is not known without a u"),
        ("let x = 1u; { let x = x + 1u; }", "x by its own name is not known"),
        ("let x = 1u; { let x: u32 = x + 1u; }", "x by its own name is not known"),
        ("var x;", "x has neither type nor value"),
        ("if thread == 0u { return; }", "if without a bracket is not known"),
        ("loop { break; }", "'loop' is not known"),
        ("switch thread { default: { } }", "'switch' is not known"),
        ("let x = values[0;", "a bracket is not closed"),
        ("let x = `a`;", ""),
    ],
)
def test_what_is_not_known(line: str, why: str) -> None:
    head = "@group(0) @binding(0) var<storage, read> values: array<f32>;\n@compute @workgroup_size(32)\n"
    text = f"{head}fn f(@builtin(local_invocation_index) thread: u32) {{\n{line}\n}}\n"
    with pytest.raises(CompileError) as caught:
        translate(text)
    assert why in str(caught.value)
    assert line in str(caught.value) or "closed" in why


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("enable f16;", "'enable' is not known"),
        ("var<private> x: f32;", "the address space private is not known"),
        ("override x = 1;", "'override' is not known"),
        ("@compute @workgroup_size(8, 8) fn f() { }", "more than one dimension"),
        ("@fragment fn f() { }", "the attribute fragment is not known"),
        ("@compute @workgroup_size(8) fn f(@builtin(position) p: vec4<f32>) { }", r"\['position'\] is not known"),
        ("const x = 1u;", "has no kernel"),
    ],
)
def test_declarations_that_are_not_known(text: str, why: str) -> None:
    with pytest.raises(CompileError, match=why):
        translate(text)


def test_variables_begin_as_zeros() -> None:
    module = translate("@compute @workgroup_size(8) fn f() { var x: vec4<f32>; var y: i32; let z = -1e5 + 2.; }")
    assert "vec4<f32> x = {}; i32 y = {}; const auto z = -1e5f + 2.f;" in module.text


def test_the_prelude_needs_nothing() -> None:
    assert "#include" not in prelude("hip")

"""Building blocks of the pass tests: `forward` functions by hand, tiny models, and running modules on the CPU."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import IRModule, relax, tirx
from tvm.ir import StringImm

from mlcgen import passes
from mlcgen.compile_target import build_functions
from mlcgen.formats import F32, WeightFormat
from mlcgen.models.config import DecoderConfig
from mlcgen.models.layers import ATTENTION, ROPE, export
from mlcgen.models.rope import Rope
from mlcgen.passes.paged_attention import KvLayout
from mlcgen.passes.quantize import WeightSource
from mlcgen.passes.rewrite import FORWARD, is_op, static_shape
from mlcgen.targets import resolve
from mlcgen.targets.base import Target

N = tirx.Var("n", "int64")
Array = np.ndarray


@dataclass(frozen=True)
class Tools:
    target: Target = field(default_factory=lambda: resolve("cpu"))
    n: tirx.Var = N

    def var(self, name: str, *shape: Any, dtype: str = "float32") -> relax.Var:
        return relax.Var(name, relax.TensorType(shape, dtype))

    def forward(self, params: Sequence[relax.Var], body: Callable[..., relax.Expr], num_input: int = 1) -> IRModule:
        """A module whose `forward(*params)` is what `body(builder, *params)` returns."""
        builder = relax.BlockBuilder()
        with builder.function(FORWARD, list(params), attrs={"num_input": num_input}):
            with builder.dataflow():
                out = builder.emit_output(body(builder, *params))
            builder.emit_func_output(out)
        return builder.get()

    def call_kernel(self, builder: relax.BlockBuilder, kernel: tirx.PrimFunc, args: list[Any], out: Any) -> relax.Var:
        gv = builder.add_func(kernel.without_attr("global_symbol"), str(kernel.attrs["global_symbol"]))
        return builder.emit(relax.call_tir(gv, args, out))

    def linear(self, builder: relax.BlockBuilder, x: Any, weight: Any, bias: Any = None) -> relax.Var:
        out = builder.emit(relax.op.matmul(x, builder.emit(relax.op.permute_dims(weight))))
        return out if bias is None else builder.emit(relax.op.add(out, bias))

    def attention(self, q: Any, k: Any, v: Any, layer: int = 0) -> relax.Call:
        args = [q, k, v, relax.prim_value(layer), StringImm("causal"), relax.prim_value(0)]
        return relax.call_pure_packed(ATTENTION, *args, ty_args=q.ty)

    def rope(self, x: Any, cos: Any, sin: Any) -> relax.Call:
        return relax.call_pure_packed(ROPE, x, cos, sin, ty_args=x.ty)

    def heads(self, builder: relax.BlockBuilder, x: Any, heads: int, head_dim: int) -> relax.Var:
        return builder.emit(relax.op.reshape(x, (self.n, heads, head_dim)))

    def build(self, mod: IRModule) -> Any:
        return build_functions(mod, lambda name, module: None)

    def run(self, mod: IRModule, *arrays: Array, function: str = FORWARD) -> Any:
        """Build for the CPU and call once; one array, or a list where the function returns a tuple."""
        return self.call(self.build(mod), *arrays, function=function)

    def call(self, vm: Any, *arrays: Array, function: str = FORWARD) -> Any:
        out = vm[function](*(self.tensor(a) if isinstance(a, np.ndarray) else a for a in arrays))
        return out.numpy() if hasattr(out, "numpy") else [o.numpy() for o in out]

    def tensor(self, array: Array) -> Any:
        return tvm.runtime.tensor(np.ascontiguousarray(array))

    def evaluate(self, compute: Callable[..., Any], *arrays: Array) -> list[Array]:
        """Run tensor expressions, `compute(*placeholders) -> tensor or list`, on arrays."""
        params = [self.var(f"a{i}", *a.shape, dtype=str(a.dtype)) for i, a in enumerate(arrays)]
        mod = self.forward(params, lambda builder, *p: builder.emit_te(compute, *p), len(params))
        found = self.run(mod, *arrays)
        return found if isinstance(found, list) else [found]

    def same(self, found: IRModule, expected: IRModule) -> None:
        tvm.ir.assert_structural_equal(found, expected)

    def ops(self, mod: IRModule) -> list[str]:
        """Names of the operators of `forward`, and of the functions where it calls kernels, in order."""
        values = [b.value for block in mod[FORWARD].body.blocks for b in block.bindings]
        return [_name(v) for v in values if isinstance(v, relax.Call)]

    def config(self, model_type: str = "llama", **changes: Any) -> DecoderConfig:
        rope = Rope(tuple(10000.0 ** (-i / 8) for i in range(8)))
        tiny = DecoderConfig(model_type, 32, 64, 2, 4, 2, 16, 40, 64, 1e-5, rope, qkv_bias=model_type == "qwen2")
        return replace(tiny, **changes)

    def layout(self, config: DecoderConfig, page_size: int = 4, dtype: str = "float32") -> KvLayout:
        return KvLayout(config.num_kv_heads, config.head_dim, page_size, dtype)

    def sources(self, mod: IRModule, fmt: WeightFormat = F32) -> dict[str, WeightSource]:
        weights = mod[FORWARD].params[int(mod[FORWARD].attrs["num_input"]) :]
        return {w.name: WeightSource(w.name, fmt) for w in weights if len(w.ty.shape) == 2}

    def weights(self, mod: IRModule, rng: np.random.Generator, num_input: int = 2) -> list[Array]:
        return [rng.normal(0, 0.2, static_shape(p)).astype("f4") for p in mod[FORWARD].params[num_input:]]

    def apply(self, mod: IRModule, pipeline: list[passes.NamedPass]) -> IRModule:
        return passes.run(mod, pipeline, self.target, lambda name, module: None)

    def reference(self, mod: IRModule) -> IRModule:
        return self.apply(mod, passes.reference_pipeline())

    def optimised(self, config: DecoderConfig, layout: KvLayout) -> IRModule:
        mod, _ = export(config)
        options = passes.PassOptions(self.sources(mod), layout, {})
        return self.apply(mod, passes.model_pipeline(self.target, options))

    def batch(self, tables: Array, before: list[int], counts: list[int], page_size: int) -> dict[str, Array]:
        """The index inputs of one step: sequence s holds before[s] tokens in tables[s] and adds counts[s]."""
        positions = np.concatenate([np.arange(b, b + c) for b, c in zip(before, counts, strict=True)])
        owner = np.repeat(np.arange(len(counts)), counts)
        slots = tables[owner, positions // page_size] * page_size + positions % page_size
        lens, starts = np.add(before, counts), np.cumsum([0, *counts])
        named = {"positions": positions, "slots": slots, "tables": tables, "lens": lens, "starts": starts}
        named["masks"] = np.zeros(len(positions))
        return {name: array.astype("i4") for name, array in named.items()}


def _name(call: relax.Call) -> str:
    if is_op(call, "relax.call_tir") or is_op(call, "relax.call_tir_inplace"):
        return str(call.args[0].name_hint)
    if is_op(call, "relax.call_pure_packed"):
        return str(call.args[0].global_symbol)
    return str(call.op.name).removeprefix("relax.")


@pytest.fixture(scope="session")
def tools() -> Tools:
    return Tools()


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng(list(request.node.name.encode()))

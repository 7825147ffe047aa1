"""Kernels that the runtime launches beside a model's: tokens from logits, and on into the next step's inputs."""

from collections.abc import Sequence

from mlcgen.runtime import argmax_sampler
from mlcgen.runtime.argmax_sampler import PARTS, THREADS
from mlcgen.runtime.sampling_executor import TAKE_TOKENS
from mlcgen.targets.device_kernel import Code, DeviceKernel, Param, Variant, ceildiv, int32, tensor

from .code import Buffer, kernel

HOW = "kernel: targets/webgpu_kernels/sample.py"


def sampling() -> Code:
    """All of them: runtime/argmax_sampler.py and runtime/sampling_executor.py launch them by their names."""
    codes = [kernel.generate([p.dtype for p in kernel.params]) for kernel in (argmax(), take_tokens())]
    return Code((), {name: text for code in codes for name, text in code.functions.items()}, ())


def argmax() -> DeviceKernel:
    """PrimFunc(logits (rows, vocab) f32; parts (rows, PARTS, 2) uint32; results (2, rows) uint32: ids, logits)."""
    shapes = {"logits": ("rows", "vocab"), "parts": ("rows", PARTS, 2), "results": (2, "rows")}
    params = tuple(Param(n, shape, "float32" if n == "logits" else "uint32") for n, shape in shapes.items())

    def code(dtypes: Sequence[str]) -> Code:
        logits, parts = Buffer("logits", "f32", tensor(0)), Buffer("parts", "u32", tensor(1))
        results = Buffer("results", "u32", tensor(2))
        stages = [
            (True, [logits, parts], (PARTS, "rows", 1), {"vocab": int32("vocab")}),
            (False, [parts, results], (1, "rows", 1), {"rows": int32("rows")}),
        ]
        launches, functions = [], {}
        for name, (is_first, buffers, grid, numbers) in zip(argmax_sampler.FUNCTIONS, stages, strict=True):
            values = {"PARTS": PARTS, "IS_FIRST": is_first}
            launch, functions[name] = kernel(name, "argmax.wgsl", values, buffers, grid, THREADS, numbers)
            launches.append(launch)
        return Code((), functions, (Variant(1, tuple(launches)),))

    return DeviceKernel("argmax", params, code, HOW)


def take_tokens() -> DeviceKernel:
    """PrimFunc(input_ids (n,), rows (n,), chosen (rows,), all int32)."""
    shapes = {"input_ids": ("n",), "rows": ("n",), "chosen": ("rows",)}
    params = tuple(Param(name, shape, "int32") for name, shape in shapes.items())

    def code(dtypes: Sequence[str]) -> Code:
        buffers = [Buffer(p.name, "i32", tensor(i)) for i, p in enumerate(params)]
        grid, numbers = (ceildiv("n", THREADS), 1, 1), {"n": int32("n")}
        launch, text = kernel(TAKE_TOKENS, "take_tokens.wgsl", {}, buffers, grid, THREADS, numbers)
        return Code((), {launch.function: text}, (Variant(1, (launch,)),))

    return DeviceKernel(TAKE_TOKENS, params, code, HOW)

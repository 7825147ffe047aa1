"""Tokens from logits."""

from collections.abc import Sequence

from mlcgen.targets.device_kernel import Code, DeviceKernel, Param, Variant, tensor

from .code import Buffer, kernel

THREADS = 256
HOW = "kernel: targets/webgpu_kernels/sample.py"


def argmax(vocab: int) -> DeviceKernel:
    """PrimFunc(logits (rows, vocab) f32; out (rows,) int32): of equal logits the first wins."""
    params = (Param("logits", ("rows", vocab), "float32"), Param("out", ("rows",), "int32"))

    def code(dtypes: Sequence[str]) -> Code:
        buffers = [Buffer("logits", "f32", tensor(0)), Buffer("out", "i32", tensor(1))]
        values = {"COLUMNS": vocab}
        launch, text = kernel(f"argmax_{vocab}", "argmax.wgsl", values, buffers, ("rows", 1, 1), THREADS)
        return Code((), {launch.function: text}, (Variant(1, (launch,)),))

    return DeviceKernel("argmax", params, code, HOW)

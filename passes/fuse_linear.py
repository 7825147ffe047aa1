"""A product with a stored weight matrix becomes one kernel, with what stands around it: the RMS norm or the SwiGLU gate
of its input, its bias, the residual addition. Weights are decoded in registers or cache: no dequantized matrix is ever
written to memory."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

from tvm import IRModule, relax, tirx

from mlcgen.formats import WeightFormat
from mlcgen.passes.fuse_gate_up import gate_up_of
from mlcgen.passes.quantize import FORMAT
from mlcgen.passes.rewrite import Rewriter, is_op, rewrite, static_shape
from mlcgen.targets.base import Linear, Target

GATE_ROWS = 16  # a block of rows that a gate and its up projection are computed in together
LINEAR = "mlcgen.linear"  # attribute of a linear kernel: the format's name


@dataclass(frozen=True)
class _Stored:
    """A matrix (N, K) in its parts."""

    fmt: WeightFormat
    parts: list[relax.Expr]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Product:
    spec: Linear
    inputs: list[relax.Expr]  # x, [norm weight]
    parts: list[relax.Expr]
    bias: list[relax.Expr]


def fuse_linear(mod: IRModule, formats: Mapping[str, WeightFormat], target: Target) -> IRModule:
    """`formats`: by name, those that the module's dequantize calls use."""
    products: dict[relax.Var, _Product] = {}  # what each linear kernel's result is, should more follow

    def stored(rewriter: Rewriter, weight: relax.Expr) -> _Stored | None:
        call = rewriter.value(weight)
        name = rewriter.kernel_attr(call, FORMAT)
        return name and _Stored(formats[str(name)], list(call.args[1].fields), static_shape(weight))

    @functools.cache
    def kernel_of(spec: Linear) -> tirx.PrimFunc:
        return target.kernels.linear(spec).with_attr(LINEAR, spec.fmt.name)

    def emit(rewriter: Rewriter, product: _Product, residual: list[relax.Expr], ty: relax.Type) -> relax.Var:
        args = [*product.inputs, *product.parts, *product.bias, *residual]
        return rewriter.emit(rewriter.call_kernel(kernel_of(product.spec), args, ty))

    def matmul(rewriter: Rewriter, value: relax.Call) -> relax.Var | None:
        transposed = rewriter.value(value.args[1])
        weight = stored(rewriter, transposed.args[0]) if is_op(transposed, "relax.permute_dims") else None
        if weight is None:
            return None
        n, k = weight.shape
        product = _with_input(rewriter, Linear(weight.fmt, n, k), value.args[0], weight.parts, target)
        result = emit(rewriter, product, [], value.ty)
        products[result] = product
        return result

    def gate(rewriter: Rewriter, value: relax.Call) -> relax.Var | None:
        gate_up = gate_up_of(rewriter.value, value)
        product = products.get(gate_up) if target.gates_results and gate_up is not None else None
        if product is None or value.ty.shape[1] % GATE_ROWS != 0:
            return None
        return emit(rewriter, replace(product, spec=replace(product.spec, gates_result=True)), [], value.ty)

    def add(rewriter: Rewriter, value: relax.Call) -> relax.Var | None:
        left, right = value.args
        if len(right.ty.shape) == 1 and left in products and not products[left].bias:
            product = products[left]
            product = replace(product, spec=replace(product.spec, has_bias=True), bias=[right])
            result = emit(rewriter, product, [], value.ty)
            products[result] = product
            return result
        linear, residual = (right, left) if right in products else (left, right)
        if linear not in products or len(residual.ty.shape) != 2:
            return None
        product = products[linear]
        return emit(rewriter, replace(product, spec=replace(product.spec, has_residual=True)), [residual], value.ty)

    def rule(rewriter: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        if is_op(value, "relax.matmul"):
            return matmul(rewriter, value)
        if is_op(value, "relax.add"):
            return add(rewriter, value)
        if is_op(value, "relax.multiply"):
            return gate(rewriter, value)
        if is_op(value, "relax.take") and (table := stored(rewriter, value.args[0])) is not None:
            kernel = target.kernels.embedding(table.fmt, *table.shape)
            return rewriter.call_kernel(kernel, [value.args[1], *table.parts], value.ty)
        return None

    return rewrite(mod, rule)


def _with_input(rewriter: Rewriter, spec: Linear, x: relax.Expr, parts: list[relax.Expr], target: Target) -> _Product:
    """The product, computing its input itself where it can. What others read too is computed once more: it is cheap."""
    value = rewriter.value(x)
    if is_op(value, "relax.nn.rms_norm") and len(value.ty.shape) == 2 and [int(a) for a in value.attrs.axes] == [-1]:
        return _Product(replace(spec, norm_eps=float(value.attrs.epsilon)), list(value.args), parts, [])
    gate_up = None if target.gates_results else gate_up_of(rewriter.value, value)
    if gate_up is not None:
        return _Product(replace(spec, is_gated=True), [gate_up], parts, [])
    return _Product(spec, [x], parts, [])

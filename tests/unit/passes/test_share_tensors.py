import numpy as np
import pytest
from tvm import IRModule, ir, relax, te, tirx

from mlcgen import passes
from mlcgen.passes.rewrite import FORWARD, is_op
from mlcgen.passes.share_tensors import share_tensors

LAYERS = 6


def planned(module: IRModule, target, until: str = "plan_memory") -> IRModule:
    lowering = passes.lowering_pipeline(target)
    names = [name for name, _ in lowering]
    return passes.run(module, lowering[: names.index(until) + 1], target, lambda name, mod: None)


def count(module: IRModule, name: str) -> int:
    blocks = module[FORWARD].body.blocks
    return sum(is_op(binding.value, name) for block in blocks for binding in block.bindings)


def opaque(name: str, columns: int, out: tuple[int, ...], compute) -> tirx.PrimFunc:
    """A kernel of (n, columns) -> (n, *out) that nothing fuses with."""
    n = te.var("n", "int64")
    a = te.placeholder((n, columns), "float32", "a")
    func = te.create_prim_func([a, te.compute((n, *out), lambda *index: compute(a, *index))])
    return func.with_attr("op_pattern", 8).with_attr("global_symbol", name)


WIDEN = opaque("widen", 32, (4, 16), lambda a, t, h, d: a[t, d] + h.astype("float32"))
NARROW = opaque("narrow", 64, (32,), lambda a, t, c: a[t, 2 * c] - 0.25 * a[t, 2 * c + 1])


@pytest.fixture
def stack(tools):
    """Layers of two kernels each, with a reshape between them, as around attention."""
    x = tools.var("x", tools.n, 32)

    def body(builder, x):
        for _ in range(LAYERS):
            wide = tools.call_kernel(builder, WIDEN, [x], relax.TensorType((tools.n, 4, 16), "float32"))
            flat = builder.emit(relax.op.reshape(wide, (tools.n, 64)))
            x = tools.call_kernel(builder, NARROW, [flat], relax.TensorType((tools.n, 32), "float32"))
        return x

    return tools.forward([x], body)


def expected(x: np.ndarray) -> np.ndarray:
    for _ in range(LAYERS):
        wide = (x[:, None, :16] + np.arange(4, dtype=np.float32)[None, :, None]).reshape(len(x), 64)
        x = wide[:, 0::2] - 0.25 * wide[:, 1::2]
    return x


def test_layers_share_their_tensors(tools, stack) -> None:
    before = planned(stack, tools.target)
    after = share_tensors(before)
    assert count(before, "relax.memory.alloc_tensor") == 2 * LAYERS - 1  # the result is not planned
    assert count(after, "relax.memory.alloc_tensor") <= 3  # wide, and narrow in one place or two
    assert count(before, "relax.reshape") == LAYERS
    assert count(after, "relax.reshape") == 1


def test_every_kernel_is_still_called(tools, stack) -> None:
    def calls(module: IRModule) -> int:
        blocks = module[FORWARD].body.blocks
        values = [binding.value for block in blocks for binding in block.bindings]
        return sum(isinstance(v, relax.Call) and isinstance(v.op, ir.GlobalVar) for v in values)

    before = planned(stack, tools.target)
    assert calls(share_tensors(before)) == calls(before) == 2 * LAYERS


def test_same_numbers(tools, stack) -> None:
    x = np.random.default_rng().standard_normal((5, 32), np.float32)
    np.testing.assert_allclose(tools.run(stack, x), expected(x), rtol=1e-5, atol=1e-4)


def test_results_of_two_calls_do_not_share_memory(tools, stack) -> None:
    vm = tools.build(stack)
    x, y = np.random.default_rng().standard_normal((2, 3, 32), np.float32)
    first = vm[FORWARD](tools.tensor(x))
    vm[FORWARD](tools.tensor(y))
    np.testing.assert_allclose(first.numpy(), expected(x), rtol=1e-5, atol=1e-4)


def test_tensors_of_other_shapes_stay(tools) -> None:
    x = tools.var("x", tools.n, 32)

    def body(builder, x):
        wide = tools.call_kernel(builder, WIDEN, [x], relax.TensorType((tools.n, 4, 16), "float32"))
        flat = builder.emit(relax.op.reshape(wide, (tools.n, 64)))
        return tools.call_kernel(builder, NARROW, [flat], relax.TensorType((tools.n, 32), "float32"))

    before = planned(tools.forward([x], body), tools.target)
    after = share_tensors(before)
    assert count(after, "relax.memory.alloc_tensor") == count(before, "relax.memory.alloc_tensor")
    assert count(after, "relax.reshape") == 1

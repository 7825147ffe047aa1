import numpy as np
import pytest
from tvm import relax

from mlcgen.passes.fuse_add_norm import fuse_add_norm

HIDDEN, EPS = 32, 1e-5


def params(tools, **shapes):
    return [
        *(tools.var(name, tools.n, HIDDEN) for name in ("x", "y")),
        tools.var("weight", HIDDEN),
        *(tools.var(name, *shape) for name, shape in shapes.items()),
    ]


def norm(x, weight, axes=-1):
    return relax.op.nn.rms_norm(x, weight, axes, EPS)


def row(tools):
    return relax.TensorType((tools.n, HIDDEN), "float32")


def residual(tools):
    """norm(x + y) + (x + y): both results of the fused kernel are read."""

    def body(builder, x, y, weight):
        total = builder.emit(relax.op.add(x, y))
        return relax.op.add(builder.emit(norm(total, weight)), total)

    return tools.forward(params(tools), body, 2)


def fused(tools):
    def body(builder, x, y, weight):
        kernel = tools.target.kernels.add_rms_norm(HIDDEN, EPS)
        pair = tools.call_kernel(builder, kernel, [x, y, weight], [row(tools), row(tools)])
        total, normed = (builder.emit(relax.TupleGetItem(pair, i)) for i in range(2))
        return relax.op.add(normed, total)

    return tools.forward(params(tools), body, 2)


def test_add_and_norm_become_one_kernel(tools):
    tools.same(fuse_add_norm(residual(tools), tools.target), fused(tools))


def test_a_lone_norm_becomes_the_target_s(tools):
    def before(builder, x, y, weight):
        return norm(x, weight)

    def expected(builder, x, y, weight):
        gv = builder.add_func(tools.target.kernels.rms_norm(HIDDEN, EPS).without_attr("global_symbol"), "rms_norm")
        return relax.call_tir(gv, [x, weight], row(tools))

    found = fuse_add_norm(tools.forward(params(tools), before, 2), tools.target)
    tools.same(found, tools.forward(params(tools), expected, 2))


def test_a_bias_is_no_residual(tools):
    """x + bias stays an addition: the norm alone becomes a kernel."""

    def before(builder, x, y, weight, bias):
        return norm(builder.emit(relax.op.add(x, bias)), weight)

    mod = fuse_add_norm(tools.forward(params(tools, bias=(HIDDEN,)), before, 2), tools.target)
    assert tools.ops(mod) == ["add", "rms_norm"]


def test_another_axis_stays(tools):
    def body(builder, x, y, weight, cube):
        return norm(cube, weight)

    mod = tools.forward(params(tools, cube=(tools.n, 2, HIDDEN)), body, 2)
    tools.same(fuse_add_norm(mod, tools.target), mod)


def test_two_norms_of_one_sum(tools, rng):
    """The sum is computed once; only one of the norms can be in its kernel."""

    def body(builder, x, y, weight, other):
        total = builder.emit(relax.op.add(x, y))
        first, second = (builder.emit(norm(total, w)) for w in (weight, other))
        return relax.op.subtract(first, second)

    before = tools.forward(params(tools, other=(HIDDEN,)), body, 2)
    arrays = [rng.normal(size=s).astype("f4") for s in [(5, HIDDEN), (5, HIDDEN), (HIDDEN,), (HIDDEN,)]]
    after = fuse_add_norm(before, tools.target)
    np.testing.assert_allclose(tools.run(after, *arrays), tools.run(before, *arrays), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 5])
def test_same_result(tools, rng, tokens):
    before = residual(tools)
    arrays = [rng.normal(size=s).astype("f4") for s in [(tokens, HIDDEN), (tokens, HIDDEN), (HIDDEN,)]]
    after = fuse_add_norm(before, tools.target)
    np.testing.assert_allclose(tools.run(after, *arrays), tools.run(before, *arrays), rtol=1e-4, atol=1e-5)

import numpy as np
import pytest
import tvm
from tvm import IRModule, relax, te
from tvm.script import tirx as T  # noqa: N812

from mlcgen.formats import F32
from mlcgen.passes.schedule import HOW, describe, schedule
from mlcgen.targets import resolve


@T.prim_func(s_tir=True, private=True)
def doubled(a: T.Buffer((8, 32), "float32"), out: T.Buffer((8, 32), "float32")):
    for i, j in T.grid(8, 32):
        with T.sblock("out"):
            vi, vj = T.axis.remap("SS", [i, j])
            out[vi, vj] = a[vi, vj] * T.float32(2)


@T.prim_func(s_tir=True, private=True)
def doubled_in_parallel(a: T.Buffer((8, 32), "float32"), out: T.Buffer((8, 32), "float32")):
    T.func_attr({"mlcgen.how": "rule: elementwise"})
    for i_j_0_fused in T.parallel(16):
        for j_1 in T.vectorized(16):
            with T.sblock("out"):
                vi = T.axis.spatial(8, i_j_0_fused // 2)
                vj = T.axis.spatial(32, i_j_0_fused % 2 * 16 + j_1)
                out[vi, vj] = a[vi, vj] * T.float32(2)


@T.prim_func(s_tir=True, private=True)
def summed(a: T.Buffer((8, 32), "float32"), out: T.Buffer((8,), "float32")):
    for i, k in T.grid(8, 32):
        with T.sblock("out"):
            vi, vk = T.axis.remap("SR", [i, k])
            with T.init():
                out[vi] = T.float32(0)
            out[vi] = out[vi] + a[vi, vk]


@T.prim_func(s_tir=True, private=True)
def summed_in_parallel(a: T.Buffer((8, 32), "float32"), out: T.Buffer((8,), "float32")):
    T.func_attr({"mlcgen.how": "rule: rows"})
    for i in T.parallel(8):
        for k in range(32):
            with T.sblock("out"):
                vi, vk = T.axis.remap("SR", [i, k])
                with T.init():
                    out[vi] = T.float32(0)
                out[vi] = out[vi] + a[vi, vk]


@T.prim_func(s_tir=True, private=True)
def total(a: T.Buffer((32,), "float32"), out: T.Buffer((1,), "float32")):
    for k in range(32):
        with T.sblock("out"):
            vk = T.axis.reduce(32, k)
            with T.init():
                out[0] = T.float32(0)
            out[0] = out[0] + a[vk]


@pytest.mark.parametrize(
    ("before", "expected"), [(doubled, doubled_in_parallel), (summed, summed_in_parallel)], ids=["elementwise", "rows"]
)
def test_kernels_get_a_schedule(before, expected):
    tvm.ir.assert_structural_equal(
        schedule(IRModule({"kernel": before}), resolve("cpu")), IRModule({"kernel": expected})
    )


def test_what_no_rule_takes_stays_serial_and_says_so():
    found = schedule(IRModule({"kernel": total}), resolve("cpu"))
    expected = IRModule({"kernel": total.with_attr(HOW, "fallback: serial")})
    tvm.ir.assert_structural_equal(found, expected)


def test_a_kernel_that_a_target_wrote_stays(tools):
    kernels = {
        "embedding": tools.target.kernels.embedding(F32, 40, 32).without_attr("global_symbol"),
        "finished": summed.with_attr(HOW, "by hand"),
    }
    found = schedule(IRModule(kernels), resolve("cpu"))
    tvm.ir.assert_structural_equal(found, IRModule(kernels))
    assert describe(found)["finished"] == "by hand"


def test_a_kernel_without_loops(tools):
    mod = tools.forward([tools.var("x")], lambda builder, x: relax.op.add(x, x))
    assert set(describe(schedule(relax.transform.LegalizeOps()(mod), resolve("cpu"))).values()) == {"fallback: serial"}


def test_same_result(tools, rng):
    """Inlined blocks, a reduction between elementwise blocks, a kernel with two results; n rows."""

    def two(a):
        first = te.compute(a.shape, lambda i, j: a[i, j] * 2.0, name="first")
        return [first, te.compute(a.shape, lambda i, j: first[i, j] + 1.0, name="second")]

    def body(builder, x):
        pair = builder.emit_te(two, x)
        first, second = (builder.emit(relax.TupleGetItem(pair, i)) for i in range(2))
        total = builder.emit(relax.op.sum(builder.emit(relax.op.exp(first)), axis=[1], keepdims=True))
        return relax.op.divide(builder.emit(relax.op.nn.silu(second)), total)

    x = rng.normal(size=(5, 48)).astype("f4")
    found = tools.run(tools.forward([tools.var("x", tools.n, 48)], body), x)
    second = 2 * x + 1
    wanted = second / (1 + np.exp(-second)) / np.exp(2 * x).sum(1, keepdims=True)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)

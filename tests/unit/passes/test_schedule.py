import numpy as np
import pytest
import tvm
from tvm import IRModule, relax, te
from tvm.script import tirx as T  # noqa: N812

from mlcgen.errors import CompileError
from mlcgen.formats import F16, F32
from mlcgen.passes.schedule import HOW, describe, schedule
from mlcgen.runtime.sizes import evaluate
from mlcgen.targets import resolve
from mlcgen.targets.cuda_codegen import generate


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


# A device of many threads.


@T.prim_func(s_tir=True, private=True)
def doubled_by_threads(a: T.Buffer((8, 32), "float32"), out: T.Buffer((8, 32), "float32")):
    T.func_attr({"mlcgen.how": "rule: elementwise"})
    for block in T.thread_binding(1, thread="blockIdx.x"):
        for thread in T.thread_binding(256, thread="threadIdx.x"):
            with T.sblock("out"):
                vi = T.axis.spatial(8, (block * 256 + thread) // 32)
                vj = T.axis.spatial(32, (block * 256 + thread) % 32)
                out[vi, vj] = a[vi, vj] * T.float32(2)


@T.prim_func(s_tir=True, private=True)
def summed_by_threads(a: T.Buffer((8, 32), "float32"), out: T.Buffer((8,), "float32")):
    T.func_attr({"mlcgen.how": "rule: elementwise"})
    for block in T.thread_binding(1, thread="blockIdx.x"):
        for thread in T.thread_binding(256, thread="threadIdx.x"):
            for k in range(32):
                with T.sblock("out"):
                    vi = T.axis.spatial(8, block * 256 + thread)
                    vk = T.axis.reduce(32, k)
                    T.where(block * 256 + thread < 8)
                    with T.init():
                        out[vi] = T.float32(0)
                    out[vi] = out[vi] + a[vi, vk]


@T.prim_func(s_tir=True, private=True)
def summed_by_columns(a: T.Buffer((8, 32), "float32"), out: T.Buffer((32,), "float32")):
    """The reduction is the outer loop."""
    for k, j in T.grid(8, 32):
        with T.sblock("out"):
            vk, vj = T.axis.remap("RS", [k, j])
            with T.init():
                out[vj] = T.float32(0)
            out[vj] = out[vj] + a[vk, vj]


@pytest.fixture
def device():
    return resolve("cuda:sm_80")


def scheduled_te(tools, device, body, *params):
    mod = tools.forward(params, body)
    pipeline = [relax.transform.LegalizeOps(), relax.transform.AnnotateTIROpPattern()]
    for apply in (*pipeline, relax.transform.FuseOps(), relax.transform.FuseTIR()):
        mod = apply(mod)
    return schedule(mod, device)


@pytest.mark.parametrize(
    ("before", "expected"),
    [(doubled, doubled_by_threads), (summed, summed_by_threads)],
    ids=["elementwise", "a reduction inside"],
)
def test_a_thread_for_each_element(device, before, expected):
    tvm.ir.assert_structural_equal(schedule(IRModule({"kernel": before}), device), IRModule({"kernel": expected}))


@pytest.mark.parametrize("kernel", [total, summed_by_columns], ids=["one result", "a reduction outside"])
def test_what_no_device_rule_takes_is_reported(device, kernel):
    found = schedule(IRModule({"kernel": kernel}), device)
    tvm.ir.assert_structural_equal(found, IRModule({"kernel": kernel.with_attr(HOW, "fallback: serial")}))
    assert describe(found) == {"kernel": "fallback: serial"}
    with pytest.raises(CompileError, match=r"kernel .*not scheduled for a GPU; compile for -t cpu"):
        generate({"kernel": found["kernel"]}, device.tvm)


def test_blocks_in_a_chain_are_one(tools, device):
    """exp(x) * 2 + 1 of n rows: n * 48 elements in blocks of 256."""

    def body(builder, x):
        doubled = builder.emit(relax.op.multiply(builder.emit(relax.op.exp(x)), relax.const(2.0)))
        return relax.op.add(doubled, relax.const(1.0))

    found = scheduled_te(tools, device, body, tools.var("x", tools.n, 48))
    (name,) = describe(found)
    assert describe(found) == {name: "rule: elementwise"}
    code = generate({name: found[name]}, device.tvm)[name]
    (variant,) = code.variants
    (launch,) = variant.launches
    assert launch.block == device.block_threads == 256
    for n in (1, 5, 6, 100):
        assert [evaluate(size, {"n": n}) for size in launch.grid] == [-(-n * 48 // 256), 1, 1]
    assert not launch.overlaps  # it does not wait for the kernel before it
    text = code.functions[launch.function]
    assert "blockIdx.x" in text
    assert "n * " in text  # elements of the last block that there are not are left out


def test_a_reduction_after_elementwise_blocks(tools, device):
    """sum(x * x) of each row: one thread a row, what it adds computed on the way."""
    found = scheduled_te(
        tools, device, lambda b, x: relax.op.sum(b.emit(relax.op.multiply(x, x)), axis=[1]), tools.var("x", tools.n, 48)
    )
    (name,) = describe(found)
    assert describe(found) == {name: "rule: elementwise"}
    (variant,) = generate({name: found[name]}, device.tvm)[name].variants
    (launch,) = variant.launches
    for n in (1, 256, 257):
        assert [evaluate(size, {"n": n}) for size in launch.grid] == [-(-n // 256), 1, 1]


def test_two_blocks_that_stay_two_are_a_fallback(tools, device):
    """Each element minus its row's largest: no thread may begin before the rows' sums are complete."""

    def centered(a):
        k = te.reduce_axis((0, 48), "k")
        largest = te.compute((a.shape[0],), lambda i: te.max(a[i, k], axis=k), name="largest")
        return te.compute(a.shape, lambda i, j: a[i, j] - largest[i], name="centered")

    found = scheduled_te(tools, device, lambda b, x: b.emit_te(centered, x), tools.var("x", tools.n, 48))
    assert set(describe(found).values()) == {"fallback: serial"}


def test_kernels_of_the_device_stay(device):
    kernels = {"embedding": device.kernels.embedding(F16, 40, 32).without_attr("global_symbol")}
    found = schedule(IRModule(kernels), device)
    tvm.ir.assert_structural_equal(found, IRModule(kernels))
    assert describe(found) == {"embedding": "kernel: targets/cuda_kernels/lookup.py"}

import numpy as np
import pytest
from tvm import relax

from mlcgen import passes
from mlcgen.adapter_layout import AdapterLimits, ProjectionGroup
from mlcgen.models.layers import export
from mlcgen.passes.add_adapters import adapter_groups, add_adapters
from mlcgen.passes.rewrite import FORWARD
from mlcgen.targets import resolve
from mlcgen.targets.base import LowRank

ROWS, COLUMNS, RANK, SLOTS = 20, 24, 3, 2
LIMITS = AdapterLimits(RANK, SLOTS, "float32")


def add(tools, mod):
    return add_adapters(mod, LIMITS, tools.target)


def product(tools, bias=False, residual=False, name="a.q_proj.weight"):
    def body(builder, x, *params):
        params = list(params)
        before = params.pop(0) if residual else None
        out = tools.linear(builder, x, params[0], params[1] if bias else None)
        return relax.op.add(before, out) if residual else out

    inputs = [tools.var("x", tools.n, COLUMNS), *([tools.var("r", tools.n, ROWS)] if residual else [])]
    weights = [tools.var(name, ROWS, COLUMNS), *([tools.var("a.q_proj.bias", ROWS)] if bias else [])]
    return tools.forward([*inputs, *weights], body, len(inputs))


def adapted(tools):
    group = ProjectionGroup(("a.q_proj",), COLUMNS, (ROWS,))

    def body(builder, x, slots, a, b, weight):
        y = tools.linear(builder, x, weight)
        kernel = tools.target.kernels.low_rank(LowRank(COLUMNS, (ROWS,), LIMITS))
        gv = builder.add_func(kernel.without_attr("global_symbol"), str(kernel.attrs["global_symbol"]))
        return relax.call_tir_inplace(gv, [x, slots, a, b, y], [4], [y.ty])

    buffers = [tools.var("lora_a_0", *group.a_shape(LIMITS)), tools.var("lora_b_0", *group.b_shape(LIMITS))]
    x, slots = tools.var("x", tools.n, COLUMNS), tools.var("adapter_slots", tools.n, dtype="int32")
    return tools.forward([x, slots, *buffers, tools.var("a.q_proj.weight", ROWS, COLUMNS)], body, 4), group


def test_a_product_gets_the_path(tools):
    found, (expected, group) = add(tools, product(tools)), adapted(tools)
    assert adapter_groups(found) == (group,)
    found.update_func(found.get_global_var(FORWARD), found[FORWARD].without_attr("mlcgen.adapters"))
    canonical = relax.transform.CanonicalizeBindings()
    tools.same(canonical(found), canonical(expected))


def test_the_vocabulary_stays(tools):
    mod = product(tools, name="lm_head.weight")
    found = add(tools, mod)
    assert adapter_groups(found) == ()
    assert tools.ops(found) == tools.ops(mod)


@pytest.mark.parametrize(("bias", "residual"), [(True, False), (False, True), (True, True)])
def test_bias_and_residual_come_before(tools, bias, residual):
    """Where the product's kernel takes them along."""
    ops = tools.ops(add(tools, product(tools, bias, residual)))
    assert ops == ["permute_dims", "matmul", *["add"] * (bias + residual), "low_rank"]


def test_a_product_that_others_read_too(tools):
    def body(builder, x, weight):
        out = tools.linear(builder, x, weight)
        return relax.op.multiply(builder.emit(relax.op.add(out, x)), out)

    mod = tools.forward([tools.var("x", tools.n, ROWS), tools.var("w", ROWS, ROWS)], body)
    assert tools.ops(add(tools, mod)) == ["permute_dims", "matmul", "low_rank", "add", "multiply"]


def test_a_sum_of_two_products(tools, rng):
    def body(builder, x, v, w):
        left, right = tools.linear(builder, x, v), tools.linear(builder, x, w)
        return relax.op.add(left, right)

    weights = [tools.var(name, ROWS, COLUMNS) for name in ("v", "w")]
    found = add(tools, tools.forward([tools.var("x", tools.n, COLUMNS), *weights], body))
    groups = adapter_groups(found)
    assert len(groups) == 2
    x = rng.normal(size=(3, COLUMNS)).astype("f4")
    v, w = (rng.normal(size=(ROWS, COLUMNS)).astype("f4") for _ in range(2))
    buffers, update = random_buffers(rng, groups)
    out = tools.run(found, x, np.array([0, -1, 1], "i4"), *buffers, v, w)
    wanted = x @ (v + w).T
    for t, slot in ((0, 0), (2, 1)):
        wanted[t] += sum(x[t] @ update(i, slot).T for i in range(2))
    np.testing.assert_allclose(out, wanted, rtol=1e-4, atol=1e-4)


def random_buffers(rng, groups):
    """(all buffers, B A by group and slot) of groups of one part."""
    buffers = [rng.normal(size=s).astype("f4") for g in groups for s in (g.a_shape(LIMITS), g.b_shape(LIMITS))]

    def update(group, slot):
        a, b = buffers[2 * group][slot], buffers[2 * group + 1][slot]
        rows = a.transpose(0, 2, 1).reshape(-1, a.shape[1])[:RANK]
        return b.transpose(0, 2, 1).reshape(-1, RANK)[: groups[group].out_features[0]] @ rows

    return buffers, update


def test_norm_and_gate_are_the_kernels_own(tools):
    def normed(builder, x, norm, w):
        return tools.linear(builder, builder.emit(relax.op.nn.rms_norm(x, norm, [-1], 1e-5)), w)

    weights = [tools.var("norm", COLUMNS), tools.var("w", ROWS, COLUMNS)]
    found = add(tools, tools.forward([tools.var("x", tools.n, COLUMNS), *weights], normed))
    assert "low_rank_norm" in tools.ops(found)

    def gated(builder, x, w):
        split = builder.emit(relax.op.split(x, 2, axis=1))
        gate, up = (builder.emit(relax.TupleGetItem(split, i)) for i in range(2))
        hidden = builder.emit(relax.op.multiply(builder.emit(relax.op.nn.silu(gate)), up))
        return tools.linear(builder, hidden, w)

    mod = tools.forward([tools.var("x", tools.n, 2 * COLUMNS), tools.var("w", ROWS, COLUMNS)], gated)
    assert "low_rank_gated" in tools.ops(add(tools, mod))


def swiglu(tools, is_read_again=False):
    """A product with gate and up, SwiGLU, and the product with down; or the sum of SwiGLU's result and up."""

    def body(builder, x, gate_up, down):
        split = builder.emit(relax.op.split(tools.linear(builder, x, gate_up), 2, axis=1))
        gate, up = (builder.emit(relax.TupleGetItem(split, i)) for i in range(2))
        hidden = builder.emit(relax.op.multiply(builder.emit(relax.op.nn.silu(gate)), up))
        return relax.op.add(hidden, up) if is_read_again else tools.linear(builder, hidden, down)

    weights = [tools.var("gate_up", 2 * COLUMNS, COLUMNS), tools.var("down", COLUMNS, COLUMNS)]
    return tools.forward([tools.var("x", tools.n, COLUMNS), *weights], body)


@pytest.mark.parametrize("target", ["cuda:sm_90", "vulkan"])
def test_swiglu_of_a_product_comes_after_its_path(tools, target):
    """Where products compute their own SwiGLU, unless something else reads what it is of."""
    limits = AdapterLimits(RANK, SLOTS, "float16")
    found = add_adapters(swiglu(tools), limits, resolve(target))
    product = ["permute_dims", "matmul"]
    assert tools.ops(found) == [*product, "low_rank_swiglu", *product, "low_rank"]
    found = add_adapters(swiglu(tools, is_read_again=True), limits, resolve(target))
    assert tools.ops(found) == [*product, "low_rank", "split", "nn.silu", "multiply", "add"]
    found = add(tools, swiglu(tools))
    assert tools.ops(found) == [*product, "low_rank", "split", "nn.silu", "multiply", *product, "low_rank_gated"]


def test_projections_that_became_one(tools):
    config = tools.config()
    mod, _ = export(config)
    options = passes.PassOptions(tools.sources(mod), tools.layout(config), {}, LIMITS)
    found = tools.apply(mod, passes.model_pipeline(tools.target, options))
    groups = adapter_groups(found)
    assert [[name.rpartition(".")[2] for name in g.projections] for g in groups] == 2 * [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]
    plain = [op for op in tools.ops(found) if not op.startswith("low_rank")]
    assert plain == tools.ops(tools.optimised(config, tools.layout(config)))

import numpy as np
import pytest
from tvm import relax, tirx

from mlcgen.models.layers import export
from mlcgen.passes.select_logit_rows import select_logit_rows


def model(tools, rows=None):
    """relu(x) W^T, of the rows `rows` where they are given."""

    def body(builder, x, *params):
        hidden = builder.emit(relax.op.nn.relu(x))
        transposed = builder.emit(relax.op.permute_dims(params[-1]))
        if rows is not None:
            hidden = builder.emit(relax.op.take(hidden, params[0], axis=0, mode="clip"))
        return builder.emit(relax.op.matmul(hidden, transposed))

    params = [tools.var("x", tools.n, 8), *([] if rows is None else [rows]), tools.var("w", 40, 8)]
    return tools.forward(params, body, len(params) - 1)


def test_takes_rows_before_the_output_matrix(tools):
    rows = tools.var("logit_rows", tirx.Var("rows", "int64"), dtype="int32")
    tools.same(select_logit_rows(model(tools)), model(tools, rows))


def test_other_matmuls_keep_every_row(tools):
    mod, _ = export(tools.config(num_layers=1))
    new = select_logit_rows(mod)
    # One take more (the embedding has one), and only the last matmul has the new number of rows.
    assert tools.ops(new).count("take") == tools.ops(mod).count("take") + 1
    values = [b.value for b in new["forward"].body.blocks[0].bindings]
    matmuls = [v for v in values if isinstance(v, relax.Call) and v.op.name == "relax.matmul"]
    assert [str(m.ty.shape[0]) for m in matmuls] == ["n"] * (len(matmuls) - 1) + ["rows"]


@pytest.mark.parametrize("tied", [True, False])
def test_same_result(tools, rng, tied):
    before, _ = export(tools.config(num_layers=1, tie_word_embeddings=tied))
    weights = tools.weights(before, rng)
    ids, positions = rng.integers(0, 40, 6).astype("i4"), np.arange(6, dtype="i4")
    rows = np.array([5, 0, 5], "i4")
    plain = tools.run(tools.reference(before), ids, positions, *weights)
    selected = tools.run(tools.reference(select_logit_rows(before)), ids, positions, rows, *weights)
    np.testing.assert_allclose(selected, plain[rows], rtol=1e-5, atol=1e-5)

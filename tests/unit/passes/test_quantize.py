import ml_dtypes
import numpy as np
import pytest
from tvm import relax

from mlcgen.formats import BF16, F16, F32, Q4, Q8, TILE, grouped
from mlcgen.passes.packing import dequantize, pack_groups, quantize_and_pack
from mlcgen.passes.quantize import FORMAT, WeightSource, quantize

ROWS, COLUMNS = 20, 64  # rows: not a multiple of the tile's 16
GROUPED = [Q8, Q4, grouped(8, 16), grouped(4, has_minimum=True), grouped(8, has_minimum=True), grouped(4, 64)]
FLOATS = [F32, F16, BF16]


def ids(formats):
    return [fmt.name for fmt in formats]


def model(tools, names=("w",), others=()):
    """x W^T with the matrices `names` stacked; `others`: unused parameters."""

    def body(builder, x, *weights):
        stack = list(weights[: len(names)])
        weight = stack[0] if len(stack) == 1 else builder.emit(relax.op.concat(stack, axis=0))
        return relax.op.matmul(x, builder.emit(relax.op.permute_dims(weight)))

    params = [tools.var("x", tools.n, COLUMNS), *(tools.var(name, ROWS, COLUMNS) for name in names), *others]
    return tools.forward(params, body)


def stored(builder, fmt, matrix, rows):
    """The dequantized form of what is packed from `matrix`."""
    packed = builder.emit_te(lambda w: quantize_and_pack(fmt, w), matrix, primfunc_name_hint="quantize")
    return decoded(builder, fmt, packed, rows)


def decoded(builder, fmt, packed, rows):
    parts = [packed]
    if isinstance(packed.ty, relax.TupleType):
        parts = [builder.emit(relax.TupleGetItem(packed, i)) for i in range(len(packed.ty.fields))]
    attrs = {FORMAT: fmt.name}
    return builder.emit_te(
        lambda *p: dequantize(fmt, rows, COLUMNS, p), *parts, primfunc_name_hint="dequantize", primfunc_attrs=attrs
    )


def canonical(mod):
    """Without the second name of a variable (`parts = packed`)."""
    return relax.transform.CanonicalizeBindings()(mod)


@pytest.mark.parametrize("fmt", [F32, Q8, Q4], ids=ids([F32, Q8, Q4]))
@pytest.mark.parametrize("names", [("w",), ("a", "b")])
def test_a_matrix_becomes_stored_parts(tools, fmt, names):
    def body(builder, x, *weights):
        weight = weights[0] if len(names) == 1 else builder.emit(relax.op.concat(list(weights), axis=0))
        whole = stored(builder, fmt, weight, ROWS * len(names))
        return relax.op.matmul(x, builder.emit(relax.op.permute_dims(whole)))

    params = [tools.var("x", tools.n, COLUMNS), *(tools.var(name, ROWS, COLUMNS) for name in names)]
    found = quantize(model(tools, names), {name: WeightSource(name, fmt) for name in names})
    tools.same(canonical(found), canonical(tools.forward(params, body)))


@pytest.mark.parametrize("fmt", GROUPED[2:4], ids=ids(GROUPED[2:4]))
def test_a_matrix_held_in_groups_becomes_new_parameters(tools, fmt):
    parts = ["codes", "scale", "minimum"][: 2 + fmt.has_minimum]

    def body(builder, x, w, *groups):
        packed = builder.emit_te(lambda *p: pack_groups(fmt, *p), *groups, primfunc_name_hint="pack")
        return relax.op.matmul(x, builder.emit(relax.op.permute_dims(decoded(builder, fmt, packed, ROWS))))

    shapes = {"codes": (COLUMNS, "uint8"), "scale": (COLUMNS // fmt.group, "float16")}
    shapes["minimum"] = shapes["scale"]
    groups = [tools.var(f"w.{part}", ROWS, shapes[part][0], dtype=shapes[part][1]) for part in parts]
    params = [tools.var("x", tools.n, COLUMNS), tools.var("w", ROWS, COLUMNS), *groups]
    found = quantize(model(tools), {"w": WeightSource("w", fmt, in_groups=True)})
    assert [p.name for p in found["forward"].params] == ["x", "w", *(f"w.{part}" for part in parts)]
    tools.same(canonical(found), canonical(tools.forward(params, body)))


def test_an_embedding_and_a_tied_output_share_their_parts(tools):
    def body(builder, ids, table):
        x = builder.emit(relax.op.take(table, ids, axis=0))
        return relax.op.matmul(x, builder.emit(relax.op.permute_dims(table)))

    params = [tools.var("ids", tools.n, dtype="int32"), tools.var("table", ROWS, COLUMNS)]
    found = quantize(tools.forward(params, body), {"table": WeightSource("table", Q8)})
    assert tools.ops(found) == ["quantize", "dequantize", "take", "permute_dims", "matmul"]


def test_what_has_no_source_stays(tools):
    tools.same(quantize(model(tools), {}), model(tools))
    tools.same(quantize(model(tools, ("a", "b")), {"a": WeightSource("a", Q8)}), model(tools, ("a", "b")))


def test_activations_stay(tools):
    """A transposed activation is no weight, whatever its name."""

    def body(builder, x):
        w = builder.emit(relax.op.add(x, x), "w")
        return relax.op.matmul(x, builder.emit(relax.op.permute_dims(w)))

    mod = tools.forward([tools.var("x", tools.n, COLUMNS)], body)
    tools.same(quantize(mod, {"w": WeightSource("w", Q8)}), mod)


# Numbers


def untile(tiles, rows):
    """(tiles, columns, 16) -> (rows, columns); the padding holds zeros."""
    matrix = tiles.transpose(0, 2, 1).reshape(-1, tiles.shape[1])
    return matrix[:rows]


def unpack_codes(fmt, w, rows):
    """(tiles, K * bits / 32, 16, 4) -> (rows, K), by the words of mlcgen/formats.py."""
    tiles, chunks, _, _ = w.shape
    codes = np.zeros((tiles * TILE, chunks * 32 // fmt.bits), np.uint8)
    for c in range(chunks):
        for j in range(4):
            column = w[:, c, :, j].reshape(-1)
            if fmt.bits == 8:
                codes[:, 4 * c + j] = column
            else:
                codes[:, 8 * c + j], codes[:, 8 * c + 4 + j] = column & 15, column >> 4
    return codes[:rows]


def meaning(fmt, parts, rows):
    """The float32 matrix that stored parts stand for."""
    if not fmt.is_grouped:
        stored = parts[0].view(ml_dtypes.bfloat16) if fmt is BF16 else parts[0]
        return untile(stored.astype("f4"), rows)
    scale, *minimum = (np.repeat(untile(p.astype("f4"), rows), fmt.group, axis=1) for p in parts[1:])
    codes = unpack_codes(fmt, parts[0], rows).astype("f4")
    return codes * scale + minimum[0] if fmt.has_minimum else (codes - fmt.zero_point) * scale


def checked(fmt, parts, rows):
    expected = [(shape, dtype) for _, shape, dtype in fmt.parts(rows, COLUMNS)]
    assert [(p.shape, str(p.dtype)) for p in parts] == expected
    return parts


SYMMETRIC = [*FLOATS, *(fmt for fmt in GROUPED if not fmt.has_minimum)]


@pytest.mark.parametrize("rows", [16, ROWS])
@pytest.mark.parametrize(
    "fmt",
    SYMMETRIC,
    ids=ids(SYMMETRIC),
)
def test_quantize_and_pack(tools, rng, fmt, rows):
    matrix = rng.normal(size=(rows, COLUMNS)).astype("f4")
    matrix[3] = 0  # a group of zeros has scale 0
    parts = checked(fmt, tools.evaluate(lambda w: quantize_and_pack(fmt, w), matrix), rows)
    found = meaning(fmt, parts, rows)
    if fmt.is_grouped:
        groups = matrix.reshape(rows, -1, fmt.group)
        steps = np.abs(groups).max(-1, keepdims=True) / (8 if fmt.bits == 4 else 127)
        # Half a step; a whole one at the short end of 4 bits. float16 rounds the scale.
        limit = steps * (1.01 if fmt.bits == 4 else 0.57)
        assert (np.abs(found.reshape(groups.shape) - groups) <= limit).all()
    else:
        exact = {"f32": "f4", "f16": "f2", "bf16": ml_dtypes.bfloat16}[fmt.name]
        np.testing.assert_array_equal(found, matrix.astype(exact).astype("f4"))
    back = tools.evaluate(lambda *p: dequantize(fmt, rows, COLUMNS, p), *parts)[0]
    np.testing.assert_allclose(back, found, rtol=1e-6)


@pytest.mark.parametrize("fmt", GROUPED, ids=ids(GROUPED))
def test_pack_groups_is_exact(tools, rng, fmt):
    codes = rng.integers(0, 1 << fmt.bits, (ROWS, COLUMNS), dtype=np.uint8)
    scale, minimum = (rng.normal(size=(ROWS, COLUMNS // fmt.group)).astype("f2") for _ in range(2))
    sources = [codes, scale, minimum][: 2 + fmt.has_minimum]
    parts = checked(fmt, tools.evaluate(lambda *p: pack_groups(fmt, *p), *sources), ROWS)
    np.testing.assert_array_equal(unpack_codes(fmt, parts[0], ROWS), codes)
    np.testing.assert_array_equal(untile(parts[1], ROWS), scale)
    back = tools.evaluate(lambda *p: dequantize(fmt, ROWS, COLUMNS, p), *parts)[0]
    np.testing.assert_allclose(back, meaning(fmt, parts, ROWS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fmt", [F32, Q8, Q4], ids=ids([F32, Q8, Q4]))
def test_near_the_same_result(tools, rng, fmt):
    x, w = rng.normal(size=(5, COLUMNS)).astype("f4"), rng.normal(size=(ROWS, COLUMNS)).astype("f4")
    found = tools.run(quantize(model(tools), {"w": WeightSource("w", fmt)}), x, w)
    error = np.linalg.norm(found - x @ w.T) / np.linalg.norm(x @ w.T)
    assert error < {"f32": 1e-5, "q8": 0.01, "q4": 0.12}[fmt.name]

"""Sizes as data: the same numbers as Python's own arithmetic, and an error for whatever is no size."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlcgen.errors import ArtifactError
from mlcgen.runtime.sizes import MAX_DEPTH, OPERATORS, Size, evaluate

# How Python writes each operator; `not` and `int` make what Python gives a number of 0 or 1.
PYTHON = {
    "+": "({} + {})",
    "-": "({} - {})",
    "*": "({} * {})",
    "//": "({} // {})",
    "ceildiv": "(-(-{} // {}))",
    "%": "({} % {})",
    "min": "min({}, {})",
    "max": "max({}, {})",
    "<=": "int({} <= {})",
    "==": "int({} == {})",
    "and": "int(bool({} and {}))",
}
SYMBOLS = {"n": 7, "rows": 3, "seqs": 0, "blocks": -5}
leaves = st.integers(-100, 10**12) | st.sampled_from(sorted(SYMBOLS))
sizes = st.recursive(
    leaves, lambda part: st.tuples(st.sampled_from(sorted(PYTHON)), part, part).map(list), max_leaves=20
)
# Anything that JSON can hold, operators and symbols among it.
words = st.sampled_from([*PYTHON, *SYMBOLS, "x"])
data = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | words,
    lambda part: st.lists(part, max_size=4) | st.tuples(words, part, part).map(list) | st.dictionaries(words, part),
    max_leaves=10,
)


def as_python(size: Size) -> str:
    if isinstance(size, list):
        operator, left, right = size
        return PYTHON[operator].format(as_python(left), as_python(right))
    return f"({size})"


def nested(depth: int) -> Size:
    size: Size = "n"
    for _ in range(depth):
        size = ["+", size, 1]
    return size


def test_every_operator_is_tested() -> None:
    assert PYTHON.keys() == OPERATORS.keys()


@given(sizes)
def test_as_python_computes_it(size: Size) -> None:
    try:
        expected = eval(as_python(size), {}, SYMBOLS)
    except ZeroDivisionError:
        with pytest.raises(ArtifactError, match="compile the model again"):
            evaluate(size, SYMBOLS)
    else:
        found = evaluate(size, SYMBOLS)
        assert (found, type(found)) == (expected, int)


@given(data)
def test_a_number_or_an_error_for_anything(value: Any) -> None:
    try:
        assert type(evaluate(value, SYMBOLS)) is int
    except ArtifactError as error:
        assert "cannot be computed; compile the model again" in str(error)  # noqa: PT017


@pytest.mark.parametrize("operator", ["//", "%", "ceildiv"])
def test_division_by_zero(operator: str) -> None:
    with pytest.raises(ArtifactError, match=f"the size .*{operator}"):
        evaluate([operator, "n", "seqs"], SYMBOLS)


@pytest.mark.parametrize(
    "size",
    [
        "length",
        "",
        ["**", 2, 2],
        [["+"], 1, 2],
        ["+", 1],
        ["+", 1, 2, 3],
        [],
        ["+", 1, "length"],
        ["+", 1, True],
        ["+", 1, 2.0],
        ["+", 1, None],
        True,
        1.5,
        None,
        {"+": 0, "n": 0, "rows": 0},  # its keys in order would be a size
        ("+", 1, 2),
    ],
    ids=str,
)
def test_what_is_no_size(size: Any) -> None:
    with pytest.raises(ArtifactError, match="cannot be computed; compile the model again"):
        evaluate(size, SYMBOLS)


def test_depth() -> None:
    assert evaluate(nested(MAX_DEPTH), SYMBOLS) == 7 + MAX_DEPTH
    for depth in (MAX_DEPTH + 1, 900, 100_000):
        with pytest.raises(ArtifactError, match="compile the model again") as caught:
            evaluate(nested(depth), SYMBOLS)
        assert len(str(caught.value)) < 200

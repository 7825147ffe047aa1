"""Sizes that depend on a step: expressions as JSON data, so that an artifact's are never evaluated as code.

A size is an int, the name of a symbol ("n", "seqs"), or [operator, size, size].
"""

import reprlib
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from mlcgen.errors import ArtifactError

Size: TypeAlias = Any  # int | str | [str, Size, Size]

MAX_DEPTH = 64  # of operators in operators; a compiler's stay below 10
OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "//": lambda a, b: a // b,
    "ceildiv": lambda a, b: -(-a // b),
    "%": lambda a, b: a % b,
    "min": min,
    "max": max,
    "<=": lambda a, b: int(a <= b),
    "==": lambda a, b: int(a == b),
    "and": lambda a, b: int(bool(a) and bool(b)),
}


def evaluate(size: Size, symbols: Mapping[str, int], depth: int = MAX_DEPTH) -> int:
    """The size's value. Raises ArtifactError for a symbol or an operator that there is not, a division by zero, or what
    is no size or one too deep."""
    if type(size) is int:
        return size
    try:
        if isinstance(size, str):
            return symbols[size]
        if not isinstance(size, list) or depth == 0:
            raise ValueError
        operator, left, right = size
        return OPERATORS[operator](evaluate(left, symbols, depth - 1), evaluate(right, symbols, depth - 1))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        text = reprlib.repr(size)[:80]  # `repr` itself fails on deep lists
        raise ArtifactError(f"the size {text} cannot be computed; compile the model again") from error

"""Sizes that depend on a step: expressions as JSON data, so that an artifact's are never evaluated as code.

A size is an int, the name of a symbol ("n", "seqs"), or [operator, size, size].
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from mlcgen.errors import ArtifactError

Size: TypeAlias = Any  # int | str | [str, Size, Size]

_OPERATORS: dict[str, Callable[[int, int], int]] = {
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


def evaluate(size: Size, symbols: Mapping[str, int]) -> int:
    """The size's value. Raises ArtifactError for a symbol or an operator that there is not, or a division by zero."""
    if type(size) is int:
        return size
    try:
        if isinstance(size, str):
            return symbols[size]
        operator, left, right = size
        return _OPERATORS[operator](evaluate(left, symbols), evaluate(right, symbols))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ArtifactError(f"the size {str(size)[:80]} cannot be computed; compile the model again") from error

"""What JSON from outside has to look like, and what is wrong with it.

A schema is a type, a range of integers, a tuple of the strings allowed, [schema of each item], {key: schema of its
value}, where other keys may be there too, or one of the classes here.
"""

import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["NUMBER", "Check", "Items", "Kinds", "Named", "Nullable", "Optional", "first_problem", "mismatch"]


@dataclass(frozen=True)
class Named:
    """An object of any keys, whose values are of one schema."""

    item: Any


class Items:
    """A list of so many items, each of its own schema."""

    def __init__(self, *items: Any) -> None:
        self.items = items


@dataclass(frozen=True)
class Optional:
    """What may be missing from an object."""

    item: Any


@dataclass(frozen=True)
class Nullable:
    """What may be null, or missing from an object."""

    item: Any


@dataclass(frozen=True)
class Kinds:
    """One of several schemas, by what stands at a key: an item's place in a list, or of an object."""

    key: int | str
    kinds: Mapping[str, Any]


@dataclass(frozen=True)
class Check:
    """What a function accepts, and what to call that."""

    accepts: Callable[[Any], bool]
    what: str


NUMBER = Check(lambda value: type(value) in (int, float) and abs(value) < 1e300, "number")


def mismatch(value: Any, schema: Any, where: str = "") -> str | None:
    """What is wrong with the value at `where`, or None."""
    if isinstance(schema, Optional):
        return mismatch(value, schema.item, where)
    if isinstance(schema, Nullable):
        return None if value is None else mismatch(value, schema.item, where)
    if isinstance(schema, Kinds):
        kind = _kind(value, schema.key)
        if kind not in schema.kinds:
            return f"{where} is missing or of no known kind; have: {', '.join(schema.kinds)}"
        return mismatch(value, schema.kinds[kind], where)
    if isinstance(schema, dict | Named):
        return _mismatch_of_object(value, schema, where)
    if isinstance(schema, list | Items):
        return _mismatch_of_list(value, schema, where)
    if isinstance(schema, Check):
        return None if schema.accepts(value) else f"{where} is {_shown(value)}, which is no {schema.what}"
    if isinstance(schema, tuple):
        known = isinstance(value, str) and value in schema
        return None if known else f"{where} is {_shown(value)}, none of {', '.join(schema)}"
    if isinstance(schema, range):
        return None if type(value) is int and value in schema else f"{where} is {_shown(value)}, no number that can be"
    return None if type(value) is schema else f"{where} is missing or no {schema.__name__}"


def first_problem(problems: Iterable[str | None]) -> str | None:
    return next(filter(None, problems), None)


def _mismatch_of_object(value: Any, schema: dict[str, Any] | Named, where: str) -> str | None:
    if not isinstance(value, dict):
        return f"{where or 'it'} is missing or no object"
    items = schema.items() if isinstance(schema, dict) else ((key, schema.item) for key in value)
    present = ((key, item) for key, item in items if key in value or not isinstance(item, Optional))
    return first_problem(mismatch(value.get(key), item, f"{where}.{key[:80]}".lstrip(".")) for key, item in present)


def _mismatch_of_list(value: Any, schema: list[Any] | Items, where: str) -> str | None:
    if not isinstance(value, list):
        return f"{where} is missing or no list"
    each = schema if isinstance(schema, list) else schema.items
    if isinstance(schema, Items) and len(value) != len(each):
        return f"{where} has {len(value)} items, not {len(each)}"
    return first_problem(mismatch(v, each[min(i, len(each) - 1)], f"{where}[{i}]") for i, v in enumerate(value))


def _kind(value: Any, key: int | str) -> str:
    try:
        found = value[key]
    except (LookupError, TypeError):
        return ""
    return found if isinstance(found, str) else ""


def _shown(value: Any) -> str:
    return "missing" if value is None else reprlib.repr(value)[:60]  # `repr` itself fails on deep lists

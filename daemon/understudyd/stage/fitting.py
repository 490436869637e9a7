"""Whether a value from the wire is of the type that a keyword is annotated with.

Stricter than Python: true is no number, and a float is no whole number. A whole number is a float, though,
and a list a tuple, because the wire knows no better.
"""

import collections.abc
import math
import types
import typing
from typing import Any

from understudyd.stage.calls import EMPTY, Keyword, alternatives

_LISTS = (list, tuple, collections.abc.Sequence, collections.abc.Iterable)
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    types.NoneType: "nothing",
}


class Misfit(ValueError):
    """The value is of another type."""


def fitted(value: Any, keyword: Keyword) -> Any:
    """The value as the keyword wants it. Raises `Misfit`."""
    if value is None and keyword.default is None:
        return None
    return _fit(value, kind_of(keyword))


def kind_of(keyword: Keyword) -> Any:
    """The annotation; without one, the type of the default."""
    if keyword.kind is not EMPTY:
        return keyword.kind
    return Any if keyword.default in (EMPTY, None) else type(keyword.default)


def is_writable(kind: Any) -> bool:
    """Whether anything but None that the wire can carry fits."""
    return bool(described(kind))


def described(kind: Any) -> str:
    """What fits, in words for an error message; empty when nothing does."""
    return " or ".join(dict.fromkeys(filter(None, map(_described, alternatives(kind)))))


def _described(kind: Any) -> str:
    if kind is Any:
        return "a plain value"
    if kind in _WORDS:
        return "" if kind is types.NoneType else _WORDS[kind]
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(kind)))
    if _is_list(kind):
        item = described(_items(kind)[0])
        return f"a list, each {item}" if item else ""
    return ""


def _fit(value: Any, kind: Any) -> Any:
    # Whole numbers are tried first, so that they stay whole where both kinds of numbers will do.
    for member in sorted(alternatives(kind), key=lambda member: member is float):
        try:
            return _fit_member(value, member)
        except Misfit:
            continue
    raise Misfit


def _fit_member(value: Any, kind: Any) -> Any:
    if isinstance(value, list | tuple):
        return _fit_list(value, kind)
    if isinstance(value, float) and not math.isfinite(value):
        raise Misfit
    if kind is Any and isinstance(value, bool | int | float | str | None):
        return value
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if typing.get_origin(kind) is typing.Literal:
        same = [v for v in typing.get_args(kind) if v == value and type(v) is type(value)]
        if same:
            return same[0]
        raise Misfit
    if kind in _WORDS and type(value) is kind:
        return value
    raise Misfit


def _fit_list(values: Any, kind: Any) -> Any:
    if kind is Any:
        return [_fit(value, Any) for value in values]
    if not _is_list(kind):
        raise Misfit
    items = _items(kind)
    if len(items) > 1 and len(items) != len(values):
        raise Misfit
    kinds = items if len(items) > 1 else items * len(values)
    found = [_fit(value, item) for value, item in zip(values, kinds)]
    return tuple(found) if (typing.get_origin(kind) or kind) is tuple else found


def _is_list(kind: Any) -> bool:
    return (typing.get_origin(kind) or kind) in _LISTS


def _items(kind: Any) -> tuple[Any, ...]:
    """One type for items of any number, or one for each. `tuple[int]` is meant as the former throughout."""
    items = tuple(item for item in typing.get_args(kind) if item is not Ellipsis)
    return items or (Any,)

"""Reading what an earlier life of the machine has left: plain values, none of which is believed unseen."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

DIGITS = 6
"""Of what is written: microseconds, and counts to a millionth."""


ROUNDING = 1e-5
"""By how much what was written may exceed a bound that it kept before."""


class DamagedDocument(ValueError):
    """Not what was written, or written by another version; the message says where."""


def significant(value: float) -> float:
    """As many digits as are written of what spans many orders of magnitude."""
    return float(f"{value:.{DIGITS}g}")


def field(document: Any, key: str) -> Any:
    """A member of an object. Raises `DamagedDocument`, as all of these do."""
    if not isinstance(document, Mapping) or key not in document:
        raise DamagedDocument(f"no {key!r}")
    return document[key]


def number(value: Any, what: str, least: float = 0.0, most: float = math.inf) -> float:
    """A finite number within bounds."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise DamagedDocument(f"{what} is no number")
    if not least <= value <= most:
        raise DamagedDocument(f"{what} is {value:g}: not within {least:g} and {most:g}")
    return float(value)


def whole(value: Any, what: str, most: float = math.inf) -> int:
    """A number without a fraction, 0 or more."""
    if not isinstance(value, int):
        raise DamagedDocument(f"{what} is no whole number")
    return int(number(value, what, 0.0, most))


def text(value: Any, what: str) -> str:
    """A string."""
    if not isinstance(value, str):
        raise DamagedDocument(f"{what} is no text")
    return value


def rows(value: Any, what: str, length: int | None = None) -> Sequence[Any]:
    """A list, of a certain length where one is given."""
    if not isinstance(value, list | tuple) or length not in (None, len(value)):
        raise DamagedDocument(f"{what} is no list" + (f" of {length}" if length is not None else ""))
    return value


def numbers(value: Any, what: str, length: int, least: float = 0.0, most: float = math.inf) -> list[float]:
    """A list of so many numbers within bounds."""
    return [number(entry, what, least, most) for entry in rows(value, what, length)]


def named(value: Any, names: Sequence[str], what: str) -> str:
    """The name with this place in the document's list; "" for one that is not known any more."""
    place = whole(value, what)
    if place >= len(names):
        raise DamagedDocument(f"{what} is {place}: there are {len(names)} names")
    return names[place]

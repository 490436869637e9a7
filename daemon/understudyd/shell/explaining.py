"""The core's decisions as documents: moments become ages, blobs get the names that people know them by."""

import dataclasses
from collections.abc import Callable
from typing import Any

from understudyd.core.decisions import Decision

SHOWN_DECISIONS = 20
"""About one model, in `show`."""


def describe(decision: Decision, label: Callable[[str], str | None], now_s: float) -> dict[str, Any]:
    """Plain JSON; `decision` names the kind, `name` (of a blob) says a model and its component."""
    document = dataclasses.asdict(decision)
    ago_s = round(now_s - document.pop("at_s"), 3)
    for victim in document.get("victims", ()):
        victim["name"] = _name(victim["blob"], label)
    if "blob" in document:
        document["name"] = _name(document["blob"], label)
    if document.get("room_for"):
        document["room_for"] = _name(document["room_for"], label)
    return {"decision": type(decision).__name__, "ago_s": ago_s} | document


def _name(blob: str, label: Callable[[str], str | None]) -> str:
    return label(blob) or blob[:12]

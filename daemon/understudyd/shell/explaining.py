"""The core's decisions as documents: moments become ages, blobs get the names that people know them by."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from understudyd.core.decisions import Decision
from understudyd.shell.served import BlobPlace

SHOWN_DECISIONS = 20
"""About one model, in `show`."""


def describe(decision: Decision, places: Mapping[str, BlobPlace], now_s: float) -> dict[str, Any]:
    """Plain JSON; `decision` names the kind, `name` (of a blob) says a model and its component."""
    document = dataclasses.asdict(decision)
    ago_s = round(now_s - document.pop("at_s"), 3)
    for victim in document.get("victims", ()):
        victim["name"] = _name(victim["blob"], places)
    if "blob" in document:
        document["name"] = _name(document["blob"], places)
    if document.get("room_for"):
        document["room_for"] = _name(document["room_for"], places)
    return {"decision": type(decision).__name__, "ago_s": ago_s} | document


def _name(blob: str, places: Mapping[str, BlobPlace]) -> str:
    place = places.get(blob)
    return blob[:12] if place is None else place.label

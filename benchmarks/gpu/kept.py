"""A GPU check's document as docs/benchmarks.md shows it: `benchmarks/results/<gpu>-<date>.json`."""

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.report.machine import revision
from benchmarks.report.publishing import publishable

_OF_THIS_DEVICE = ("uuid",)


def keep(document: Mapping[str, Any], folder: Path) -> Path | None:
    """Write it without what tells of this one machine; where. None without a GPU, or when narrow models ran.

    Sections that another run of the same day has kept stay beside those of this one.
    """
    if document["gpu"] is None or document["size"] != "real":
        return None
    started = datetime.fromtimestamp(document["started_unix_s"], UTC)
    short_name = re.sub(r"[^a-z0-9]+", "-", document["gpu"]["name"].lower().removeprefix("nvidia ")).strip(
        "-"
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{short_name}-{started:%Y-%m-%d}.json"
    before = json.loads(path.read_text())["sections"] if path.exists() else {}
    kept = {
        "gpu": {name: value for name, value in document["gpu"].items() if name not in _OF_THIS_DEVICE},
        "size": document["size"],
        "machine": document["machine"] | {"kernel": ".".join(document["machine"]["kernel"].split(".")[:2])},
        "started_at": started.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "revision": revision(),
        "failed": document["failed"],
        "sections": before
        | {
            name: {key: value for key, value in found.items() if key != "traceback"}
            for name, found in document["sections"].items()
        },
    }
    path.write_text(json.dumps(publishable(kept), indent=1) + "\n")
    return path

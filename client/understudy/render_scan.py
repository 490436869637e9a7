"""What a scan found, as a table and a line that sums it up."""

from collections import Counter
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from understudy.render import Document, Row, size, table

_ORDER = ("added", "replaced", "unchanged", "skipped", "refused")
_STYLE = {"added": "green", "replaced": "green", "refused": "red", "skipped": "dim"}


def scan_table(results: Sequence[Document], *, is_dry_run: bool = False) -> RenderableType:
    """Every find with what became of it; refused ones last, where they are seen."""
    rows: list[Row] = []
    for result in sorted(results, key=_rank):
        outcome = str(result.get("outcome", "-"))
        said = "would be added" if is_dry_run and outcome == "added" else outcome
        rows.append(
            [
                str(result.get("name") or "-"),
                Text(said, style=_STYLE.get(outcome, "")),
                size(result["size_bytes"]) if result.get("size_bytes") else "-",
                str(result.get("path", "-")),
                str(result.get("why") or ""),
            ]
        )
    counts = Counter(str(result.get("outcome")) for result in results)
    summary = ", ".join(f"{counts[outcome]} {outcome}" for outcome in _ORDER if counts[outcome])
    if is_dry_run:
        summary = f"a dry run, nothing was changed: {summary.replace('added', 'would be added')}"
    return Group(
        table(["model", "outcome", ">size", "source", "why"], rows), Text(summary or "no models found")
    )


def _rank(result: Document) -> int:
    outcome = str(result.get("outcome"))
    return _ORDER.index(outcome) if outcome in _ORDER else len(_ORDER)

"""What a scan or a rescan found, as a table and a line that sums it up."""

from collections import Counter
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from understudy.render import Document, Row, size, table

_ORDER = ("added", "replaced", "unchanged", "skipped", "refused")
_STYLE = {"added": "green", "replaced": "green", "refused": "red", "skipped": "dim"}
_SAID_BEFOREHAND = {
    "added": "would be added",
    "replaced": "would replace",
    "unchanged": "is there already: would be compared",
}
_COUNTED_BEFOREHAND = {
    "added": "would be added",
    "replaced": "would be replaced",
    "unchanged": "there already",
}
_CHANGES = {"added": "green", "replaced": "green", "removed": "yellow"}
_PROBLEMS = ("rejected", "damaged", "away")


def scan_table(
    results: Sequence[Document], *, kind: str = "model", is_dry_run: bool = False
) -> RenderableType:
    """Every find, a model or another `kind`, with what became of it; refused ones last, to be seen."""
    rows: list[Row] = []
    for result in sorted(results, key=_rank):
        outcome = str(result.get("outcome", "-"))
        said = _SAID_BEFOREHAND.get(outcome, outcome) if is_dry_run else outcome
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
    counted = _COUNTED_BEFOREHAND if is_dry_run else {}
    summary = ", ".join(f"{counts[key]} {counted.get(key, key)}" for key in _ORDER if counts[key])
    if is_dry_run:
        summary = f"a dry run, nothing was changed: {summary or 'no models found'}"
    return Group(
        table([kind, "outcome", ">size", "source", "why"], rows), Text(summary or f"no {kind}s found")
    )


def rescan_table(document: Document) -> RenderableType:
    """What a look at all stores has changed; models that cannot be used, and stores that are away."""
    rows: list[Row] = [
        [str(name), Text(change, style=style), ""]
        for change, style in _CHANGES.items()
        for name in document.get(change) or ()
    ]
    rows += [
        [str(name), Text(problem, style="red"), str(why)]
        for problem in _PROBLEMS
        for name, why in (document.get(problem) or {}).items()
    ]
    if not rows:
        return Text("nothing has changed")
    counts = [(len(document.get(key) or ()), key) for key in (*_CHANGES, *_PROBLEMS)]
    summary = ", ".join(f"{count} {key}" for count, key in counts if count)
    return Group(table(["model or store", "outcome", "why"], rows), Text(summary))


def _rank(result: Document) -> int:
    outcome = str(result.get("outcome"))
    return _ORDER.index(outcome) if outcome in _ORDER else len(_ORDER)

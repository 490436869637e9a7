"""Admin documents as tables for people. The documents are plain JSON; a key that is missing shows as a dash.

Imports rich, so `understudyctl` imports this only when it has something to show.
"""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

Document = dict[str, Any]
Row = list[str | Text]

_TIER = {"bound": "bold green", "resident": "green", "loading": "yellow", "host": "cyan", "disk": "dim"}
_STATE = {"ready": "green", "running": "green", "starting": "yellow", "draining": "yellow", "dead": "red"}
# Glyphs as well as colours, for terminals and eyes without them.
_EXTENT = {
    "leased": ("█", "bold green"),
    "in_use": ("█", "bold green"),
    "ready": ("▓", "green"),
    "filling": ("▒", "yellow"),
    "moving": ("~", "yellow"),
    "quarantined": ("x", "red"),
    "free": ("·", "dim"),
}
_MAP_COLUMNS, _MAP_ROWS = 64, 8
_PIPE_COLUMNS = 240


def show(*parts: RenderableType) -> None:
    """Print to stdout; into a pipe wide enough that nothing is cut."""
    Console(width=None if sys.stdout.isatty() else _PIPE_COLUMNS).print(*parts, sep="\n", highlight=False)


# -- documents ---------------------------------------------------------------------------------------------


def status(document: Document) -> RenderableType:
    """The daemon at a glance."""
    state = str(document.get("state", "-"))
    head = Text.assemble(
        (f"understudyd {document.get('version', '')}".strip(), "bold"),
        "  ",
        (state, _STATE.get(state, "")),
        f"  up {duration(document.get('uptime_s'))}  on {_text(document.get('device'))}",
        f"  pid {_text(document.get('pid'))}  id {_text(document.get('daemon'))}",
    )
    arena_facts = document.get("arena") or {}
    host_facts = document.get("host_pool") or {}
    switch = document.get("visible_switch_ms") or {}
    rows: list[tuple[str, RenderableType]] = [
        (
            "models",
            Text(f"{_text(document.get('models'))}, {_text(document.get('models_resident'))} resident"),
        ),
        *_loras(document),
        ("store", Text(_text(document.get("store")))),
        ("requests", Text(_requests(document))),
        ("running", Text(_running(document.get("request_running")))),
        ("visible switch", Text(_switch(switch))),
        ("arena", arena_bar(arena_facts)),
        ("host", arena_bar(host_facts) if host_facts.get("size_bytes") else Text("no host pool")),
    ]
    if document.get("hand_over") == "threads":
        rows.append(("hand-over", Text(f"by threads: {_text(document.get('hand_over_reason'))}", "yellow")))
    if batches := document.get("max_batch"):
        rows.append(("batches", Text(", ".join(f"{name} up to {most}" for name, most in batches.items()))))
    if error := document.get("last_error"):
        rows.append(("last error", Text(_text(error), "red")))
    facts_table = Table.grid(padding=(0, 2))
    for name, value in rows:
        facts_table.add_row(Text(name, "dim"), value)
    return Group(head, facts_table, loaders_table(document.get("loaders") or []))


def models_table(models: Sequence[Document]) -> RenderableType:
    """Models with tiers; pins and use where the daemon tells them."""
    if not models:
        return Text("no models yet; `understudyctl add NAME SOURCE` adds one")
    has_use = any("requests" in model for model in models)
    columns = ["model", "tier", ">size", "pipeline"] + (
        ["pinned", ">requests", ">last used"] if has_use else []
    )
    rows: list[Row] = []
    for model in models:
        row: Row = [
            _text(model.get("name")),
            tier(model),
            size(model.get("size_bytes")),
            _text(model.get("pipeline")),
        ]
        if has_use:
            row += ["pinned" if model.get("pinned") else "", _text(model.get("requests")), ago(model)]
        rows.append(row)
    return table(columns, rows)


def model(document: Document) -> RenderableType:
    """One model and its components."""
    scalars = {key: value for key, value in document.items() if not isinstance(value, list | dict)}
    rows: list[Row] = [
        [
            _text(part.get("name")),
            tier(part),
            "yes" if part.get("host_copy") else "",
            size(part.get("size_bytes")),
            _text(part.get("shared_by")),
            _text(part.get("blob"))[:16],
            _text(part.get("signature"))[:16],
        ]
        for part in document.get("components") or []
    ]
    columns = ["component", "tier", "host copy", ">size", ">shared by", "blob", "signature"]
    return Group(facts(scalars), table(columns, rows))


def arena(document: Document) -> RenderableType:
    """The arena and, where there is one, the host pool."""
    outside = document.get("tensors_outside") or []
    host_pool = document.get("host_pool") or {}
    parts: list[RenderableType] = []
    if outside:
        parts.append(Text(f"{len(outside)} tensors lie outside the arena: {_list(outside[:3])}", "red"))
    parts.append(_drawn(document))
    if host_pool.get("size_bytes"):
        parts += [Text("\nhost pool", "bold"), _drawn(host_pool)]
    return Group(*parts)


def _drawn(document: Document) -> RenderableType:
    """Memory drawn to scale, then its extents in order of their offsets."""
    total = int(document.get("size_bytes") or 0)
    extents = sorted(document.get("extents") or [], key=lambda extent: extent.get("offset") or 0)
    rows: list[Row] = [
        [
            _text(extent.get("offset")),
            size(extent.get("size_bytes")),
            _state(extent.get("state")),
            _text(extent.get("leases")),
            _text(extent.get("blob"))[:16],
            _list(extent.get("models")),
        ]
        for extent in extents
    ]
    by_state: dict[str, int] = {}
    for extent in extents:
        state = str(extent.get("state", "?"))
        by_state[f"{state}_bytes"] = by_state.get(f"{state}_bytes", 0) + int(extent.get("size_bytes") or 0)
    by_state["free_bytes"] = total - sum(by_state.values()) + by_state.get("free_bytes", 0)
    columns = [">offset", ">size", "state", ">leases", "blob", "models"]
    return Group(
        _map(total, extents),
        Text(),
        _legend(by_state, total),
        table(columns, rows) if rows else Text("empty"),
    )


def queue_table(requests: Sequence[Document]) -> RenderableType:
    """What runs and what waits, in order."""
    if not requests:
        return Text("no requests are waiting")
    columns = ["id", "model", "state", ">steps", ">waited", ">starts in", "tier", ">priority", "client"]
    rows: list[Row] = [
        [
            _text(wish.get("id")),
            _text(wish.get("model")),
            _state(wish.get("state")),
            _steps(wish),
            duration(wish.get("waited_s")),
            duration(wish.get("starts_in_s")),
            tier(wish),
            _text(wish.get("priority")),
            _text(wish.get("client")),
        ]
        for wish in requests
    ]
    return table(columns, rows)


def loaders_table(loaders: Sequence[Document]) -> RenderableType:
    """Loaders, and how far the load of each is."""
    if not loaders:
        return Text("no loaders")
    columns = [">loader", ">pid", "state", "load", "route", ">done", ">loads", ">read", ">rate", ">restarts"]
    rows: list[Row] = [
        [
            _text(loader.get("slot", loader.get("id"))),
            _text(loader.get("pid")),
            _state(loader.get("state")),
            _text(loader.get("load")),
            _text(loader.get("route")),
            _share(loader.get("bytes_done"), loader.get("size_bytes")),
            _text(loader.get("loads_done")),
            size(loader.get("bytes_total")),
            rate(loader.get("rate_bytes_per_s")),
            _text(loader.get("restarts")),
        ]
        for loader in loaders
    ]
    return table(columns, rows)


def facts(document: Any) -> RenderableType:
    """Any small document, one fact a line."""
    if not isinstance(document, dict):
        return Text("done" if document is None else _text(document))
    grid = Table.grid(padding=(0, 2))
    for key, value in document.items():
        if key.endswith("_bytes"):
            grid.add_row(Text(key.removesuffix("_bytes"), "dim"), Text(size(value)))
        elif key.endswith(("_s", "_s_ago")):
            grid.add_row(Text(key.removesuffix("_ago").removesuffix("_s"), "dim"), Text(duration(value)))
        else:
            grid.add_row(Text(key, "dim"), Text(_list(value), _TIER.get(str(value), "")))
    return grid if document else Text("done")


def arena_bar(arena: Document) -> RenderableType:
    """Bytes by state as one bar of the arena's whole length."""
    total = int(arena.get("size_bytes") or 0)
    if not total:
        return Text("-")
    bar = Text()
    column, bytes_before = 0, 0
    for state, (glyph, style) in _EXTENT.items():
        bytes_before += int(arena.get(f"{state}_bytes") or 0)
        end = min(_MAP_COLUMNS, round(bytes_before * _MAP_COLUMNS / total))
        bar.append(glyph * (end - column), style)
        column = max(column, end)
    return Group(bar, _legend(arena, total))


# -- words and numbers ---------------------------------------------------------------------------------------


def table(columns: Iterable[str], rows: Iterable[Sequence[str | Text]]) -> Table:
    """A plain table; a column whose title begins with ">" is set to the right."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title in columns:
        made.add_column(title.removeprefix(">"), justify="right" if title.startswith(">") else "left")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
    return made


def size(size_bytes: Any) -> str:
    """Bytes with a binary unit."""
    if not isinstance(size_bytes, int | float):
        return "-"
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def rate(bytes_per_s: Any) -> str:
    """Bytes a second."""
    return f"{size(bytes_per_s)}/s" if bytes_per_s else "-"


def duration(seconds: Any) -> str:
    """Seconds in the two largest units that matter."""
    if not isinstance(seconds, int | float):
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if minutes < 60:
        return f"{minutes} min {int(seconds % 60)} s"
    if hours < 24:
        return f"{hours} h {minutes % 60} min"
    return f"{days} d {hours % 24} h"


def _text(value: Any) -> str:
    return "-" if value is None else str(value)


def _list(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else _text(value)


def tier(document: Document) -> Text:
    """Where a model, or a part of one, is."""
    word = _text(document.get("tier"))
    return Text(word, _TIER.get(word, ""))


def _state(state: Any) -> Text:
    word = _text(state)
    return Text(word, _EXTENT[word][1] if word in _EXTENT else _STATE.get(word, ""))


def ago(model: Document) -> str:
    """When it was used last."""
    seconds = model.get("last_used_s_ago")
    return "never" if seconds is None else f"{duration(seconds)} ago"


def _share(done: Any, total: Any) -> str:
    return f"{100 * done / total:.0f} % of {size(total)}" if done is not None and total else "-"


def _steps(wish: Document) -> str:
    step, steps = wish.get("step"), wish.get("steps")
    if step is None:
        return _text(steps)
    return f"{step}/{_text(steps)}"


def _requests(document: Document) -> str:
    waiting, done = document.get("requests_waiting"), document.get("requests_done")
    return f"{_text(waiting)} waiting, {_text(done)} done, {_text(document.get('requests_failed'))} failed"


def _loras(document: Document) -> list[tuple[str, RenderableType]]:
    if not document.get("loras"):
        return []
    known, resident = document.get("combinations"), document.get("combinations_resident")
    return [("loras", Text(f"{document['loras']}; {_text(known)} combinations, {_text(resident)} resident"))]


def _running(wish: Document | None) -> str:
    if not wish:
        return "nothing"
    others = int(wish.get("batch") or 1) - 1
    more = f" and {others} more in the same run" if others else ""
    return f"{_text(wish.get('model'))}, step {_steps(wish)} ({_text(wish.get('id'))}{more})"


def _switch(switch: Document) -> str:
    if not switch.get("count"):
        return "none yet"
    p50, p99 = switch.get("p50"), switch.get("p99")
    return f"p50 {_ms(p50)}, p99 {_ms(p99)} over {switch['count']}"


def _ms(value: Any) -> str:
    return f"{value:.2f} ms" if isinstance(value, int | float) else "-"


def _legend(arena: Document, total: int) -> Text:
    legend = Text()
    for state, (glyph, style) in _EXTENT.items():
        size_bytes = arena.get(f"{state}_bytes")
        if size_bytes or state == "free":
            legend.append(glyph, style)
            legend.append(f" {state.replace('_', ' ')} {size(size_bytes)}  ")
    return legend.append(f"of {size(total)}")


def _map(total: int, extents: Sequence[Document]) -> Text:
    """Each cell shows the state that fills most of it."""
    cells = _MAP_COLUMNS * _MAP_ROWS
    drawn = Text()
    for cell in range(cells if total else 0):
        if cell and cell % _MAP_COLUMNS == 0:
            drawn.append("\n")
        drawn.append(
            *_EXTENT.get(_main_state(cell * total / cells, (cell + 1) * total / cells, extents), ("?", ""))
        )
    return drawn


def _main_state(begin: float, end: float, extents: Sequence[Document]) -> str:
    filled: dict[str, float] = {}
    for extent in extents:
        offset = extent.get("offset") or 0
        covered = min(end, offset + (extent.get("size_bytes") or 0)) - max(begin, offset)
        if covered > 0:
            state = str(extent.get("state", "?"))
            filled[state] = filled.get(state, 0.0) + covered
    filled["free"] = filled.get("free", 0.0) + (end - begin) - sum(filled.values())
    return max(filled, key=lambda state: filled[state])

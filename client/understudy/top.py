"""`understudyctl top`: one look at the daemon as a document, a document as a frame, frames again and again.

Like `render` it imports rich, and is imported when there is something to show.
"""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from understudy import render
from understudy.admin import AdminError, AdminRequest, Queue, Show, Status, call

Document = dict[str, Any]

_QUEUE_ROWS = 10
_ERRORS = 5
_MAP_COLUMNS, _MAP_ROWS = 64, 4
_TIERS = ("bound", "resident", "loading", "host", "disk")
_STYLES = (
    "green",
    "cyan",
    "magenta",
    "yellow",
    "blue",
    "red",
    "bright_green",
    "bright_cyan",
    "bright_magenta",
)
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_FREE, _OTHER = "·", "*"
_TIMEOUT_S = 5.0


def look(ask: Callable[[AdminRequest], Any]) -> Document:
    """What a frame shows; `ask` carries an admin command to the daemon."""
    return {"status": ask(Status()), "queue": ask(Queue()), "arena": ask(Show(arena=True))}


def watch(socket_path: Path, interval_s: float) -> None:
    """Show frames until Ctrl-C. A daemon that cannot be reached is looked for again."""
    with Live(console=Console(), screen=True, auto_refresh=False) as live:
        try:
            for picture in frames(socket_path):
                live.update(picture, refresh=True)
                time.sleep(interval_s)
        except KeyboardInterrupt:
            return


def frames(socket_path: Path, clock: Callable[[], float] = time.monotonic) -> Iterator[RenderableType]:
    """A frame for each look, with the requests a second since the one before."""
    before: tuple[float, int] | None = None
    while True:
        try:
            document = look(lambda command: call(socket_path, command, timeout_s=_TIMEOUT_S))
        except AdminError as error:
            before = None
            yield Text(f"{error}\ntrying again; Ctrl-C leaves", "yellow")
            continue
        now, done = clock(), int(document["status"].get("requests_done") or 0)
        rate = (done - before[1]) / (now - before[0]) if before is not None and now > before[0] else None
        before = (now, done)
        yield frame(document, rate)


def frame(document: Document, requests_per_s: float | None = None) -> RenderableType:
    """One look, for people."""
    status, queue = document["status"], document["queue"]
    waiting = [wish for wish in queue if wish.get("state") == "waiting"]
    parts: list[RenderableType] = [
        _head(status, requests_per_s),
        _title("stage"),
        render.queue_table([wish for wish in queue if wish.get("state") != "waiting"])
        if len(waiting) < len(queue)
        else Text("nothing on stage", "dim"),
        _title(f"queue: {len(waiting)} waiting"),
        *([render.queue_table(waiting[:_QUEUE_ROWS])] if waiting else []),
        *([Text(f"and {len(waiting) - _QUEUE_ROWS} more", "dim")] if len(waiting) > _QUEUE_ROWS else []),
        _title("arena by model"),
        arena_by_model(document["arena"]),
        _title("loaders"),
        render.loaders_table(status.get("loaders") or []),
        _title("models on receipt"),
        _hits(status.get("tiers_on_receipt") or {}),
        _title("last errors"),
        _errors(status.get("last_errors") or []),
    ]
    return Group(*parts)


def arena_by_model(document: Document) -> RenderableType:
    """The arena to scale: one letter for each model, largest first, and what it holds."""
    total = int(document.get("size_bytes") or 0)
    extents = [e for e in document.get("extents") or [] if e.get("state") != "free"]
    held: Counter[str] = Counter()
    for extent in extents:
        held[_owner(extent)] += int(extent.get("size_bytes") or 0)
    marks = {
        owner: (letter, style)
        for (owner, _), letter, style in zip(held.most_common(), _LETTERS, itertools.cycle(_STYLES))
    }
    drawn = Text()
    cells = _MAP_COLUMNS * _MAP_ROWS if total else 0
    for cell in range(cells):
        if cell and cell % _MAP_COLUMNS == 0:
            drawn.append("\n")
        owner = _main_owner(cell * total / cells, (cell + 1) * total / cells, extents)
        drawn.append(*((_FREE, "dim") if owner is None else marks.get(owner, (_OTHER, "dim"))))
    return Group(drawn, _legend(held, marks, total))


def _owner(extent: Document) -> str:
    models = extent.get("models") or ["of no model"]
    return str(models[0]) if len(models) == 1 else f"{models[0]} and {len(models) - 1} more"


def _main_owner(begin: float, end: float, extents: Sequence[Document]) -> str | None:
    """Whose bytes fill most of this piece; None where most is free."""
    covered: Counter[str | None] = Counter()
    for extent in extents:
        offset = int(extent.get("offset") or 0)
        length = min(end, offset + int(extent.get("size_bytes") or 0)) - max(begin, offset)
        if length > 0:
            covered[_owner(extent)] += int(length)
    covered[None] = int(end - begin) - covered.total()
    return covered.most_common(1)[0][0]


def _legend(held: Counter[str], marks: dict[str, tuple[str, str]], total: int) -> RenderableType:
    """In columns, so that a hundred models still fit a screen."""
    grid = Table.grid(padding=(0, 2))
    cells = [
        Text.assemble(marks.get(owner, (_OTHER, "dim")), f" {owner} ", (render.size(size_bytes), "dim"))
        for owner, size_bytes in held.most_common(len(marks))
    ]
    cells.append(Text.assemble((_FREE, "dim"), " free ", (render.size(total - held.total()), "dim")))
    for at in range(0, len(cells), 3):
        grid.add_row(*cells[at : at + 3])
    return grid


def _head(status: Document, requests_per_s: float | None) -> Text:
    rate = "" if requests_per_s is None else f", {requests_per_s:.1f}/s"
    state = str(status.get("state", "-"))
    return Text.assemble(
        ("understudyd ", "bold"),
        (state, "green" if state == "ready" else "yellow"),
        f"  up {render.duration(status.get('uptime_s'))}  on {status.get('device', '-')}",
        f"  {status.get('models_resident', '-')} of {status.get('models', '-')} models resident",
        f"  {status.get('requests_done', '-')} done{rate}, {status.get('requests_failed', '-')} failed",
    )


def _hits(tiers: Document) -> Text:
    """Where the models of all requests were when these came, the share of each tier."""
    total = sum(tiers.values())
    if not total:
        return Text("no requests yet", "dim")
    known = [tier for tier in _TIERS if tier in tiers]
    return Text("  ".join(f"{tier} {tiers[tier]} ({100 * tiers[tier] / total:.0f} %)" for tier in known))


def _errors(errors: Sequence[Document]) -> RenderableType:
    if not errors:
        return Text("none", "dim")
    return Text(
        "\n".join(
            f"{render.duration(error.get('s_ago'))} ago  {error.get('code')}: {error.get('message')}"
            for error in reversed(errors[-_ERRORS:])
        ),
        "red",
    )


def _title(text: str) -> Text:
    return Text(f"\n{text}", "bold")

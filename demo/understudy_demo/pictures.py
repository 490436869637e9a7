"""The demo's two pictures: who was on stage and what was loading meanwhile, and what was painted."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL.Image import Image

from understudy.trace import Span, lane
from understudy.trace_plot import FAINT, PAPER, RAIL, STYLE, Lane, Strip, headline, timeline
from understudy_demo.measure import Turn

__all__ = ["Sheet", "baseline_strip", "contact_sheet", "daemon_strip", "timeline"]

Box = tuple[float, float, float, float]
"""Left, bottom, width, height."""

_NARROWEST = 5.0  # inches: room for a title
_LETTERS_AN_INCH = 11.5  # of a subtitle, with some to spare


def daemon_strip(heading: str, spans: Sequence[Span], taken: Sequence[Turn]) -> Strip:
    """The stage, and a lane for each loader, from the daemon's trace of a run."""
    loaders = sorted({span.lane for span in spans if span.lane.startswith("loader")})
    stage = Lane("stage", lane(spans, "stage"), False)
    return Strip(heading, [stage, *(Lane(name, lane(spans, name), True) for name in loaders)], _waits(taken))


def baseline_strip(heading: str, spans: Sequence[Span], taken: Sequence[Turn]) -> Strip:
    """One process that loads and computes in turn."""
    lanes = [
        Lane("compute", lane(spans, "stage"), False),
        Lane("from_pretrained", lane(spans, "load"), True),
    ]
    return Strip(heading, lanes, _waits(taken))


def _waits(taken: Sequence[Turn]) -> list[Span]:
    """When the stage stood idle although work had been sent."""
    return [
        Span("wait", turn.span.name, turn.span.start_s - turn.waited_s, turn.span.start_s) for turn in taken
    ]


@dataclass(frozen=True, slots=True)
class Sheet:
    """A contact sheet: `pictures[row][column]`, None where there is none."""

    rows: Sequence[str]
    columns: Sequence[str]
    pictures: Sequence[Sequence[Image | None]]


def contact_sheet(sheet: Sheet, path: Path, *, title: str, subtitle: str = "") -> Path:
    """Models across, prompts down, with captions; saved as PNG."""
    cell, gutter, left, bottom = 1.08, 0.09, 1.75, 0.95
    width = max(_NARROWEST, left + len(sheet.columns) * (cell + gutter) + 0.25)
    told = textwrap.wrap(subtitle, int((width - 0.4) * _LETTERS_AN_INCH))
    top = 0.88 + 0.2 * max(1, len(told))
    height = top + len(sheet.rows) * (cell + gutter) + bottom
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), dpi=120, facecolor=PAPER)
        FigureCanvasAgg(figure)
        headline(figure, title, "\n".join(told), height)
        for row, (caption, pictures) in enumerate(zip(sheet.rows, sheet.pictures, strict=True)):
            below = height - top - (row + 1) * (cell + gutter) + gutter
            figure.text((left - 0.15) / width, (below + cell / 2) / height, _wrap(caption), ha="right",
                        va="center", fontsize=9.5)  # fmt: skip
            for column, picture in enumerate(pictures):
                box = (left + column * (cell + gutter), below, cell, cell)
                _draw_picture(figure, picture, _shares(box, width, height))
        for column, caption in enumerate(sheet.columns):
            middle = left + column * (cell + gutter) + cell / 2
            figure.text(middle / width, (bottom - 0.08) / height, caption.replace("-", "\n"), ha="center",
                        va="top", fontsize=8.5, color=FAINT, linespacing=1.25)  # fmt: skip
        figure.savefig(path)
    return path


def _shares(box: Box, width: float, height: float) -> Box:
    """Inches as shares of the figure."""
    return (box[0] / width, box[1] / height, box[2] / width, box[3] / height)


def _draw_picture(figure: Figure, picture: Image | None, box: Box) -> None:
    axes: Any = figure.add_axes(box)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_facecolor(RAIL)
    if picture is not None:
        axes.imshow(picture, interpolation="nearest")


def _wrap(caption: str, longest: int = 16) -> str:
    lines = [""]
    for word in caption.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > longest:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)

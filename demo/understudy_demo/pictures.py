"""The demo's two pictures: who was on stage and what was loading meanwhile, and what was painted."""

import colorsys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL.Image import Image

from understudy_demo.measure import Turn
from understudy_demo.spans import Span, lane

Rgb = tuple[float, float, float]
Box = tuple[float, float, float, float]
"""Left, bottom, width, height."""

_NARROWEST = 5.0  # inches: room for a title
_LETTERS_AN_INCH = 11.5  # of a subtitle, with some to spare
INK, FAINT, PAPER, RAIL, ALARM = "#1f2430", "#727a88", "#ffffff", "#f1f2f5", "#d1495b"
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": "#c9ced8",
    "axes.labelcolor": FAINT,
    "xtick.color": FAINT,
    "ytick.color": INK,
}


@dataclass(frozen=True, slots=True)
class Lane:
    """One row of the timeline. `busy` says whether the lane is the stage (solid) or a load (striped)."""

    label: str
    spans: Sequence[Span]
    is_load: bool


@dataclass(frozen=True, slots=True)
class Strip:
    """A group of lanes under one heading, the stage first. `waits` are the visible switches to mark."""

    heading: str
    lanes: Sequence[Lane]
    waits: Sequence[Span]

    @property
    def stage(self) -> Sequence[Span]:
        """The lane that computes."""
        return self.lanes[0].spans


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


def timeline(
    strips: Sequence[Strip],
    path: Path,
    *,
    title: str,
    subtitle: str = "",
    colours: Mapping[str, Rgb] | None = None,
    window_s: float = 4.0,
    mark_gap_ms: float = 5.0,
) -> Path:
    """Draw the strips over the same span of time, each from the middle of its own run, and save a PNG.

    A span's colour is its model's, so that a load and the run it was made for look alike. Waits longer than
    `mark_gap_ms` are marked.
    """
    names = sorted({_model(span) for strip in strips for row in strip.lanes for span in row.spans})
    palette = dict(colours or {}) | {n: c for n, c in _wheel(names).items() if n not in (colours or {})}
    rows = sum(len(strip.lanes) for strip in strips)
    height = 1.75 + 0.50 * rows + 0.62 * len(strips)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(13, height), dpi=120, facecolor=PAPER)
        FigureCanvasAgg(figure)
        _headline(figure, title, subtitle, height)
        top = 1 - 1.0 / height
        for strip in strips:
            tall = (0.50 * len(strip.lanes)) / height
            axes = figure.add_axes((0.115, top - 0.34 / height - tall, 0.865, tall))
            _draw_strip(axes, strip, palette, window_s, mark_gap_ms, is_last=strip is strips[-1])
            top -= tall + 0.62 / height
        _legend(figure, palette, mark_gap_ms, height)
        figure.savefig(path)
    return path


def _headline(figure: Figure, title: str, subtitle: str, height: float) -> None:
    figure.text(0.02, 1 - 0.40 / height, title, fontsize=16.5, fontweight="bold", va="center")
    figure.text(0.02, 1 - 0.66 / height, subtitle, fontsize=10.5, color=FAINT, va="top")


def _draw_strip(
    axes: Any, strip: Strip, palette: Mapping[str, Rgb], window_s: float, mark_gap_ms: float, is_last: bool
) -> None:
    start_s = _busiest_start(strip, window_s)
    axes.set_xlim(0, window_s)
    axes.set_ylim(len(strip.lanes) - 0.5, -0.5)
    axes.set_yticks(range(len(strip.lanes)), [row.label for row in strip.lanes])
    axes.tick_params(length=0)
    axes.set_title(strip.heading, loc="left", fontsize=11.5, fontweight="bold", pad=6)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    for row_number, row in enumerate(strip.lanes):
        axes.add_patch(Rectangle((0, row_number - 0.36), window_s, 0.72, color=RAIL, zorder=0, lw=0))
        for span in _within(row.spans, start_s, window_s):
            _draw_span(axes, row, row_number, span, start_s, palette)
    for wait in _within(strip.waits, start_s, window_s):
        if 1e3 * (wait.end_s - wait.start_s) >= mark_gap_ms:
            left_s, right_s = max(0, wait.start_s - start_s), min(window_s, wait.end_s - start_s)
            axes.plot([left_s, right_s], [-0.44, -0.44], color=ALARM, lw=2.6, solid_capstyle="butt",
                      clip_on=False, zorder=4)  # fmt: skip
    if is_last:
        axes.set_xlabel("seconds", loc="right", fontsize=9.5)
    else:
        axes.set_xticklabels([])


def _draw_span(
    axes: Any, row: Lane, row_number: int, span: Span, start_s: float, palette: Mapping[str, Rgb]
) -> None:
    colour = palette[_model(span)]
    thick = 0.5 if row.is_load else 0.72
    axes.add_patch(
        Rectangle(
            (span.start_s - start_s, row_number - thick / 2),
            span.end_s - span.start_s,
            thick,
            facecolor=_lighter(colour) if row.is_load else colour,
            edgecolor=colour if row.is_load else PAPER,
            lw=0.8 if row.is_load else 0.5,
            zorder=2,
        )
    )
    if not row.is_load:
        _label(axes, span, start_s, row_number)


def _label(axes: Any, span: Span, start_s: float, row_number: int) -> None:
    """The model's number, where it fits."""
    text = _short(_model(span))
    left_s, right_s = axes.get_xlim()
    inches = (span.end_s - span.start_s) / (right_s - left_s) * 11.2
    middle_s = (span.start_s + span.end_s) / 2 - start_s
    if inches > 0.11 * len(text) and left_s < middle_s < right_s:
        axes.text(middle_s, row_number + 0.02, text, ha="center", va="center", fontsize=8.5, color=PAPER,
                  fontweight="bold", zorder=3, clip_on=True)  # fmt: skip


def _legend(figure: Figure, palette: Mapping[str, Rgb], mark_gap_ms: float, height: float) -> None:
    sample = list(palette.values())[len(palette) // 2] if palette else (0.4, 0.5, 0.6)
    handles = [
        Rectangle((0, 0), 1, 1, facecolor=sample, edgecolor=PAPER),
        Rectangle((0, 0), 1, 1, facecolor=_lighter(sample), edgecolor=sample),
        Rectangle((0, 0), 1, 0.2, facecolor=ALARM),
    ]
    labels = [
        "an image on stage (number: its model)",
        "a load into memory (colour: the model it is for)",
        f"the stage idle for over {mark_gap_ms:g} ms while work waits",
    ]
    figure.legend(handles, labels, loc="lower left", bbox_to_anchor=(0.105, 0.02 / height), ncols=3,
                  frameon=False, fontsize=9.5, handlelength=1.4, columnspacing=2.2)  # fmt: skip


def _busiest_start(strip: Strip, window_s: float) -> float:
    """Where the window with the most switches and loads begins."""
    stage = strip.stage
    if not stage:
        return 0.0
    last_s = stage[-1].end_s - window_s
    starts = [span.start_s for span in stage if span.start_s <= last_s] or [stage[0].start_s]

    def bustle(start_s: float) -> int:
        seen = [_model(span) for span in stage if start_s <= span.start_s < start_s + window_s]
        loads = sum(len(_within(row.spans, start_s, window_s)) for row in strip.lanes if row.is_load)
        return sum(a != b for a, b in pairwise(seen)) + loads

    return max(starts, key=bustle)


def _within(spans: Sequence[Span], start_s: float, window_s: float) -> list[Span]:
    return [span for span in spans if span.end_s > start_s and span.start_s < start_s + window_s]


def _model(span: Span) -> str:
    """A loader's span is named "model component"."""
    return span.name.partition(" ")[0]


def _short(model: str) -> str:
    number = model.rpartition("-")[2]
    return number if number.isdigit() else model


def _wheel(names: Sequence[str]) -> dict[str, Rgb]:
    """Distinct muted colours: hues by the golden angle, two lightnesses."""
    return {
        name: colorsys.hls_to_rgb((0.58 + i * 0.381966) % 1.0, 0.45 + 0.1 * (i % 2), 0.42)
        for i, name in enumerate(names)
    }


def _lighter(colour: Rgb) -> Rgb:
    red, green, blue = (1 - 0.42 * (1 - part) for part in colour)
    return (red, green, blue)


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
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), dpi=120, facecolor=PAPER)
        FigureCanvasAgg(figure)
        _headline(figure, title, "\n".join(told), height)
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

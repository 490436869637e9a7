"""Timelines as pictures: a lane for the stage and for whatever works beside it. Needs matplotlib.

The only module of the client that does; whoever wants no picture does not import it.
"""

import colorsys
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.textpath import TextPath

from understudy.trace import BIND, QUEUE, STAGE, START_UP, SWITCH, VIEWS, Recording, Span, by_lane

Rgb = tuple[float, float, float]

INK, FAINT, PAPER, RAIL, ALARM = "#1f2430", "#727a88", "#ffffff", "#f1f2f5", "#d1495b"
FONT = "DejaVu Sans"
STYLE = {
    "font.family": FONT,
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": "#c9ced8",
    "axes.labelcolor": FAINT,
    "xtick.color": FAINT,
    "ytick.color": INK,
}
_DPI = 120
_RAIL_INCHES = 11.2
_NARROW_INCHES = 3 / _DPI
_LABEL_POINTS, _LABEL_MARGIN_INCHES = 8.5, 0.08
_LEAST_SHOWN = 3
_SAMPLE = (0.36, 0.48, 0.62)
_UNSEEN = (BIND, SWITCH, VIEWS)
"""Lanes of a millisecond a span: for a viewer, not for a picture."""


@dataclass(frozen=True, slots=True)
class Lane:
    """One row of a timeline. What `is_load`, or other work beside the stage, is drawn lighter."""

    label: str
    spans: Sequence[Span]
    is_load: bool


@dataclass(frozen=True, slots=True)
class Strip:
    """A group of lanes under one heading, the stage first. `waits` are the visible switches to mark.

    `queue` are samples of how many requests waited, each until the next. What is shown begins at `begin_s`,
    or where most happens.
    """

    heading: str
    lanes: Sequence[Lane]
    waits: Sequence[Span]
    queue: Sequence[Span] = ()
    begin_s: float | None = None

    @property
    def stage(self) -> Sequence[Span]:
        """The lane that computes."""
        return self.lanes[0].spans

    @property
    def rows(self) -> int:
        """Lanes, and one for the queue."""
        return len(self.lanes) + bool(self.queue)


def draw(recording: Recording, path: Path) -> Path:
    """What a daemon did, all of it, as a PNG."""
    rows = by_lane(recording.spans)
    stage = [span for row in rows.pop(STAGE, [[]]) for span in row]
    lanes = [Lane("stage", stage, False)]
    lanes += [
        Lane(lane if not number else "", row, True)
        for lane, each in rows.items()
        if lane not in _UNSEEN
        for number, row in enumerate(each)
    ]
    waits = [span for span in recording.spans if span.lane == SWITCH]
    queue = [span for span in recording.spans if span.lane == QUEUE]
    window_s = max(recording.now_s - recording.begin_s, 1e-3)
    strip = Strip("", lanes, waits, queue, recording.begin_s)
    title, subtitle = _summary(recording, stage, waits, window_s)
    return timeline([strip], path, title=title, subtitle=subtitle, window_s=window_s)


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
    """Draw the strips, each `window_s` of it, over the same span of time, and save a PNG.

    A span's colour is its model's, so that a load and the run it was made for look alike. Waits longer than
    `mark_gap_ms` are marked.
    """
    names = sorted({_model(span) for strip in strips for row in strip.lanes for span in row.spans})
    palette = dict(colours or {}) | {n: c for n, c in _wheel(names).items() if n not in (colours or {})}
    labels = short_names(names)
    height = 1.75 + sum(0.50 * strip.rows + 0.62 for strip in strips) - (0 if strips[0].heading else 0.25)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, height), dpi=_DPI, facecolor=PAPER)
        FigureCanvasAgg(figure)
        headline(figure, title, subtitle, height)
        top = 1 - (1.0 if strips[0].heading else 0.75) / height
        for strip in strips:
            tall = (0.50 * strip.rows) / height
            axes = figure.add_axes((0.115, top - 0.34 / height - tall, 0.865, tall))
            _draw_strip(axes, strip, palette, labels, window_s, mark_gap_ms, is_last=strip is strips[-1])
            top -= tall + 0.62 / height
        _legend(figure, mark_gap_ms, height)
        figure.savefig(path, format="png")
    return path


def headline(figure: Figure, title: str, subtitle: str, height: float) -> None:
    """Both at the top of a figure that is so many inches high."""
    figure.text(0.02, 1 - 0.40 / height, title, fontsize=16.5, fontweight="bold", va="center")
    figure.text(0.02, 1 - 0.66 / height, subtitle, fontsize=10.5, color=FAINT, va="top")


def _summary(
    recording: Recording, stage: Sequence[Span], waits: Sequence[Span], window_s: float
) -> tuple[str, str]:
    begin_s = recording.begin_s
    busy_s = sum(span.end_s - max(span.start_s, begin_s) for span in stage)
    models = len({_model(span) for span in stage})
    title = f"{window_s:.3g} s: {len(stage)} runs of {models} models, the stage busy for "
    title += f"{100 * busy_s / window_s:.0f} %"
    gaps_ms = sorted(1e3 * (span.end_s - span.start_s) for span in waits)
    parts = [f"{len(gaps_ms)} visible switches"]
    if gaps_ms:
        parts[0] += f", half of them under {gaps_ms[len(gaps_ms) // 2]:.3g} ms, at most {gaps_ms[-1]:.3g} ms"
    loads = [span for span in recording.spans if span.route and not span.outcome]
    if loads:
        parts.append(f"{len(loads)} loads of {_size(sum(span.size_bytes for span in loads))}")
    if recording.is_cut:
        parts.append("what was before is forgotten")
    return title, "   ·   ".join(parts)


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.0f} MiB"


def _draw_strip(
    axes: Any,
    strip: Strip,
    palette: Mapping[str, Rgb],
    labels: Mapping[str, str],
    window_s: float,
    mark_gap_ms: float,
    is_last: bool,
) -> None:
    start_s = _busiest_start(strip, window_s) if strip.begin_s is None else strip.begin_s
    lanes = [row.label for row in strip.lanes]
    axes.set_xlim(0, window_s)
    axes.set_ylim(strip.rows - 0.5, -0.5)
    axes.tick_params(length=0)
    axes.set_title(strip.heading, loc="left", fontsize=11.5, fontweight="bold", pad=6)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    for row_number in range(strip.rows):
        axes.add_patch(Rectangle((0, row_number - 0.36), window_s, 0.72, color=RAIL, zorder=0, lw=0))
    for row_number, row in enumerate(strip.lanes):
        _draw_row(axes, row, row_number, _within(row.spans, start_s, window_s), start_s, palette, labels)
    if strip.queue:
        lanes.append(f"waiting\n(≤ {_draw_queue(axes, strip, start_s, window_s)})")
    axes.set_yticks(range(strip.rows), lanes)
    _mark(axes, _within(strip.waits, start_s, window_s), start_s, window_s, mark_gap_ms)
    if is_last:
        axes.set_xlabel("seconds", loc="right", fontsize=9.5)
    else:
        axes.set_xticklabels([])


def _mark(axes: Any, waits: Sequence[Span], start_s: float, window_s: float, mark_gap_ms: float) -> None:
    """Bars above the stage; one that would be too narrow to be seen is made wider."""
    least_s = window_s * _NARROW_INCHES / _RAIL_INCHES
    for wait in waits:
        if 1e3 * (wait.end_s - wait.start_s) >= mark_gap_ms:
            right_s = min(window_s, wait.end_s - start_s)
            left_s = max(0, min(wait.start_s - start_s, right_s - least_s))
            axes.plot([left_s, right_s], [-0.44, -0.44], color=ALARM, lw=2.6, solid_capstyle="butt",
                      clip_on=False, zorder=4)  # fmt: skip


def _draw_row(
    axes: Any,
    row: Lane,
    number: int,
    spans: Sequence[Span],
    start_s: float,
    palette: Mapping[str, Rgb],
    labels: Mapping[str, str],
) -> None:
    """All spans at once: there may be thousands."""
    thick = 0.5 if row.is_load else 0.72
    left_s, right_s = axes.get_xlim()
    narrow_s = (right_s - left_s) * _NARROW_INCHES / _RAIL_INCHES
    faces, edges, widths = [], [], []
    for span in spans:
        colour = palette[_model(span)]
        is_narrow = span.end_s - span.start_s < narrow_s
        faces.append(_lighter(colour) if row.is_load and not is_narrow else colour)
        edges.append(ALARM if span.outcome else colour if row.is_load else PAPER)
        widths.append(0.0 if is_narrow else 0.8 if row.is_load else 0.5)
    for group in _groups(spans) if not row.is_load else ([span] for span in spans if span.lane == START_UP):
        _label(axes, group, labels, start_s, number)
    axes.broken_barh(
        [(span.start_s - start_s, span.end_s - span.start_s) for span in spans],
        (number - thick / 2, thick),
        facecolors=faces,
        edgecolors=edges,
        linewidth=widths,
        zorder=2,
    )


def _draw_queue(axes: Any, strip: Strip, start_s: float, window_s: float) -> int:
    """How many waited, as steps below the lanes; returns the most there were."""
    before = [span for span in strip.queue if span.start_s <= start_s][-1:]
    samples = [*before, *(span for span in strip.queue if start_s < span.start_s < start_s + window_s)]
    times = [max(0.0, span.start_s - start_s) for span in samples] + [window_s]
    values = [span.value or 0 for span in samples]
    most = max(values, default=0)
    base = len(strip.lanes) + 0.36
    tops = [base - 0.72 * value / max(most, 1) for value in [*values, *values[-1:]]]
    if samples:
        axes.fill_between(times, base, tops, step="post", color=FAINT, alpha=0.55, lw=0, zorder=2)
    return most


def _groups(spans: Sequence[Span]) -> Iterator[list[Span]]:
    """Runs of one model that follow each other."""
    for _, group in groupby(spans, _model):
        yield list(group)


def _label(
    axes: Any, group: Sequence[Span], labels: Mapping[str, str], start_s: float, row_number: int
) -> None:
    """The model's name on each span where it fits, else as much of it as does once on all of them."""
    is_phase = group[0].lane == START_UP
    text = group[0].name if is_phase else labels[_model(group[0])]
    left_s, right_s = axes.get_xlim()
    inches_per_s = _RAIL_INCHES / (right_s - left_s)
    needed_s = _width_inches(text) / inches_per_s
    if len(group) > 1 and min(span.end_s - span.start_s for span in group) > needed_s:
        for span in group:
            _label(axes, [span], labels, start_s, row_number)
        return
    begin_s, end_s = max(group[0].start_s - start_s, left_s), min(group[-1].end_s - start_s, right_s)
    if text := fitting(text, (end_s - begin_s) * inches_per_s):
        axes.text((begin_s + end_s) / 2, row_number + 0.02, text, ha="center", va="center",
                  fontsize=_LABEL_POINTS, color=INK if is_phase else PAPER, fontweight="bold", zorder=3,
                  clip_on=True, parse_math=False)  # fmt: skip


def fitting(text: str, room_inches: float) -> str:
    """As a label may stand on a span: whole, without its middle, or not at all."""
    if _width_inches(text) <= room_inches:
        return text
    for shown in range(len(text) - 1, _LEAST_SHOWN - 1, -1):
        shorter = f"{text[: (shown + 1) // 2]}…{text[len(text) - shown // 2 :]}"
        if _width_inches(shorter) <= room_inches:
            return shorter
    return ""


@functools.cache
def _width_inches(text: str) -> float:
    """How wide a label is, and a margin; a model's name may be of any letters."""
    font = FontProperties(family=FONT, weight="bold")
    points = TextPath((0, 0), text, size=_LABEL_POINTS, prop=font, usetex=False).get_extents().width
    return float(points) / 72 + _LABEL_MARGIN_INCHES if text.strip() else 0.0


def _legend(figure: Figure, mark_gap_ms: float, height: float) -> None:
    handles = [
        Rectangle((0, 0), 1, 1, facecolor=_SAMPLE, edgecolor=PAPER),
        Rectangle((0, 0), 1, 1, facecolor=_lighter(_SAMPLE), edgecolor=_SAMPLE),
        Rectangle((0, 0), 1, 1, facecolor=_lighter(_SAMPLE), edgecolor=ALARM),
        Rectangle((0, 0), 1, 1, facecolor=ALARM),
    ]
    labels = [
        "a run on stage (colour: its model)",
        "work beside it, for that model",
        "failed or stopped",
        f"above the stage: over {mark_gap_ms:g} ms idle while work waits",
    ]
    figure.legend(handles, labels, loc="lower left", bbox_to_anchor=(0.105, 0.02 / height), ncols=4,
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
    """What is made of a component is named "MODEL COMPONENT"; start-up has phases instead of models."""
    return "" if span.lane == START_UP else span.name.partition(" ")[0]


def short_names(models: Sequence[str]) -> dict[str, str]:
    """What stands on their runs: the numbers of "NAME-NUMBER", unless two have the same."""
    tails = {model: model.rpartition("-")[2] for model in models}
    short = {model: tail if tail.isdigit() else model for model, tail in tails.items()}
    return short if len(set(short.values())) == len(short) else {model: model for model in models}


def _wheel(names: Sequence[str]) -> dict[str, Rgb]:
    """Distinct muted colours: hues by the golden angle but for the alarm's red, two lightnesses."""
    grey = {"": (0.62, 0.65, 0.70)}
    return grey | {
        name: colorsys.hls_to_rgb(0.06 + 0.84 * ((0.58 + i * 0.381966) % 1.0), 0.45 + 0.1 * (i % 2), 0.42)
        for i, name in enumerate(filter(None, names))
    }


def _lighter(colour: Rgb) -> Rgb:
    red, green, blue = (1 - 0.42 * (1 - part) for part in colour)
    return (red, green, blue)

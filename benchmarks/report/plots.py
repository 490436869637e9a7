"""The pictures of the page. Needs matplotlib."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.report.picking import Found, Pick, Spread, at, number
from understudy.trace_plot import FAINT, INK, STYLE

OURS, OTHERS, LIMIT = "#2a9d8f", "#b8bfcc", "#e3e6ec"
_DPI = 110
_PROGRAMS = {
    "per_switch": "from_pretrained\nat every switch",
    "lru": "LRU of\npipelines",
    "background_thread": "LRU and a\nloading thread",
    "cpu_offload": "CPU offload",
    "understudy": "Understudy",
}
_LEAST_MS = 0.05
"""What is shorter is drawn so long on a logarithmic axis."""

Bar = tuple[str, Spread | None, str]
"""Label, figure, colour."""


def draw_all(found: Found, folder: Path) -> list[Path]:
    """Those pictures whose benchmark has figures; where they are."""
    drawn = []
    for benchmark, name, draw in (
        ("compare", "bench-serving.png", _serving),
        ("load", "bench-load.png", _loading),
        ("lora", "bench-lora.png", _adapters),
    ):
        if any(run.figures for run in found.runs(benchmark)):
            drawn.append(_save(draw, found, folder / name))
    return drawn


def _save(draw: Callable[[Found], Figure], found: Found, path: Path) -> Path:
    with matplotlib.rc_context(STYLE):
        figure = draw(found)
        FigureCanvasAgg(figure)
        figure.savefig(path, dpi=_DPI, metadata={"Software": None})
    return path


def _serving(found: Found) -> Figure:
    """Visible switch percentiles, logarithmic, and images per second."""
    figure = Figure(figsize=(10.2, 3.9), layout="constrained")
    switches, rates = figure.subplots(1, 2, width_ratios=[2.2, 1])
    there = [key for key in _PROGRAMS if found.spread("compare", at(f"{key}.images_per_s")) is not None]
    for number_, percent in enumerate((50, 95, 99)):
        for place, key in enumerate(there):
            spread = found.spread("compare", at(f"{key}.switch_ms_p{percent}"))
            colour = OURS if key == "understudy" else OTHERS
            if spread is not None:
                _bar(
                    switches, place + 0.27 * (number_ - 1), spread, colour, 0.24, alpha=0.45 + 0.275 * number_
                )
    switches.set_yscale("log")
    switches.set_ylim(bottom=_LEAST_MS)
    switches.set_title("visible switch, ms: p50, p95, p99", loc="left", fontsize=11)
    for place, key in enumerate(there):
        spread = found.spread("compare", at(f"{key}.images_per_s"))
        if spread is not None:
            _bar(rates, place, spread, OURS if key == "understudy" else OTHERS, 0.7)
    rates.set_title("images per second", loc="left", fontsize=11)
    for axes, size in ((switches, 9), (rates, 7)):
        axes.set_xticks(range(len(there)), [_PROGRAMS[key] for key in there], fontsize=size)
        _plain(axes)
    return figure


def _loading(found: Found) -> Figure:
    """GB/s of everybody, warm and cold, best first."""
    names = found.names("load", "peers")
    everybody: list[tuple[str, str, str]] = [
        ("Understudy", "understudy_gbps", OURS),
        ("raw reads (limit)", "raw_gbps", LIMIT),
        *((name, f"peers.{name}", OTHERS) for name in names),
    ]
    figure = Figure(figsize=(10.2, 0.9 + 0.34 * len(everybody)), layout="constrained")
    for axes, title, prefix in zip(
        figure.subplots(1, 2, sharey=True),
        ("file in the page cache, GB/s", "cold, GB/s"),
        ("", "cold."),
        strict=True,
    ):
        bars = [(label, found.spread("load", at(prefix + path)), colour) for label, path, colour in everybody]
        _across(axes, bars, title)
    return figure


def _adapters(found: Found) -> Figure:
    """One change of adapters: diffusers, from disk, folded ahead."""
    keys = [key for key in found.names("lora", "") if "_rank_" in key]
    figure = Figure(figsize=(10.2, 0.8 + 0.4 * 3), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        bars: list[Bar] = [
            (label, found.spread("lora", _path(key, path)), colour)
            for label, path, colour in (
                ("Understudy, folded ahead", "visible_switch_ms_p50", OURS),
                ("Understudy, from disk", "cold_ms", OURS),
                ("diffusers: load, fuse,\nunfuse, unload", "diffusers_load_fuse_unfuse_ms", OTHERS),
            )
        ]
        _across(axes, bars, f"{key.replace('_', ' ')}: another adapter, ms", is_log=True)
    return figure


def _path(key: str, path: str) -> Pick:
    return at(f"{key}.{path}")


def _across(axes: Any, bars: Sequence[Bar], title: str, *, is_log: bool = False) -> None:
    """Bars to the right, the first on top, each with its figure."""
    if is_log:
        axes.set_xscale("log")
    for place, (_, spread, colour) in enumerate(bars):
        if spread is None:
            continue
        axes.barh(place, spread.median, color=colour, height=0.68)
        if len(spread.values) > 1:
            axes.plot([min(spread.values), max(spread.values)], [place, place], color=INK, linewidth=1.2)
        axes.annotate(
            f" {number(spread.median)}", (max(spread.values), place), va="center", fontsize=9, color=INK
        )
    axes.set_yticks(range(len(bars)), [label for label, _, _ in bars], fontsize=9)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.margins(x=0.14)
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(axis="x", color="#eceef2")
    _plain(axes)


def _bar(axes: Any, place: float, spread: Spread, colour: str, width: float, alpha: float = 1.0) -> None:
    height = max(spread.median, _LEAST_MS)
    axes.bar(place, height, width, color=colour, alpha=alpha)
    if len(spread.values) > 1:
        axes.plot([place, place], [min(spread.values), max(spread.values)], color=INK, linewidth=1.2)
    axes.annotate(
        number(spread.median), (place, max(height, *spread.values)), ha="center", va="bottom", fontsize=8,
        color=FAINT, xytext=(0, 1), textcoords="offset points",
    )  # fmt: skip


def _plain(axes: Any) -> None:
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)

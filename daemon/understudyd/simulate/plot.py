"""Pictures of what was found. matplotlib is imported here only, when a picture is wanted."""

from pathlib import Path
from typing import Any

from understudyd.simulate.planning import Felt, Plan
from understudyd.simulate.report import Result

_SHARES = [i / 1000 for i in range(1, 1000)]
_OURS, _ON_DEMAND, _FORESIGHT = "#1b6ca8", "#c8553d", "#8a8a8a"


class NoMatplotlib(Exception):
    """Pictures need matplotlib, which is not installed."""


def _figure(columns: int, rows: int) -> tuple[Any, Any]:
    try:
        import matplotlib
    except ImportError as error:
        raise NoMatplotlib("pictures need matplotlib: pip install 'understudy[plan]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=(5.5 * columns, 3.8 * rows), layout="constrained")
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw_result(result: Result, path: Path) -> None:
    """Who waited how long and how long switches were seen, as cumulated shares. Raises `NoMatplotlib`."""
    figure, (waits, switches) = _figure(2, 1)
    report = result.report
    for meter, label, color in (
        (result.meter, report.policy, _OURS),
        (result.baseline, "LRU, on demand", _ON_DEMAND),
    ):
        waits.plot([meter.wait_s.at(s) for s in _SHARES], _SHARES, label=label, color=color)
        switches.plot([meter.switch_s.at(s) * 1e3 for s in _SHARES], _SHARES, label=label, color=color)
    waits.set(xlabel="seconds from arrival to the first operation", ylabel="share of requests")
    waits.set_xscale("symlog", linthresh=0.1)
    switches.set(xlabel="visible switch, ms", ylabel="share of switches", xscale="log")
    waits.legend()
    title = (
        f"{report.requests} requests, {report.models} models, {report.resident} resident, {report.profile}"
    )
    idle = f"idle while waiting {report.idle_while_waiting_percent:.2f} % of busy time"
    figure.suptitle(f"{title}: {idle}, on demand {report.idle_while_waiting_percent_lru_on_demand:.2f} %")
    _save(figure, path)


def draw_plan(plan: Plan, path: Path) -> None:
    """Everything against memory. Raises `NoMatplotlib`."""
    figure, axes = _figure(2, 2)
    (idle, switches), (waits, busy) = axes
    gib = [row.arena_bytes / 1024**3 for row in plan.rows]
    policies: list[tuple[str, str, list[Felt]]] = [
        ("Understudy", _OURS, [row.understudy for row in plan.rows]),
        ("on demand, LRU", _ON_DEMAND, [row.on_demand for row in plan.rows]),
        ("on demand, Belady", _FORESIGHT, [row.foresight for row in plan.rows]),
    ]
    for label, color, felt in policies:
        idle.plot(gib, [f.idle_percent for f in felt], "o-", color=color, label=label)
        switches.plot(gib, [f.visible_switch_p95_ms for f in felt], "o-", color=color)
        switches.plot(gib, [f.visible_switch_p50_ms for f in felt], ":", color=color)
        waits.plot(gib, [f.wait_p50_s for f in felt], ":", color=color)
        waits.plot(gib, [f.wait_p95_s for f in felt], "o-", color=color)
        waits.plot(gib, [f.wait_p99_s for f in felt], "--", color=color)
        busy.plot(gib, [f.utilisation_percent for f in felt], "o-", color=color)
    idle.axhline(plan.target_idle_percent, color="black", linewidth=0.8)
    idle.set(title="idle while work waits, % of busy time; line: the target")
    idle.set_yscale("symlog", linthresh=0.1)
    idle.set_ylim(bottom=0)
    switches.set(title="visible switch, ms: p95, dotted p50", yscale="log")
    waits.set(title="seconds waited: p95, dotted p50, dashed p99")
    waits.set_ylim(bottom=0)
    busy.set(title="stage utilisation, %", ylim=(0, 100))
    for each in axes.flat:
        each.set_xlabel("arena, GiB")
        each.grid(alpha=0.25)
    figure.legend(*idle.get_legend_handles_labels(), loc="outside upper center", ncols=len(policies))
    _save(figure, path)

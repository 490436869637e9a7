"""Reports and plans for people: tables in the terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table

from understudyd.simulate.planning import Plan, Row
from understudyd.simulate.report import Report, Scenario

_GIB = 1024**3
_TABLE_CHARS = 140


def print_report(report: Report) -> None:
    """What a simulation found."""
    table = Table(show_header=False, box=None, padding=(0, 2))
    refused = f", {report.failed} not served" if report.failed else ""
    table.add_row("requests", f"{report.requests}{refused}; time compressed by {report.compress:g}")
    memory = f"{report.arena_bytes / _GIB:.1f} GiB arena, {report.host_pool_bytes / _GIB:.1f} GiB host pool"
    table.add_row("models", f"{report.models}, of which {report.resident} fit the arena: {memory}")
    if report.runs is not None and report.max_batch > 1:
        table.add_row("runs", f"{report.runs}, up to {report.max_batch} images in one")
    table.add_row("stage busy", f"{report.stage_utilisation_percent:.1f} % of the time")
    idle, on_demand = report.idle_while_waiting_percent, report.idle_while_waiting_percent_lru_on_demand
    table.add_row("idle while work waits", f"{idle:.2f} % of busy time; LRU on demand: {on_demand:.2f} %")
    p50, p95 = report.visible_switch_p50_ms, report.visible_switch_p95_ms
    table.add_row("visible switch", f"p50 {p50:.2f} ms, p95 {p95:.2f} ms, over {report.switches} switches")
    ours = _waits(report.wait_p50_s, report.wait_p95_s, report.wait_p99_s)
    theirs = _waits(
        report.wait_p50_s_lru_on_demand, report.wait_p95_s_lru_on_demand, report.wait_p99_s_lru_on_demand
    )
    table.add_row("waiting", f"{ours}; LRU on demand: {theirs}")
    if report.slots:
        table.add_row(
            f"misses of {report.slots} slots",
            f"{report.miss_percent:.2f} %; LRU {report.lru_miss_percent:.2f} %, Belady "
            f"{report.belady_miss_percent:.2f} %: {report.way_from_lru_to_belady_percent:.0f} % of the way",
        )
    if report.events is not None:
        table.add_row(
            "decisions",
            f"{report.events}: p50 {report.decision_us_p50:.0f} us, p99 {report.decision_us_p99:.0f} us",
        )
    console = Console()
    console.print(f"[bold]{report.policy}[/] with the costs of [bold]{report.profile}[/]")
    console.print(table)


def _waits(p50_s: float, p95_s: float, p99_s: float) -> str:
    return f"p50 {p50_s:.1f} s, p95 {p95_s:.1f} s, p99 {p99_s:.1f} s"


@contextmanager
def plan_table(scenario: Scenario, gpu: str, *, is_quiet: bool) -> Iterator[Callable[[Row], Row]]:
    """A table that grows as rows are found, on a terminal; gives what takes a row."""
    survey = scenario.survey
    title = f"{survey.requests} requests for {len(survey.models)} models on {gpu} ({scenario.profile.name})"
    table = Table(
        title=f"{title}, time compressed by {scenario.compress:g}",
        caption="idle: while work waits, in percent of busy time; d: LRU on demand; B: Belady on demand",
    )
    for column in (
        "arena\nGiB", "models", "idle\n%", "idle d\n%", "idle B\n%", "switch p50/p95\nms",
        "switch d p50/p95\nms", "wait p50/p95/p99\ns", "wait d p50/p95/p99\ns", "busy\n%",
    ):  # fmt: skip
        table.add_column(column, justify="right", no_wrap=True)

    def add(row: Row) -> Row:
        ours, theirs = row.understudy, row.on_demand
        table.add_row(
            f"{row.arena_bytes / _GIB:.1f}",
            str(row.resident),
            f"{ours.idle_percent:.2f}",
            f"{theirs.idle_percent:.2f}",
            f"{row.foresight.idle_percent:.2f}",
            _numbers(ours.visible_switch_p50_ms, ours.visible_switch_p95_ms),
            _numbers(theirs.visible_switch_p50_ms, theirs.visible_switch_p95_ms),
            _numbers(ours.wait_p50_s, ours.wait_p95_s, ours.wait_p99_s),
            _numbers(theirs.wait_p50_s, theirs.wait_p95_s, theirs.wait_p99_s),
            f"{ours.utilisation_percent:.1f}",
        )
        return row

    console = Console()
    if console.is_terminal and not is_quiet:
        with Live(table, console=console, refresh_per_second=2):
            yield add
        return
    yield add
    if not is_quiet:
        Console(width=_TABLE_CHARS).print(table)


def _numbers(*values: float) -> str:
    return "/".join(f"{value:.1f}" if value < 10 else f"{value:.0f}" for value in values)


def print_plan(plan: Plan, gpu: str) -> None:
    """What the rows mean."""
    target = f"idle while work waits at most {plan.target_idle_percent:g} % of busy time"
    console = Console()
    if plan.enough_bytes is None:
        console.print(f"No arena that {gpu} has room for meets the target: {target}.")
    else:
        console.print(f"[bold]{plan.enough_bytes / _GIB:.1f} GiB[/] of arena are enough: {target}.")
    if plan.on_demand_enough_bytes is None:
        console.print(f"Loading on demand with LRU does not get there on {gpu}.")
    else:
        console.print(f"Loading on demand with LRU needs {plan.on_demand_enough_bytes / _GIB:.1f} GiB.")

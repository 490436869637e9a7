"""What the demo prints: one table, and the commands to go on with."""

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.table import Table

from understudy_demo.measure import Figures, Turn, percentile, visible_switches_s
from understudy_demo.verdicts import Verdict

_TIERS = {
    "bound": "on stage",
    "resident": "in memory",
    "loading": "being loaded",
    "host": "in host memory",
    "disk": "on disk",
}


def results_table(
    ours: Figures, taken: Sequence[Turn], baseline: Figures, verdicts: Sequence[Verdict], title: str
) -> Table:
    """Understudy beside `from_pretrained` per switch. `verdicts` are of both, in this order."""
    table = Table(title=title, title_justify="left", title_style="bold", pad_edge=False)
    table.add_column("")
    table.add_column("\nUnderstudy", justify="right", style="bold")
    table.add_column("from_pretrained\nper switch", justify="right")

    def row(label: str, of: Callable[[Figures], str]) -> None:
        table.add_row(label, of(ours), of(baseline))

    row("requests", lambda f: f"{f.requests}")
    row("models asked for", lambda f: f"{f.models}")
    row("switches", lambda f: f"{f.switches}")
    row("visible switch p50", lambda f: milliseconds(f.switch_ms_p50))
    row("visible switch p99", lambda f: milliseconds(f.switch_ms_p99))
    for tier, label in _TIERS.items():
        if times_s := visible_switches_s(taken, tier):
            p50, p99 = (milliseconds(1e3 * (percentile(times_s, p) or 0)) for p in (50, 99))
            table.add_row(f"  {label} when asked ({len(times_s)})", f"{p50}, {p99}", "", style="dim")
    row("idle while work waits", lambda f: f"{f.idle_while_waiting_percent:.1f} %")
    row("images per second", lambda f: f"{f.throughput_per_s:.2f}")
    row("answer after p50", lambda f: f"{f.latency_s_p50:.2f} s")
    row("answer after p99", lambda f: f"{f.latency_s_p99:.2f} s")
    table.add_row("images as asked", *(str(each) for each in verdicts))
    return table


def milliseconds(value: float | None) -> str:
    """A time in milliseconds with as many digits as mean something."""
    if value is None:
        return "-"
    return f"{value:.2f} ms" if value < 10 else f"{value:.0f} ms"


def commands(config: Path, runtime_dir: Path, model: str) -> list[str]:
    """What to type to go on by hand, from any folder."""
    programs = Path(".venv/bin") if Path(".venv/bin/understudyd").exists() else Path()
    return [
        f"export UNDERSTUDY_RUNTIME_DIR={runtime_dir.resolve()}",
        f"{programs / 'understudyd'} serve --config {config} &",
        f'{programs / "understudy"} generate "three small green triangles" --model {model} '
        "--steps 8 --guidance 3 --size 64x64 -o out.png",
        f"{programs / 'understudyctl'} status",
        f"{programs / 'understudyctl'} shutdown",
    ]

"""All benchmarks in a quarter of an hour, and the page about them: `python -m benchmarks.report`.

Runs each benchmark in its short form as a process of its own, keeps what it printed in
`benchmarks/results/<hardware>.json` and makes docs/benchmarks.md, its pictures and the README's figures anew.
What fails is told there; the others run all the same. `--only` replaces the figures of these benchmarks and
keeps the others'; `--render` runs nothing.

Exit status 1 when a benchmark failed, 2 when there is none of that name.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.kit import say
from benchmarks.report.cases import BUDGET_S, cases
from benchmarks.report.machine import ROOT, describe_machine, host_of, revision
from benchmarks.report.page import found_in, page
from benchmarks.report.readme import readme_figures, with_figures
from benchmarks.report.results import Results, Run, read_all, read_results, write_results
from benchmarks.report.running import Case, Clock, run_all

RESULTS = Path("benchmarks/results")
_LOGS = Path(".work/bench")


def measure(chosen: Sequence[Case], folder: Path, budget_s: float, *, keep_others: bool) -> Results:
    """Run them; the file is written anew after each."""
    machine, clock = describe_machine(), Clock(budget_s)
    path = folder / f"{host_of(machine)}.json"
    runs: dict[str, tuple[Run, ...]] = {}
    if keep_others and path.exists():
        runs = dict(read_results(path).runs)
    for case in chosen:
        runs.pop(case.name, None)

    def results() -> Results:
        return Results(
            host=path.stem, machine=machine, budget_s=budget_s, wall_s=round(clock.spent_s, 1), runs=runs
        )

    def keep(name: str, run: Run) -> None:
        runs[name] = (*runs.get(name, ()), run)
        write_results(path, results())

    run_all(chosen, clock, revision(), ROOT / _LOGS, keep)
    say(f"all in {clock.spent_s:.0f} s: {path.name}; what they said is in {_LOGS}")
    return results()


def render(folder: Path, root: Path) -> None:
    """The page, the README's figures and the pictures, below `root`, from the results in `folder`."""
    from benchmarks.report.plots import draw_all

    kept = read_all(folder)
    (root / "docs" / "benchmarks.md").write_text(page(kept))
    readme = root / "README.md"
    readme.write_text(with_figures(readme.read_text(), readme_figures(kept)))
    if kept.hosts:
        draw_all(found_in(kept.hosts[0], kept.gpus), root / "docs" / "images")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.report", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these benchmarks")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="for all of them together")
    parser.add_argument("--peers-python", type=Path, help="a Python that has what the load is compared with")
    parser.add_argument("--render", action="store_true", help="make the page anew, run nothing")
    parser.add_argument("--results", type=Path, default=ROOT / RESULTS, help="the folder of results")
    parser.add_argument("--root", type=Path, default=ROOT, help="where docs and README.md are")
    options = parser.parse_args(arguments)
    failed = []
    if not options.render:
        chosen = cases(options.peers_python)
        if unknown := set(options.only or ()) - {case.name for case in chosen}:
            say(f"no {', '.join(sorted(unknown))}; there are {', '.join(case.name for case in chosen)}")
            return 2
        chosen = tuple(case for case in chosen if not options.only or case.name in options.only)
        results = measure(chosen, options.results, options.budget_s, keep_others=bool(options.only))
        failed = [name for name, runs in results.runs.items() if any(run.failure for run in runs)]
    render(options.results, options.root)
    for name in failed:
        say(f"FAILED: {name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

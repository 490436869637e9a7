"""What `make bench` runs: every benchmark in the form that fits a quarter of an hour on two cores.

First come those whose figures the page begins with. The long forms are in docs/benchmarks-methods.md.
"""

import importlib.util
from pathlib import Path

from benchmarks.report.running import Case

BUDGET_S = 840.0
_TRACE = "daemon/understudyd/simulate/example.csv.gz"


def cases(peers_python: Path | None = None) -> tuple[Case, ...]:
    """Those whose benchmark is there. `peers_python` has what `benchmarks.load` is compared with."""
    peers = () if peers_python is None else ("--peers-python", str(peers_python.absolute()))
    found = (
        _case("load", 300, "--no-sdxl", "--rounds", "2", repeats=2, hidden=peers),
        _case("compare", 300, repeats=2),
        _case("lora", 240, "--models", "sd15", "--rounds", "3", "--threads", "1"),
        _case("switch", 180, "--switches", "100"),
        _case("wire", 180),
        _case("handover", 180),
        _case("restart", 270, "--architecture", "sd15"),
        _case("serve", 300, "--models", "100", "--requests", "800"),
        _case("compile", 240),
        Case(
            "simulate", ("-m", "understudyd.main", "simulate", _TRACE, "--utilisation", "85%", "--json"), 60
        ),
        _case("observe", 90),
        _case("coldstart", 150),
    )
    return tuple(case for case in found if _is_there(case))


def _case(name: str, limit_s: float, *arguments: str, repeats: int = 1, hidden: tuple[str, ...] = ()) -> Case:
    return Case(name, ("-m", f"benchmarks.{name}", "--json", *arguments), limit_s, repeats, hidden)


def _is_there(case: Case) -> bool:
    return importlib.util.find_spec(case.arguments[1]) is not None

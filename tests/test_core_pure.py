"""The core imports the standard library and itself, reads no clock and rolls no dice."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import understudyd.core

CORE = Path(understudyd.core.__file__).parent
FILES = sorted(CORE.glob("*.py"))
IMPURE = {
    "time",
    "random",
    "os",
    "io",
    "socket",
    "threading",
    "asyncio",
    "subprocess",
    "pathlib",
    "logging",
    "secrets",
}
LISTED = "\n".join(f"import understudyd.core.{f.stem}" for f in FILES if f.stem != "__init__")


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_the_core_imports_nobody(path: Path) -> None:
    for name in imported(ast.parse(path.read_text())):
        top = name.split(".")[0]
        assert name.startswith("understudyd.core") or top in sys.stdlib_module_names, name
        assert top not in IMPURE, f"{name}: time, chance and I/O are the driver's"


def test_a_process_that_imports_the_core_has_nothing_else() -> None:
    """Not even through a package's `__init__`."""
    code = f"import sys\nbefore = set(sys.modules)\n{LISTED}\nprint(*(set(sys.modules) - before))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    extra = {n for n in done.stdout.split() if n.split(".")[0] not in sys.stdlib_module_names}
    assert {n for n in extra if not n.startswith("understudyd.core")} <= {"understudyd"}
    assert "understudyd.core.machine" in extra


def test_two_machines_told_the_same_do_the_same() -> None:
    """Deterministic across processes too: no set or hash decides anything."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_core_machine_properties import random_walk\n"
        "for seed in (3, 14, 15): print(random_walk(seed).world.log)\n"
    )
    logs = set()
    for hash_seed in ("0", "1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(Path(__file__).parent)],
            env={"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=100,
        )
        logs.add(done.stdout)
    assert len(logs) == 1 and len(logs.pop()) > 10_000

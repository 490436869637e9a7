"""The table of faults in the operations page: its tests exist, and loaders are killed at every point."""

import ast
import re
from pathlib import Path

import pytest

from test_faults_matrix import CASES
from understudyd.loader.faults import POINTS

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "operations.md").read_text()
NAMED = sorted(set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE)))


@pytest.mark.parametrize(("file", "name"), NAMED, ids=[name for _, name in NAMED])
def test_a_named_test_exists(file: str, name: str) -> None:
    tree = ast.parse((TESTS / file).read_text())
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_fault_has_a_test() -> None:
    (table,) = re.findall(r"^\| fault \|.*\n\| ---.*\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    rows = table.splitlines()
    assert len(rows) >= 20 and all("::test_" in row for row in rows)


def test_a_loader_is_killed_at_every_point() -> None:
    assert {case.point for case in CASES if case.action == "kill"} == set(POINTS)

"""Shared by all tests: nothing may be left behind."""

import gc
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from family_kit import Family, make_family

# Files of few but long tests, the longest first: begun early, none is what a worker waits for at the end.
LONG = (
    "test_systemd_service.py", "test_faults_endings.py", "test_kinds.py", "test_lora_folding.py",
    "test_gpu_check.py", "test_faults_matrix.py", "test_faults_machine.py", "test_benchmark_wire.py",
    "test_fuzz_frames.py", "test_benchmark_lora_serve.py", "test_benchmark_compare.py",
    "test_daemon_faults.py", "test_benchmark_soak.py", "test_faults_hang.py", "test_daemon_updates.py",
    "test_faults_loras.py", "test_daemon_start.py", "test_lora_kinds.py", "test_warm_restart.py",
)  # fmt: skip
KINDS = ("socket:", "pipe:", "/memfd:", "anon_inode:[pidfd]")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order that files are handed out in (with `--no-loadscope-reorder`); within a file nothing moves."""
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONG)))


def pytest_collection_finish() -> None:
    """What the libraries keep for good need not be walked at every collection of garbage."""
    gc.collect()
    gc.freeze()


def _descriptors() -> Counter[str]:
    """Open descriptors by kind: those that tests make and must close."""
    found: Counter[str] = Counter()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(entry)
        except OSError:
            continue  # the listing's own
        for kind in KINDS:
            if target.startswith(kind):
                found[kind] += 1
    return found


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Every test ends with the processes, sockets, pipes and shared memory (memfds) that it began with."""
    before = _descriptors()
    children = {p.pid for p in psutil.Process().children(recursive=True)}
    yield
    left = [p for p in psutil.Process().children(recursive=True) if p.pid not in children]
    names = [f"{p.pid} {' '.join(p.cmdline())[:120]}" for p in left if p.status() != psutil.STATUS_ZOMBIE]
    assert not names, f"processes left behind: {names}"
    if _descriptors() - before:
        gc.collect()  # a closed loop's sockets die with their last reference
    assert not _descriptors() - before, f"descriptors left behind: {_descriptors() - before}"


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A store with a small family of models and the diffusers folders they came from. Do not change it."""
    return make_family(tmp_path_factory.mktemp("family"))


@pytest.fixture
def own_store(family: Family, tmp_path: Path) -> Path:
    """A copy of the family's store that the test may change."""
    return Path(shutil.copytree(family.store, tmp_path / "store"))

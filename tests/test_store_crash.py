"""kill -9 at every point of an ingest: the store stays whole, and the next try succeeds."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from store_kit import listing
from understudy_demo import tiny
from understudyd.store.pretrained import quiet_libraries
from understudyd.store.safetensors_file import read_header
from understudyd.store.store import Store


class Ingester:
    """A process that ingests and dies on demand."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def run(self, store: Path, name: str, source: Path, kill_at: int = 0) -> str:
        """Ingest, dying at the `kill_at`-th progress call; says how it ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{store} {name} {source} {kill_at}\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()


@pytest.fixture(scope="module")
def ingester() -> Iterator[Ingester]:
    command = [sys.executable, str(Path(__file__).with_name("store_crash_child.py"))]
    quiet = os.environ | {"TRANSFORMERS_VERBOSITY": "error"}
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=quiet,
    ) as process:
        yield Ingester(process)


def test_a_kill_at_any_point_leaves_the_store_whole(ingester: Ingester, tmp_path: Path) -> None:
    with quiet_libraries():
        old = tiny.save(tiny.stable_diffusion(1), tmp_path / "old")
        new = tiny.save(tiny.stable_diffusion(2), tmp_path / "new")
    store = tmp_path / "store"
    assert ingester.run(store, "old", old).startswith("done ")
    kept = listing(store)
    assert ingester.run(tmp_path / "whole", "new", new).startswith("done ")
    whole = Store.open(tmp_path / "whole", writable=False).model("new")

    phases: list[str] = []
    while True:
        ending, phase = ingester.run(store, "new", new, kill_at=len(phases) + 1).split()[:2]
        assert ending == "killed"
        phases.append(phase)
        reader = Store.open(store, writable=False)
        models = reader.models()
        if "new" in models:  # killed after the last step
            assert models["new"].components == whole.components
            break
        assert set(models) == {"old"}
        assert reader.damaged() == {}
        found = listing(store)
        assert {path: found.get(path) for path in kept} == kept
        extra = {path.split("/")[0] for path in found.keys() - kept.keys()}
        assert extra <= {"tmp", "blobs", "signatures"}
        for blob in (store / "blobs").iterdir():
            read_header(blob)  # an orphan may lie there, but never half of one
    assert set(phases) == {"check", "load", "write", "publish"}
    assert phases.count("publish") >= 4  # before each blob, before the folder

    assert ingester.run(store, "new", new).startswith("done ")
    reader = Store.open(store, writable=False)
    assert reader.model("new").components == whole.components
    assert list((store / "tmp").iterdir()) == []
    reader.remove("new")
    assert listing(store) == kept

"""SIGKILL of the parent in mid-load: no loader outlives it, and its GPU memory is free again."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.gpu.bench import GIB, MIB, Bench
from benchmarks.loaders import noise_file
from understudyd.loader.linux import die_with_parent

LOADERS = 2
WITHIN_S = 10.0
TARGET_S = 2.0
_TOLERANCE_BYTES = 64 * MIB
_POLL_S = 0.005


def kill_parent(bench: Bench) -> dict[str, Any]:
    """A process that holds an arena is killed while its loaders copy."""
    # Forked before this process touches the GPU; it begins when it is told to.
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    parent = context.Process(target=_hold_memory, args=(bench, theirs, os.getpid()))
    parent.start()
    theirs.close()
    try:
        free_before_bytes = bench.free_bytes()
        ours.send("go")
        said = ours.recv()
        held_bytes = free_before_bytes - bench.free_bytes()
    finally:
        parent.kill()
        killed_at_s = time.monotonic()
    parent.join()
    gone_s = _seconds_until(killed_at_s, lambda: not any(_lives(pid) for pid in said["pids"]))
    free_s = _seconds_until(killed_at_s, lambda: bench.free_bytes() >= free_before_bytes - _TOLERANCE_BYTES)
    return {
        "arena_bytes": said["arena_bytes"],
        "held_bytes": held_bytes,
        "hand_over": said["hand_over"],
        "loaders_gone_s": gone_s,
        "memory_free_s": free_s,
        "targets": {f"within_{TARGET_S:g}_s": max(gone_s or WITHIN_S, free_s or WITHIN_S) <= TARGET_S},
        "checks": {"no_loader_left": gone_s is not None, "memory_is_free": free_s is not None},
    }


def _hold_memory(bench: Bench, pipe: Connection, parent_pid: int) -> None:
    """The process that is to be killed: keeps its loaders busy, says so, waits."""
    die_with_parent()
    if os.getppid() != parent_pid:
        return
    pipe.recv()
    part_bytes = bench.pick(512 * MIB, 4 * MIB)
    sources = [noise_file(bench.work / f"held-{i}", part_bytes, seed=i) for i in range(LOADERS)]
    with (
        bench.arena(bench.pick(4 * GIB, 16 * MIB)) as arena,
        bench.loaders(arena, count=LOADERS) as loaders,
        loaders.kept_busy([s.at(i * part_bytes) for i, s in enumerate(sources)]),
    ):
        said = {
            "pids": [status.pid for status in loaders.status() if status.pid != os.getpid()],
            "arena_bytes": arena.size_bytes,
            "hand_over": loaders.pool.hand_over.kind,
        }
        pipe.send(said)
        while True:
            signal.pause()


def _seconds_until(since_s: float, condition: Callable[[], bool]) -> float | None:
    while time.monotonic() < since_s + WITHIN_S:
        if condition():
            return time.monotonic() - since_s
        time.sleep(_POLL_S)
    return None


def _lives(pid: int) -> bool:
    """Not gone, and no zombie that nobody reaps: that holds nothing."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False

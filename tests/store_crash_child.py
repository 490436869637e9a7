"""Run by test_store_crash: ingests in forked children that kill themselves at given points.

Reads lines `store name source kill_at` from standard input; for each forks a child that ingests with a
progress callback which sends SIGKILL to itself at its `kill_at`-th call. Answers each with one line:
`killed PHASE`, or `done N` where N counts the calls. One process, so that torch is imported once.
"""

import os
import signal
import sys
from pathlib import Path

import torch

import understudy_demo.tiny  # noqa: F401  imports, before the forks, what the children load
from understudyd.store import pretrained, signature  # noqa: F401  as above
from understudyd.store.ingest import ingest
from understudyd.store.store import Store


def ingest_until(store: str, name: str, source: str, kill_at: int, report: int) -> None:
    calls = 0

    def progress(phase: str, done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == kill_at:
            os.write(report, f"killed {phase}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    ingest(Store.open(Path(store), writable=True), name, source, progress=progress)
    os.write(report, f"done {calls}\n".encode())


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        store, name, source, kill_at = line.split()
        ending, report = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                ingest_until(store, name, source, int(kill_at), report)
            finally:
                os._exit(0)
        os.close(report)
        os.waitpid(child, 0)
        os.write(1, os.read(ending, 100) or b"failed\n")  # only now: the child is gone
        os.close(ending)


main()

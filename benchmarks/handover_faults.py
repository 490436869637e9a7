"""A daemon that serves more models than fit while its loaders are killed in mid-load, again and again."""

import os
import random
import signal
import tempfile
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from benchmarks.calm import evict_all, leaked, poll, settled
from benchmarks.kit import DaemonProcess, DaemonSettings, running_daemon, say
from understudy import Client, admin
from understudy.errors import UnderstudyError
from understudyd.store.records import ModelRecord

MODELS, ROOM_FOR, POOL_FOR = 6, 3, 4
CLIENTS = 3
LOAD_S = 0.15
LOADS_BETWEEN_KILLS = 3


@dataclass(frozen=True, slots=True)
class Survived:
    """What came of it."""

    requests: int
    failed_requests: int
    kills: int
    leaked_bytes: int


def survive(kills: int) -> Survived:
    """Kill a loader in mid-load `kills` times while requests for several models flow."""
    with tempfile.TemporaryDirectory() as folder, _daemon(Path(folder)) as (daemon, records):
        evict_all(daemon)
        before = settled(daemon)
        with _traffic(daemon, sorted(records)) as traffic:
            struck: list[str] = []
            for _ in range(kills):
                struck.append(_kill_a_busy_loader(daemon, spare=struck[-2:]))
        say(f"  {traffic.done} requests, {len(traffic.failures)} failed, {kills} kills")
        for failure in traffic.failures[:3]:
            say(f"  {failure}")
        evict_all(daemon)
        leaked_bytes = leaked(before, settled(daemon))
    return Survived(traffic.done, len(traffic.failures), kills, leaked_bytes)


@contextmanager
def _daemon(folder: Path) -> Iterator[tuple[DaemonProcess, dict[str, ModelRecord]]]:
    """A daemon with room for some of its models in the arena, and for some more in the host pool."""
    records = _stock(folder)
    model_bytes = max(record.size_bytes for record in records.values())
    settings = DaemonSettings(
        store=folder / "store",
        runtime_dir=folder / "run",
        arena_bytes=ROOM_FOR * model_bytes,
        rate_limit_bytes_per_s=int(model_bytes / LOAD_S),
        prefetch=False,
    )
    with (
        mock.patch.dict(os.environ, {"UNDERSTUDY__HOST__POOL": f"{POOL_FOR * model_bytes}B"}),
        running_daemon(settings, folder / "daemon") as daemon,
    ):
        yield daemon, records


def _stock(folder: Path) -> dict[str, ModelRecord]:
    """Models that share nothing, so that each of them has to be loaded whole."""
    from understudy_demo import baseline, tiny
    from understudyd.store.ingest import ingest_many
    from understudyd.store.store import Store

    baseline.quiet()
    sources = [
        (f"model-{i}", tiny.save(tiny.stable_diffusion(i, shared_seed=i), folder / f"source-{i}"))
        for i in range(MODELS)
    ]
    records = ingest_many(Store.open(folder / "store", writable=True), sources)
    return {record.name: record for record in records}


class _Traffic:
    """Clients that ask for one model after the other until told to stop."""

    def __init__(self, daemon: DaemonProcess, models: list[str]) -> None:
        self.done = 0
        self.failures: list[str] = []
        self._models = models
        self._endpoint = daemon.endpoint
        self._is_over = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask, args=(seed,)) for seed in range(CLIENTS)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, seed: int) -> None:
        dice = random.Random(seed)
        with Client(self._endpoint) as client:
            while not self._is_over.is_set():
                failure = _ask_once(client, dice.choice(self._models), dice.randrange(1 << 31))
                with self._lock:
                    self.done += 1
                    self.failures += failure


def _ask_once(client: Client, model: str, seed: int) -> list[str]:
    try:
        client.generate(model, "a red circle", seed=seed, steps=1, width=32, height=32)
    except UnderstudyError as error:
        return [f"{model}: {error.code}: {error}"]
    return []


@contextmanager
def _traffic(daemon: DaemonProcess, models: list[str]) -> Iterator[_Traffic]:
    traffic = _Traffic(daemon, models)
    traffic.start()
    try:
        yield traffic
    finally:
        traffic.stop()


def _kill_a_busy_loader(daemon: DaemonProcess, spare: Collection[str]) -> str:
    """The first that is seen with a load in hand, once some loads have gone well since the last time.

    Returns that load's name; loads in `spare` are let be. A blob whose loads kill their loader three times in
    a row is given up by the daemon, and rightly so: what is struck here is the loader, not the blob.
    """
    before = _loads_done(daemon)
    poll(daemon, lambda: _loads_done(daemon) >= before + LOADS_BETWEEN_KILLS, "loads go well again")

    def candidates() -> list[tuple[int, str]]:
        rows = [row for row in daemon.ask(admin.Loaders()) if row["state"] == "loading"]
        return [(row["pid"], row["load"]) for row in rows if row["load"] not in spare]

    (pid, load), *_ = poll(daemon, candidates, "a loader has a load")
    os.kill(pid, signal.SIGKILL)
    poll(
        daemon,
        lambda: pid not in [row["pid"] for row in daemon.ask(admin.Loaders()) if row["state"] != "lost"],
        "the daemon has seen that it is dead",
    )
    return str(load)


def _loads_done(daemon: DaemonProcess) -> int:
    return sum(row["loads_done"] for row in daemon.ask(admin.Loaders()))

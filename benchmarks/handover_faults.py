"""A daemon that serves more models than fit while its loaders are killed in mid-load, again and again."""

import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.kit import DaemonProcess, DaemonSettings, running_daemon, say
from understudy import Client, admin
from understudy.errors import UnderstudyError
from understudyd.store.records import ModelRecord

MODELS, ROOM_FOR, POOL_FOR = 6, 3, 4
CLIENTS = 3
LOAD_S = 0.15
LOADS_BETWEEN_KILLS = 3
SETTLED_WITHIN_S = 30.0
_POLL_S = 0.01


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
        _evict_all(daemon)
        before = _settled(daemon)
        with _traffic(daemon, sorted(records)) as traffic:
            struck: list[str] = []
            for _ in range(kills):
                struck.append(_kill_a_busy_loader(daemon, spare=struck[-2:]))
        say(f"  {traffic.done} requests, {len(traffic.failures)} failed, {kills} kills")
        for failure in traffic.failures[:3]:
            say(f"  {failure}")
        _evict_all(daemon)
        leaked_bytes = leaked(before, _settled(daemon))
    return Survived(traffic.done, len(traffic.failures), kills, leaked_bytes)


def leaked(before: Mapping[str, Any], after: Mapping[str, Any]) -> int:
    """Arena bytes that were free and are not, and host pool bytes that are neither free nor a copy at rest.

    `before` and `after` are status documents of a daemon that has nothing to do and nothing resident.
    """
    lost_bytes = before["arena"]["free_bytes"] - after["arena"]["free_bytes"]
    if (pool := after.get("host_pool")) is not None:
        lost_bytes += pool["size_bytes"] - pool["free_bytes"] - pool["ready_bytes"]
    return int(lost_bytes)


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
    _poll(daemon, lambda: _loads_done(daemon) >= before + LOADS_BETWEEN_KILLS, "loads go well again")

    def candidates() -> list[tuple[int, str]]:
        rows = [row for row in daemon.ask(admin.Loaders()) if row["state"] == "loading"]
        return [(row["pid"], row["load"]) for row in rows if row["load"] not in spare]

    (pid, load), *_ = _poll(daemon, candidates, "a loader has a load")
    os.kill(pid, signal.SIGKILL)
    _poll(
        daemon,
        lambda: pid not in [row["pid"] for row in daemon.ask(admin.Loaders()) if row["state"] != "lost"],
        "the daemon has seen that it is dead",
    )
    return str(load)


def _loads_done(daemon: DaemonProcess) -> int:
    return sum(row["loads_done"] for row in daemon.ask(admin.Loaders()))


def _evict_all(daemon: DaemonProcess) -> None:
    for model in daemon.ask(admin.Models()):
        _poll(daemon, partial(_is_evicted, daemon, model["name"]), "nothing uses the model")


def _is_evicted(daemon: DaemonProcess, name: str) -> bool:
    try:
        daemon.ask(admin.Evict(name=name))
    except admin.AdminError as error:
        if error.code != "in_use":
            raise
        return False
    return True


def _settled(daemon: DaemonProcess) -> dict[str, Any]:
    """The status once no load is under way and nothing is quarantined, or as it is when patience ends."""
    status: dict[str, Any] = {}

    def is_settled() -> bool:
        status.update(daemon.ask(admin.Status()))
        tiers = [status["arena"], status.get("host_pool") or {}]
        busy = sum(tier.get(f"{what}_bytes", 0) for tier in tiers for what in ("filling", "quarantined"))
        return not busy and all(row["state"] == "idle" for row in status["loaders"])

    try:
        _poll(daemon, is_settled, "it has settled")
    except TimeoutError as error:
        say(f"  {error}: {status}")  # the figures will tell
    return status


def _poll(daemon: DaemonProcess, condition: Callable[[], Any], what: str) -> Any:
    deadline_s = time.monotonic() + SETTLED_WITHIN_S
    while time.monotonic() < deadline_s:
        if found := condition():
            return found
        daemon.check()
        time.sleep(_POLL_S)
    raise TimeoutError(f"not within {SETTLED_WITHIN_S:g} s: {what}")

"""What goes wrong in `benchmarks.soak`: loaders, clients, models, adapters and the configuration, at random.

Everything is done to real processes with real signals, and to the daemon over its admin socket. What it
answers is part of the test: an answer that is not expected ends the soak.
"""

import contextlib
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.kit import DaemonProcess
from benchmarks.soak_loaders import Strikes
from benchmarks.soak_scene import GUEST, GUEST_BASE, GUEST_LORA, Scene
from understudy import admin

BETWEEN_ACTS_S = (0.1, 1.5)
BETWEEN_CHANGES_S = (0.2, 2.0)
FAREWELL_S = 60.0
ADD_S = 120.0


class Crowd:
    """Client processes, each with a journal in `folder`. Call it on one thread only."""

    def __init__(self, endpoint: str, wishes: Path, folder: Path, count: int, seed: int) -> None:
        self._command = [sys.executable, "-m", "benchmarks.soak_client", endpoint, str(wishes)]
        self._folder = folder
        self._seed = seed
        self._started = 0
        self.killed: set[Path] = set()
        self.failed: list[str] = []
        self._living = [self._start() for _ in range(count)]

    def _start(self) -> tuple["subprocess.Popen[bytes]", Path]:
        self._started += 1
        journal = self._folder / f"client-{self._seed}-{self._started}.jsonl"
        command = [*self._command, str(journal), str(self._seed * 1000 + self._started)]
        return subprocess.Popen(command, stdin=subprocess.PIPE), journal

    def kill_one(self, dice: random.Random) -> None:
        """And have another one come."""
        at = dice.randrange(len(self._living))
        process, journal = self._living[at]
        self.killed.add(journal)
        process.kill()
        process.communicate()
        self._living[at] = self._start()

    def leave(self) -> None:
        """All end once they have their answers; one that does not is ended, and what it lacks is lost."""
        for process, _ in self._living:
            assert process.stdin is not None
            process.stdin.close()
        deadline_s = time.monotonic() + FAREWELL_S
        for process, journal in self._living:
            try:
                process.wait(max(0.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
            if status := process.wait():
                self.failed.append(f"{journal.stem} ended with status {status}")


class Settings:
    """The daemon's configuration file: `good` is what it started with, in several variants."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._good = path.read_text()

    def write_calm(self) -> None:
        """Nothing is loaded that nobody has asked for."""
        self._write(prefetch="false")

    def write_good(self, dice: random.Random) -> None:
        policy = f"lookahead = {dice.randint(0, 6)}"
        if dice.random() < 0.5:
            policy += f"\npause_priority = {dice.choice([0, 1])}"
        self._write(prefetch=dice.choice(["true", "false"]), policy=policy)

    def _write(self, *, prefetch: str, policy: str = "lookahead = 4") -> None:
        text = self._good.replace("prefetch = true", f"prefetch = {prefetch}")
        self._path.write_text(text.replace("lookahead = 4", policy))

    def write_bad(self, dice: random.Random) -> None:
        spoilt = ["[nobody]\nx = 1\n", "[queue]\nmax_waiting = -1\n", "[queue\n", "\0", "[device]\n"]
        self._path.write_text(self._good + dice.choice(spoilt))


class Mischief:
    """Acts at random, as `dice` says; `done` counts what was done."""

    def __init__(
        self, daemon: DaemonProcess, crowd: Crowd, settings: Settings, models: list[str], seed: int
    ) -> None:
        self._daemon = daemon
        self._crowd = crowd
        self._settings = settings
        self._models = models
        self._dice = random.Random(seed)
        self._strikes = Strikes(daemon, self._dice)
        self.done: Counter[str] = Counter()
        self._acts: Mapping[Callable[[], None], int] = {
            self._strikes.kill_loader: 6,
            self._strikes.freeze_loader: 2,
            self._strikes.disturb_loader: 2,
            self._kill_client: 3,
            self._reload_good: 2,
            self._reload_bad: 2,
            self._evict: 3,
            self._pin: 1,
            self._drop_cache: 1,
        }

    def act(self) -> None:
        """One more."""
        (chosen,) = self._dice.choices(list(self._acts), list(self._acts.values()))
        self._strikes.observe()
        chosen()
        self.done[chosen.__name__.removeprefix("_")] += 1

    def rest_s(self) -> float:
        """Until the next one."""
        return self._dice.uniform(*BETWEEN_ACTS_S)

    def _kill_client(self) -> None:
        self._crowd.kill_one(self._dice)

    def _reload_good(self) -> None:
        self._settings.write_good(self._dice)
        self._daemon.ask(admin.Reload())

    def _reload_bad(self) -> None:
        self._settings.write_bad(self._dice)
        refused(lambda: self._daemon.ask(admin.Reload()), "bad_config")

    def _evict(self) -> None:
        model = self._dice.choice(self._models)
        with contextlib.suppress(InTheWay):
            tolerated(lambda: self._daemon.ask(admin.Evict(name=model)), "in_use", "pinned")

    def _pin(self) -> None:
        model = self._dice.choice(self._models)
        self._daemon.ask(admin.Pin(name=model))
        self._daemon.ask(admin.Unpin(name=model))

    def _drop_cache(self) -> None:
        self._daemon.ask(admin.DropCache())


class InTheWay(Exception):
    """The daemon refused, and may."""


def tolerated(command: Callable[[], Any], *codes: str) -> Any:
    """The command's result. Raises `InTheWay` for a refusal of these."""
    try:
        return command()
    except admin.AdminError as error:
        if error.code not in codes:
            raise
        raise InTheWay(error.code) from error


def refused(command: Callable[[], Any], code: str) -> None:
    """It must be."""
    try:
        tolerated(command, code)
    except InTheWay:
        return
    raise AssertionError(f"not refused with {code}")


class Stagehand:
    """Has a model and an adapter come, be replaced and go, on a thread of its own."""

    def __init__(self, daemon: DaemonProcess, scene: Scene, seed: int) -> None:
        self._daemon = daemon
        self._scene = scene
        self._dice = random.Random(seed)
        self._over = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work)
        self.done: Counter[str] = Counter()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Nothing of it is left afterwards. Raises what went wrong."""
        self._over.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            while not self._over.is_set():
                (self._model if self._dice.random() < 0.5 else self._adapter)()
        except BaseException as error:  # noqa: BLE001 a thread's boundary: `stop` raises it again
            self._error = error

    def _model(self) -> None:
        editions = self._dice.sample(self._scene.guests, 2)
        self._ask(admin.Add(name=GUEST, source=str(editions[0])))
        if self._dice.random() < 0.5:
            self._ask(admin.Add(name=GUEST, source=str(editions[1]), replace=True))
        self._ask(admin.Remove(name=GUEST))

    def _adapter(self) -> None:
        self._ask(admin.AddLora(source=str(self._scene.guest_lora), name=GUEST_LORA, base=GUEST_BASE))
        self._ask(admin.RemoveLora(name=GUEST_LORA))

    def _ask(self, command: admin.AdminRequest) -> None:
        self._daemon.ask(command, timeout_s=ADD_S)
        self.done[type(command).__name__] += 1
        self._over.wait(self._dice.uniform(*BETWEEN_CHANGES_S))

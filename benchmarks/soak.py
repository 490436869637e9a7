"""Everything at once, and much of it wrong: `python -m benchmarks.soak [--json] [--seconds N] [--seed N]`.

Client processes ask a daemon for images of several models, with and without adapters, with priorities and
deadlines; they take requests back, leave and come again. Meanwhile loaders are killed and frozen, clients are
killed; a model and an adapter come, are replaced and go; the configuration is read again, good and bad ones;
an operator evicts, pins and drops the cache. What happens depends on the seed, when on the machine.

A quarter of the time at first, twenty seconds at most, is for warming up. Then, and at the end, all is
brought to rest: clients leave, everything is evicted. What the daemon and its loaders have is compared.

* `requests`: of clients that lived to hear the answer. `lost`: no answer, or an error that nobody has brought
  about. `wrong_image`: not bit for bit that of plain diffusers for this model, adapters, seed and image.
* `duplicated`: answers more than there were askings, on the wire.
* `rss_growth_mb` (1e6 bytes): memory that is shared with nobody; `fd_growth`: open descriptors.
* `leaked_bytes`: of arena and host pool, neither free nor a copy at rest.

Expected, before the first run: zeros, and a growth under 10 MB.
"""

import argparse
import contextlib
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec

from benchmarks.calm import evict_all, leaked, poll, settled
from benchmarks.fuzz import private_bytes
from benchmarks.kit import DaemonProcess, DaemonSettings, json_line, running_daemon, say, show_table, timed
from benchmarks.soak_client import Entry, Wish, entries
from benchmarks.soak_mischief import Crowd, Mischief, Settings, Stagehand
from benchmarks.soak_scene import GUEST, Scene, set_scene
from understudy import admin
from understudy_demo.serving import short_runtime_dir

CLIENTS, LOADERS = 3, 3
LOAD_S = 0.15
WARM_UP_S, WARM_UP_SHARE = 20.0, 0.25
ROOM_SHARE, POOL_SHARE = 0.6, 0.5
MAX_GROWTH_MB = 30.0
HANG_UP_S = 3.0  # within which the daemon closes its end of what others have closed
SHOWN = 5


@dataclass(frozen=True)
class Rest:
    """The daemon with nothing to do and nothing resident: what it and its loaders have."""

    private_bytes: int
    descriptors: Counter[str]
    status: dict[str, Any]

    @property
    def opened(self) -> int:
        """How many descriptors."""
        return self.descriptors.total()


@dataclass
class Verdict:
    """What the journals come to. `endings` counts requests by how they ended."""

    requests: int = 0
    lost: int = 0
    wrong_image: int = 0
    duplicated: int = 0
    endings: Counter[str] = field(default_factory=Counter)
    strange: list[str] = field(default_factory=list)

    def hear(self, journal: list[Entry], wishes: list[Wish], *, was_killed: bool) -> None:
        """One client's; of one that was killed only what it heard counts."""
        open_ids = {entry.id: entry for entry in journal if entry.step == "asked"}
        for entry in journal:
            match entry.step:
                case "asked":
                    continue
                case "again" | "unreadable":
                    self.duplicated += 1
                    self.strange.append(f"{entry.id}: {entry.step} {entry.message}")
                    continue
                case "image" if entry.sha256 not in wishes[entry.wish].right:
                    self.wrong_image += 1
                    self.strange.append(f"{entry.id}: wrong image of {self._asked(wishes[entry.wish])}")
                case "image":
                    pass
                case error if error not in entry.excuses:
                    self.lost += 1
                    asked = self._asked(wishes[entry.wish])
                    self.strange.append(f"{entry.id}: {error} for {asked}: {entry.message}")
            self._count(entry.step)
            del open_ids[entry.id]
        if not was_killed:
            for entry in open_ids.values():
                self.lost += 1
                self.strange.append(f"{entry.id}: no answer for {self._asked(wishes[entry.wish])}")
                self._count("none")

    def _count(self, ending: str) -> None:
        self.requests += 1
        self.endings[ending] += 1

    def _asked(self, wish: Wish) -> str:
        return f"{wish.model} {list(wish.adapters)} seed {wish.seed}"


@contextlib.contextmanager
def soaked_daemon(scene: Scene, folder: Path) -> Iterator[DaemonProcess]:
    """A daemon with room for some of its models, small chunks, slow loads."""
    room_bytes = max(3 * scene.model_bytes, int(ROOM_SHARE * scene.whole_bytes))
    settings = DaemonSettings(
        store=scene.store,
        runtime_dir=short_runtime_dir(folder / "run"),
        arena_bytes=room_bytes,
        loaders=LOADERS,
        rate_limit_bytes_per_s=int(scene.model_bytes / LOAD_S),
    )
    environ = {
        "UNDERSTUDY__HOST__POOL": f"{int(POOL_SHARE * scene.whole_bytes)}B",
        "UNDERSTUDY__LOADER__CHUNK": "256KiB",
    }
    with mock.patch.dict(os.environ, environ), running_daemon(settings, folder / "daemon") as daemon:
        yield daemon


class Soak:
    """The show and its troubles, over one daemon."""

    def __init__(self, scene: Scene, daemon: DaemonProcess, folder: Path) -> None:
        self._scene = scene
        self._daemon = daemon
        self._folder = folder
        self._settings = Settings(folder / "daemon" / "understudyd.toml")
        self._wishes = folder / "wishes.json"
        self._wishes.write_bytes(msgspec.json.encode(scene.wishes))

    def run(self, seconds: float, seed: int) -> Verdict:
        """So long; everybody has left when it returns."""
        stays = sorted({wish.model for wish in self._scene.wishes} - {GUEST})
        crowd = Crowd(self._daemon.endpoint, self._wishes, self._folder, CLIENTS, seed)
        mischief = Mischief(self._daemon, crowd, self._settings, stays, seed)
        stagehand = Stagehand(self._daemon, self._scene, seed)
        ends_s = time.monotonic() + seconds
        try:
            stagehand.start()
            while time.monotonic() < ends_s:
                mischief.act()
                time.sleep(mischief.rest_s())
                self._daemon.check()
        finally:
            crowd.leave()
            stagehand.stop()
        verdict = Verdict()
        for path in sorted(self._folder.glob(f"client-{seed}-*.jsonl")):
            verdict.hear(entries(path), self._scene.wishes, was_killed=path in crowd.killed)
        verdict.strange += crowd.failed
        verdict.lost += len(crowd.failed)
        done = mischief.done + stagehand.done
        say("  " + ", ".join(f"{name} {count}" for name, count in sorted(done.items())))
        say("  " + ", ".join(f"{name} {count}" for name, count in verdict.endings.most_common()))
        for line in verdict.strange[:SHOWN]:
            say(f"  {line}")
        return verdict

    def rest(self, before: Rest | None = None) -> Rest:
        """Bring the daemon to rest and look at it, once it has closed what others have, or soon."""
        self._settings.write_calm()
        self._daemon.ask(admin.Reload())
        poll(self._daemon, self._is_idle, "nothing is open")
        evict_all(self._daemon)
        status = settled(self._daemon)
        pids = [status["pid"], *(row["pid"] for row in status["loaders"])]

        def look() -> Rest:
            opened = sum(map(descriptors, pids), Counter[str]())
            return Rest(sum(map(private_bytes, pids)), opened, status)

        found = look()
        ends_s = time.monotonic() + HANG_UP_S
        while time.monotonic() < ends_s and (before is None or found.opened > before.opened):
            time.sleep(HANG_UP_S / 10)
            found = min(found, look(), key=lambda rest: rest.opened)
        return found

    def _is_idle(self) -> bool:
        status = self._daemon.ask(admin.Status())
        return not status["requests_waiting"] and status["request_running"] is None


def descriptors(pid: int) -> Counter[str]:
    """What a process has open, by kind."""
    opened: Counter[str] = Counter()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            opened[str(entry.readlink()).split(":[")[0]] += 1
    return opened


def measure(seconds: float, seed: int, folder: Path) -> dict[str, float | int]:
    """The benchmark's figures; what it makes and the logs are in `folder`."""
    scene = set_scene(folder)
    with soaked_daemon(scene, folder) as daemon:
        soak = Soak(scene, daemon, folder)
        warm_up_s = min(WARM_UP_S, WARM_UP_SHARE * seconds)
        with timed("warming up"):
            first = soak.run(warm_up_s, 2 * seed)
            before = soak.rest()
        with timed("soaking"):
            second = soak.run(seconds - warm_up_s, 2 * seed + 1)
            after = soak.rest(before)
        daemon.check()
    if grown := after.descriptors - before.descriptors:
        say(f"  more descriptors: {dict(grown)}")
    return {
        "requests": first.requests + second.requests,
        "lost": first.lost + second.lost,
        "wrong_image": first.wrong_image + second.wrong_image,
        "duplicated": first.duplicated + second.duplicated,
        "rss_growth_mb": (after.private_bytes - before.private_bytes) / 1e6,
        "fd_growth": after.opened - before.opened,
        "leaked_bytes": leaked(before.status, after.status),
    }


def holds(found: dict[str, float | int]) -> bool:
    """Nothing was lost, wrong, doubled or leaked."""
    counted = ("lost", "wrong_image", "duplicated", "fd_growth", "leaked_bytes")
    is_clean = all(found[name] <= 0 for name in counted)
    return is_clean and found["requests"] > 0 and found["rss_growth_mb"] < MAX_GROWTH_MB


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="models, journals and logs go here, and stay")
    options = parser.parse_args(arguments)
    with contextlib.ExitStack() as temporary:
        folder = options.work
        if folder is None:
            folder = Path(temporary.enter_context(tempfile.TemporaryDirectory(prefix="understudy-soak-")))
        folder.mkdir(parents=True, exist_ok=True)
        found = measure(options.seconds, options.seed, folder)
    show_table("soak", ["figure", "value"], [[key, f"{value:,.1f}"] for key, value in found.items()])
    if options.json:
        json_line(found)
    return 0 if holds(found) else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""The machine's own faults, made for real: a disk that is full, a wall clock that jumps."""

import asyncio
import errno
import subprocess
from pathlib import Path

import pytest

import understudy
from daemon_kit import DaemonProcess, running_daemon
from family_kit import Family, pixels
from faults_kit import OPTIONS, PROMPT, REFERENCE, Stricken, stricken_daemon
from store_kit import listing
from understudy import admin

MIB = 2**20
DAYS_S = 86_400

MOUNTED = """
mount -t tmpfs -o "size=$1" tmpfs "$2" && cp -a "$3/." "$2" || exit 125
shift 3
exec "$@"
"""


def on_a_small_disk(disk: Path, content: Path, free_bytes: int) -> list[str]:
    """Words before a command, which alone then sees a disk with this content and so much room."""
    sizes = (path.stat().st_size for path in content.rglob("*") if path.is_file())
    size_bytes = sum(-(-size // 4096) * 4096 for size in sizes) + free_bytes
    namespace = ["unshare", "--mount", "--propagation", "private", "sh", "-c", MOUNTED, "sh"]
    words = [*namespace, str(size_bytes), str(disk), str(content)]
    tried = subprocess.run([*words, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"this machine lets us mount no disk: {tried.stderr.strip()}")
    return words


def test_a_full_disk(family: Family, tmp_path: Path) -> None:
    """What does not fit is refused and leaves nothing; what is there is served; with room it is added."""
    disk = tmp_path / "disk"
    disk.mkdir()
    more = {"stage": {"warm_up": False}, "policy": {"prefetch": False}}
    within = on_a_small_disk(disk, family.store, free_bytes=MIB)
    with running_daemon(disk, tmp_path / "run", within=within, **more) as daemon:
        store = Path(f"/proc/{daemon.process.pid}/root") / disk.relative_to("/")
        source = family.folders["sd-c"]
        grown = Family(disk, family.folders | {"new": source}, family.dtypes | {"new": "fp16"})
        add = admin.Add(name="new", source=str(source), dtype="fp16")
        before = listing(store)
        with pytest.raises(admin.AdminError, match="free") as refused:
            daemon.ask(add, timeout_s=120.0)
        assert refused.value.code == "disk_full"
        assert listing(store) == before and not list((store / "tmp").iterdir())
        served(daemon, family, "sd-a")

        fill_up(store / "filler")
        with pytest.raises(admin.AdminError, match="nothing has changed") as refused:
            daemon.ask(admin.Set(name="sd-a", max_batch=2))
        assert refused.value.code == "io_error"
        with pytest.raises(admin.AdminError) as refused:
            daemon.ask(add, timeout_s=120.0)
        assert refused.value.code == "disk_full"
        served(daemon, family, "sd-b")

        assert daemon.ask(admin.Remove(name="sd-half"))["freed_bytes"] > 0
        assert daemon.ask(add, timeout_s=120.0)["name"] == "new"
        served(daemon, grown, "new")
        assert daemon.stop() == 0


def served(daemon: DaemonProcess, family: Family, model: str) -> None:
    with understudy.Client(endpoint=daemon.endpoint) as client:
        images = client.generate(model, PROMPT, **OPTIONS).images
    assert [pixels(image) for image in images] == family.reference(model, **REFERENCE)


def fill_up(path: Path) -> None:
    """To the last byte."""
    with path.open("wb", buffering=0) as file:
        for size_bytes in (MIB, 4096, 1):
            try:
                while file.write(b"x" * size_bytes) == size_bytes:
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC, error


JUMPING_CLOCK = """
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long ahead_s(void) {
    char text[32] = {0};
    int fd = open(getenv("CLOCK_AHEAD_S"), O_RDONLY | O_CLOEXEC);
    if (fd < 0) return 0;
    if (read(fd, text, sizeof text - 1) < 0) text[0] = 0;
    close(fd);
    return atol(text);
}

int clock_gettime(clockid_t id, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, id, now);
    if (!failed && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) now->tv_sec += ahead_s();
    return failed;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *into) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (into) *into = now.tv_sec;
    return now.tv_sec;
}
"""


class Clock:
    """The wall clock of processes that are started with `environ`: so many seconds ahead of the machine's."""

    def __init__(self, folder: Path) -> None:
        source, library = folder / "clock.c", folder / "clock.so"
        self._ahead_s = folder / "ahead_s"
        source.write_text(JUMPING_CLOCK)
        try:
            command = ["cc", "-shared", "-fPIC", "-O2", "-o", str(library), str(source)]
            subprocess.run(command, check=True, capture_output=True)
        except FileNotFoundError:
            pytest.skip("there is no C compiler here to make a wall clock that jumps")
        self.environ = {"LD_PRELOAD": str(library), "CLOCK_AHEAD_S": str(self._ahead_s)}

    def jump(self, ahead_s: int) -> None:
        fresh = self._ahead_s.with_suffix(".new")
        fresh.write_text(str(ahead_s))
        fresh.replace(self._ahead_s)


def test_the_wall_clock_jumps(family: Family, tmp_path: Path) -> None:
    """A year ahead and two back, each in mid-load with a deadline: nobody notices."""
    clock = Clock(tmp_path)

    async def scenario(stricken: Stricken) -> None:
        dates = []
        async with stricken.visited():
            await stricken.served("sd-a")
            for model, ahead_s in {"xl": 400 * DAYS_S, "sd-c": -400 * DAYS_S, "sd-b": 0}.items():
                stricken.strike("slow:read")
                victim = await stricken.client.submit(model, PROMPT, deadline_s=60.0, **OPTIONS)
                await stricken.in_the_middle()
                clock.jump(ahead_s)
                stricken.relent()
                await stricken.right(model, victim)
                await stricken.served("sd-a")
                stricken.ask(admin.LogLevel(level="info"))
                line = await asyncio.to_thread(stricken.daemon.wait_for_log, "log-level: done")
                stricken.daemon.log.clear()
                dates.append(line.partition("-")[0])
        assert len(set(dates)) == 3, f"the clock did not jump: {dates}"
        status = stricken.status()
        assert stricken.restarts() == 0 and status["requests_failed"] == 0
        assert 0 <= status["uptime_s"] < DAYS_S
        for row in stricken.ask(admin.Models()):
            assert row["last_used_s_ago"] is None or 0 <= row["last_used_s_ago"] < DAYS_S, row
        await stricken.emptied()

    folder = tmp_path / "stricken"
    with stricken_daemon(family, folder, environ=clock.environ) as stricken:
        asyncio.run(scenario(stricken))
        clock.jump(400 * DAYS_S)
        assert stricken.daemon.stop() == 0
    clock.jump(-400 * DAYS_S)
    forecast = stricken.store.path / "forecast.json"
    assert forecast.exists(), "it was written more than two years after now"
    with running_daemon(stricken.store.path, folder / "again", environ=clock.environ) as daemon:
        served(daemon, family, "sd-a")
        assert not any("is ignored" in line for line in daemon.log)

"""A loader dies, freezes, hangs or crawls at every point that it passes; nobody but an operator notices.

Real processes and real signals: the loader strikes itself, one of four, at the point that the case names.
About half of the cases have a host pool.
"""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from family_kit import Family
from faults_kit import Stricken, stricken_daemon, until

RESPAWNED_WITHIN_S = 1.0
DECLARED_DEAD_WITHIN_S = 3.0
STALLED_AFTER_S = 3.5
GIVEN_UP_WITHIN_S = {
    "kill": RESPAWNED_WITHIN_S,
    "stop": DECLARED_DEAD_WITHIN_S,
    "stall": STALLED_AFTER_S + 0.5,
}
TRIES = 3  # for what is timed: the machine may have been busy elsewhere
COMING_UP = ("spawn", "open")
LOADERS = 8  # so many that none of their places is struck often, and respawns late for that
REASONS = {
    "kill": ("closed its connection", "has ended", "takes no orders: Broken pipe"),
    "stop": ("is silent",),
    "stall": ("makes no progress",),
}
PLAIN, POOLED = "0", "32MiB"


@dataclass(frozen=True)
class Case:
    """What happens where. `model` is one that was not loaded before where only who reads a file comes by."""

    action: str
    point: str
    pool: str
    passage: int = 1
    model: str = "xl"

    def __str__(self) -> str:
        return f"{self.action}-{self.point}-{'plain' if self.pool == PLAIN else 'pooled'}"


CASES = [
    Case("kill", "spawn", PLAIN),
    Case("kill", "open", POOLED),
    Case("kill", "header", PLAIN),
    Case("kill", "read", POOLED, passage=3, model="sd-half"),
    Case("kill", "copy", PLAIN, passage=3),
    Case("kill", "synchronise", POOLED),
    Case("kill", "report", PLAIN),
    Case("kill", "idle", POOLED),
    Case("stop", "open", PLAIN),
    Case("stop", "header", POOLED, model="xl-b"),
    Case("stop", "read", PLAIN, passage=3),
    Case("stop", "copy", POOLED, passage=3),
    Case("stop", "synchronise", PLAIN),
    Case("stop", "report", POOLED),
    Case("stop", "idle", PLAIN),
    Case("stall", "read", PLAIN, passage=3),
    Case("stall", "report", POOLED),
]


@pytest.fixture(scope="module")
def stricken(
    family: Family, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Stricken]:
    """One daemon for all cases without a host pool, one for all with it."""
    patience = {"stalled_after_s": STALLED_AFTER_S}
    folder: Path = tmp_path_factory.mktemp("stricken")
    with stricken_daemon(family, folder, pool=request.param, count=LOADERS, loader=patience) as stricken:
        asyncio.run(until(stricken.loaders, lambda rows: all(row["state"] == "idle" for row in rows)))
        before = stricken.descriptors()
        yield stricken
        asyncio.run(until(stricken.descriptors, lambda after: after <= before))
        left = stricken.children()
    assert not psutil.wait_procs(left, 0.0)[1]


@pytest.fixture(autouse=True)
def nothing_left_behind() -> None:
    """Loaders come and go in every test, and the daemon stays: `stricken` looks at its end."""


def with_daemons(cases: list[Case]) -> pytest.MarkDecorator:
    """The daemons are shared: `scope` keeps them for the module."""
    return pytest.mark.parametrize(
        ("stricken", "case"),
        [pytest.param(case.pool, case, id=str(case)) for case in cases],
        indirect=["stricken"],
        scope="module",
    )


@with_daemons(CASES)
def test_a_loader_is_struck(stricken: Stricken, case: Case) -> None:
    """Everybody is served, no byte stays behind, a new loader is at work in time."""

    async def scenario() -> None:
        async with stricken.visited():
            for _ in range(TRIES):
                given_up_after_s, at_work_after_s = await struck_once(stricken, case)
                respawned_after_s = at_work_after_s - (0.0 if case.action == "kill" else given_up_after_s)
                if respawned_after_s <= RESPAWNED_WITHIN_S:
                    break
            assert respawned_after_s <= RESPAWNED_WITHIN_S
            assert given_up_after_s <= GIVEN_UP_WITHIN_S[case.action]
        assert stricken.status()["requests_failed"] == 0

    asyncio.run(scenario())


async def struck_once(stricken: Stricken, case: Case) -> tuple[float, float]:
    """Seconds from the strike until the loader was given up, and until another one was at work."""
    await stricken.served("sd-a")  # this one is resident, the others are not
    before = stricken.loaders()
    restarts = stricken.restarts() + 1
    claim = stricken.strike_one(f"{case.action}:{case.point}:{case.passage}")
    if case.point in COMING_UP:
        restarts += 1
        make_room_for_another(stricken)
    victim = await stricken.submit(case.model)
    await until(claim.exists, bool)
    struck_at_s = claim.stat().st_mtime
    replacement = asyncio.create_task(stricken.replaced(restarts))
    await stricken.served("sd-a", "sd-c")
    await stricken.right(case.model, victim)
    given_up_at_s, at_work_at_s = await replacement
    ((was, now),) = [(a, b) for a, b in zip(before, stricken.loaders()) if a["restarts"] != b["restarts"]]
    assert now["last_loss"] in REASONS[case.action] and now["pid"] != was["pid"]
    stricken.relent()
    await stricken.emptied()
    return given_up_at_s - struck_at_s, at_work_at_s - struck_at_s


def make_room_for_another(stricken: Stricken) -> None:
    """Kill a loader, from the place that has seen the fewest die, so that the next one comes up."""
    row = min(stricken.loaders(), key=lambda row: row["restarts"])
    os.kill(row["pid"], signal.SIGKILL)


@with_daemons([Case("stop", "spawn", PLAIN)])
def test_a_loader_freezes_before_it_has_a_heart(stricken: Stricken, case: Case) -> None:
    """It has nothing to do yet: the others serve, and once it is gone the next one comes in time."""

    async def scenario() -> None:
        restarts = stricken.restarts() + 2
        claim = stricken.strike_one("stop:spawn")
        make_room_for_another(stricken)
        await until(claim.exists, bool)
        async with stricken.visited():
            await stricken.served("sd-a", "xl")
        (frozen,) = [row for row in stricken.loaders() if row["state"] == "starting"]
        os.kill(frozen["pid"], signal.SIGKILL)
        given_up_at_s, at_work_at_s = await stricken.replaced(restarts)
        assert at_work_at_s - given_up_at_s <= RESPAWNED_WITHIN_S
        stricken.relent()
        await stricken.emptied()

    asyncio.run(scenario())


@with_daemons([Case("slow", "read", PLAIN, model="sd-b"), Case("slow", "read", POOLED, model="sd-b")])
def test_slow_reads_are_no_death(stricken: Stricken, case: Case) -> None:
    """Loads that take longer than a silent or a stuck loader is given are waited for."""

    async def scenario() -> None:
        restarts = stricken.restarts()
        async with stricken.visited():
            await stricken.served("sd-a")
            stricken.strike("slow:read")
            started_at_s = time.monotonic()
            victim = await stricken.submit(case.model)
            await stricken.in_the_middle(f"{case.model} unet")
            await stricken.served("sd-a")
            await stricken.right(case.model, victim)
            assert time.monotonic() - started_at_s > DECLARED_DEAD_WITHIN_S
        assert stricken.restarts() == restarts and stricken.status()["requests_failed"] == 0
        stricken.relent()
        await stricken.emptied()

    asyncio.run(scenario())


@pytest.mark.parametrize("stricken", [POOLED], indirect=True, scope="module")
def test_a_host_copy_outlives_the_file(stricken: Stricken) -> None:
    """What was loaded once is served from the host pool, whatever becomes of arena and disk."""
    blobs = [stricken.blob("sd-c", component) for component in ("unet", "vae", "text_encoder")]

    async def scenario() -> None:
        async with stricken.visited():
            await stricken.served("sd-c")
            await stricken.emptied()
            for blob in blobs:
                blob.rename(blob.with_suffix(".elsewhere"))
            await stricken.served("sd-c")
            await stricken.emptied()

    try:
        asyncio.run(scenario())
    finally:
        for blob in blobs:
            blob.with_suffix(".elsewhere").rename(blob)

"""Loads are taken back and daemons end while loaders are at work, stuck or frozen. Nothing outlives them."""

import asyncio
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest

import understudy
from daemon_kit import running_daemon
from family_kit import Family, pixels
from faults_kit import PROMPT, Stricken, stricken_daemon, until
from understudy import admin

DRAIN_S = 1.0
STOPPED_WITHIN_S = 15.0  # drain, two seconds for loaders to stop by order, one for the last answers, and room
ORPHANS_GONE_WITHIN_S = 2.0


async def cancelled_by_its_client(stricken: Stricken) -> None:
    handle = await stricken.submit("xl")
    await stricken.in_the_middle("xl unet")
    handle.cancel()
    with pytest.raises(understudy.Cancelled):
        await handle.result()
    stricken.ask(admin.Evict(name="xl"))  # nobody waits for it any more: its load is stopped


async def evicted(stricken: Stricken) -> None:
    stricken.ask(admin.Load(name="sd-c", wait=False))
    await stricken.in_the_middle("sd-c unet")
    stricken.ask(admin.Evict(name="sd-c"))


async def removed(stricken: Stricken) -> None:
    handle = await stricken.submit("xl-b")
    await stricken.in_the_middle("xl-b unet")
    blob = stricken.blob("xl-b")
    stricken.ask(admin.Remove(name="xl-b"))
    with pytest.raises(understudy.UnknownModel):
        await handle.result()
    assert not blob.exists()


async def ended(stricken: Stricken, order: Callable[[], object]) -> tuple[int, float]:
    """The daemon's exit status, and how long it took until it and all its children were gone."""
    processes = [psutil.Process(stricken.daemon.process.pid), *stricken.children()]
    assert len(processes) >= 3
    started_at_s = time.monotonic()
    order()
    await until(lambda: [process for process in processes if is_alive(process)], lambda alive: not alive)
    took_s = time.monotonic() - started_at_s
    return await asyncio.to_thread(stricken.daemon.wait), took_s


def is_alive(process: psutil.Process) -> bool:
    """It has not ended, though nobody may have asked for its exit status yet."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_loads_are_taken_back(family: Family, tmp_path: Path) -> None:
    """By client and operator, each in mid-load; at last the daemon is shut down in one."""

    async def scenario(stricken: Stricken) -> None:
        async with stricken.visited():
            for taken_back in (cancelled_by_its_client, evicted, removed):
                stricken.strike("slow:read")
                await taken_back(stricken)
                await stricken.quiet()
                for name in ("xl", "sd-c"):  # a load that was nearly done may have been faster
                    stricken.ask(admin.Evict(name=name))
                (arena, _) = await stricken.quiet()
                assert arena["free_bytes"] == arena["size_bytes"], taken_back
                stricken.relent()
                await stricken.served("sd-a")
                stricken.ask(admin.Evict(name="sd-a"))
            assert stricken.restarts() == 0
            stricken.strike("slow:read")
            handle = await stricken.submit("sd-c")
            await stricken.in_the_middle("sd-c unet")
            shutdown = partial(stricken.ask, admin.Shutdown(drain_s=0.1))
            status, took_s = await ended(stricken, shutdown)
            assert status == 0 and took_s <= STOPPED_WITHIN_S
            with pytest.raises(understudy.UnderstudyError):
                await handle.result()

    with stricken_daemon(family, tmp_path) as stricken:
        asyncio.run(scenario(stricken))


@pytest.mark.parametrize(
    ("number", "strike", "pool"),
    [
        (signal.SIGTERM, "stall:read", "32MiB"),
        (signal.SIGTERM, "stop:copy", "0"),
        (signal.SIGKILL, "stop:read", "32MiB"),
    ],
)
def test_a_daemon_ends_in_mid_load(
    family: Family, tmp_path: Path, number: signal.Signals, strike: str, pool: str
) -> None:
    """A loader hangs or is frozen: all go with the daemon, and whoever waits is told, if there is time."""
    by_force = number is signal.SIGKILL

    async def scenario(stricken: Stricken) -> None:
        async with stricken.visited():
            claim = stricken.strike_one(strike)
            handle = await stricken.submit("sd-c")
            await until(claim.exists, bool)
            status, took_s = await ended(stricken, partial(stricken.daemon.signal, number))
            assert status == (-number if by_force else 0)
            assert took_s <= (ORPHANS_GONE_WITHIN_S if by_force else STOPPED_WITHIN_S)
            if not by_force:
                with pytest.raises(understudy.UnderstudyError):
                    await handle.result()

    with stricken_daemon(family, tmp_path, pool=pool, server={"drain_s": DRAIN_S}) as stricken:
        asyncio.run(scenario(stricken))


def test_a_second_sigterm_ends_it_at_once(family: Family, tmp_path: Path) -> None:
    """Whatever is open; its client sees a pause, until the next daemon runs it."""
    fields = {"steps": 20, "width": 64, "height": 64}

    async def scenario(stricken: Stricken) -> understudy.Result:
        async with stricken.visited():
            handle = await stricken.client.submit("sd-c", PROMPT, seed=7, **fields)
            while not isinstance(await handle.next_event(), understudy.Progress):
                pass
            stricken.daemon.signal(signal.SIGTERM)
            await asyncio.to_thread(stricken.daemon.wait_for_log, "draining 1 requests")
            status, took_s = await ended(stricken, partial(stricken.daemon.signal, signal.SIGTERM))
            assert status == 128 + signal.SIGTERM and took_s <= ORPHANS_GONE_WITHIN_S
            with running_daemon(stricken.store.path, stricken.daemon.runtime_dir, wait=False) as second:
                result: understudy.Result = await handle.result()
                await asyncio.to_thread(second.wait_for_log, "ready after")
            return result

    with stricken_daemon(family, tmp_path, server={"drain_s": 60.0}) as stricken:
        result = asyncio.run(scenario(stricken))
    expected = family.reference("sd-c", prompt=PROMPT, seed=7, num_inference_steps=20, width=64, height=64)
    assert [pixels(image) for image in result.images] == expected

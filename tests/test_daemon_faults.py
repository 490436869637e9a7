"""Real faults on a real daemon: clients and the daemon itself killed, models removed, no room."""

import asyncio
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import understudy
from daemon_kit import DaemonProcess, running_daemon
from family_kit import Family, pixels
from faults_kit import OPTIONS, PROMPT, Stricken, stricken_daemon, until
from understudy import admin

COLD: dict[str, Any] = {"stage": {"warm_up": False}}


@pytest.fixture(scope="module")
def shared(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stricken]:
    """One daemon, with a store of its own, for the tests that leave it alive."""
    with stricken_daemon(family, tmp_path_factory.mktemp("shared")) as stricken:
        yield stricken


def test_a_model_removed_while_requests_wait(shared: Stricken) -> None:
    """Running ones finish, waiting ones get a typed error, the files are gone, the rest is served."""

    async def scenario(daemon: DaemonProcess) -> None:
        async with understudy.AsyncClient(endpoint=daemon.endpoint) as client:
            await asyncio.to_thread(daemon.ask, admin.Load(name="sd-c"))
            running = await client.submit("sd-a", PROMPT, seed=1, steps=60, width=64, height=64)
            while not isinstance(await running.next_event(), understudy.Progress):
                pass
            deck = await client.submit("sd-c", PROMPT, **OPTIONS)  # takes the deck
            waiting = [await client.submit("sd-a", PROMPT, **OPTIONS) for _ in range(3)]
            await waiting[-1].next_event()
            removal = asyncio.create_task(asyncio.to_thread(daemon.ask, admin.Remove(name="sd-a")))
            for handle in waiting:
                with pytest.raises(understudy.UnknownModel, match="removed"):
                    await handle.result()
            assert (await running.result()).images and (await deck.result()).images
            assert (await removal)["freed_bytes"] > 0
            with pytest.raises(understudy.UnknownModel):
                await client.generate("sd-a", PROMPT, **OPTIONS)
            assert (await client.generate("sd-b", PROMPT, **OPTIONS)).images

    asyncio.run(scenario(shared.daemon))
    assert "sd-a" not in shared.store.names()


def test_sigterm_finishes_what_is_open(family: Family, tmp_path: Path) -> None:
    async def scenario(daemon: DaemonProcess) -> list[understudy.Result]:
        async with understudy.AsyncClient(endpoint=daemon.endpoint) as client:
            handles = [
                await client.submit("sd-a", PROMPT, seed=i, steps=8, width=64, height=64) for i in range(4)
            ]
            while not isinstance(await handles[0].next_event(), understudy.Progress):
                pass
            daemon.signal(signal.SIGTERM)
            return [await handle.result() for handle in handles]

    with running_daemon(family.store, tmp_path / "run", **COLD) as daemon:
        children = [p.pid for p in psutil.Process(daemon.process.pid).children(recursive=True)]
        assert len(asyncio.run(scenario(daemon))) == 4
        assert daemon.wait() == 0
    assert not any(psutil.pid_exists(pid) for pid in children)
    assert not (tmp_path / "run" / "admin.sock").exists()


def test_a_killed_daemon_takes_its_loaders_along_and_clients_see_a_pause(
    family: Family, tmp_path: Path
) -> None:
    """kill -9 in the middle of a request; the next daemon runs it again: one answer, the same image."""
    expected = family.reference("sd-c", prompt=PROMPT, seed=7, num_inference_steps=30, width=64, height=64)

    async def scenario(first: DaemonProcess) -> understudy.Result:
        async with understudy.AsyncClient(endpoint=first.endpoint) as client:
            handle = await client.submit("sd-c", PROMPT, seed=7, steps=30, width=64, height=64)
            while not isinstance(await handle.next_event(), understudy.Progress):
                pass
            children = psutil.Process(first.process.pid).children(recursive=True)
            first.signal(signal.SIGKILL)
            await asyncio.to_thread(first.process.wait)
            gone, alive = await asyncio.to_thread(psutil.wait_procs, children, 5.0)
            assert len(gone) >= 2 and not alive
            with running_daemon(family.store, tmp_path / "run", **COLD, wait=False) as second:
                await asyncio.to_thread(second.wait_for_log, "ready after")
                return await handle.result()

    with running_daemon(family.store, tmp_path / "run", **COLD) as first:
        result = asyncio.run(scenario(first))
    assert [pixels(image) for image in result.images] == expected


def test_a_client_killed_in_the_middle_frees_the_stage(shared: Stricken) -> None:
    program = (
        "import sys, understudy\n"
        "with understudy.Client(endpoint=sys.argv[1]) as client:\n"
        "    for event in client.stream('sd-b', 'x', seed=1, steps=500, width=128, height=128):\n"
        "        print(type(event).__name__, flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, shared.daemon.endpoint], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert "Progress\n" in iter(child.stdout.readline, "")
        child.kill()
    asyncio.run(until(shared.status, lambda status: status["request_running"] is None, timeout_s=10.0))
    with understudy.Client(endpoint=shared.daemon.endpoint) as client:
        assert client.generate("sd-b", PROMPT, **OPTIONS).images


def test_the_second_daemon_on_a_runtime_directory_is_refused(shared: Stricken) -> None:
    first = shared.daemon
    with running_daemon(shared.store.path, first.runtime_dir, wait=False) as second:
        assert second.wait() == 1
    assert f"pid {first.process.pid}" in "".join(second.log)
    assert shared.status()["state"] == "ready"


def test_a_model_that_cannot_fit_is_refused_at_once(family: Family, tmp_path: Path) -> None:
    store = shutil.copytree(family.store, tmp_path / "store")
    with running_daemon(store, tmp_path / "run", arena="2MiB", **COLD) as daemon:
        client = understudy.Client(endpoint=daemon.endpoint)
        with client, pytest.raises(understudy.CapacityError, match="arena") as error:
            client.generate("sd-a", PROMPT, **OPTIONS)
        assert error.value.code == "model_too_large"
        with pytest.raises(admin.AdminError, match=r"sd-a needs .* MiB, the arena has 2\.0 MiB; enlarge"):
            daemon.ask(admin.Load(name="sd-a"))
        source = str(family.folders["sd-b"])
        added = daemon.ask(admin.Add(name="sd-b", source=source, replace=True), timeout_s=60)
        assert "sd-b needs" in added["warning"] and "enlarge the arena" in added["warning"]

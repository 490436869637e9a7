"""Real faults on a real daemon: loaders killed and stopped, files damaged, the daemon itself killed."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import understudy
from daemon_kit import DaemonProcess, running_daemon
from family_kit import Family, pixels
from understudy import admin
from understudyd.store.store import Store

PROMPT = "a red circle on blue"
OPTIONS = {"seed": 7, "steps": 1, "width": 32, "height": 32}
REFERENCE = {"prompt": PROMPT, "seed": 7, "num_inference_steps": 1, "width": 32, "height": 32}
COLD: dict[str, Any] = {"stage": {"warm_up": False}}
SLOW = {"rate_limit": "2MiB/s"}  # a model takes about two seconds


async def until(look: Callable[[], Any], wanted: Callable[[Any], bool], timeout_s: float = 20.0) -> Any:
    """Ask again and again, yielding to the loop in between, until the answer is the wanted one."""
    async with asyncio.timeout(timeout_s):
        while not wanted(seen := await asyncio.to_thread(look)):
            await asyncio.sleep(0)
    return seen


def loaders(daemon: DaemonProcess) -> list[dict[str, Any]]:
    return daemon.ask(admin.Loaders())


def is_in_the_middle(rows: list[dict[str, Any]]) -> bool:
    return any(0 < row["bytes_done"] < row["size_bytes"] for row in rows)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_loader_dies_in_the_middle_of_a_load(
    family: Family, tmp_path: Path, number: signal.Signals
) -> None:
    """The request is served, no byte stays behind, a new loader is at work."""

    async def scenario(daemon: DaemonProcess) -> None:
        async with understudy.AsyncClient(endpoint=daemon.endpoint) as client:
            handle = await client.submit("xl", PROMPT, **OPTIONS)
            rows = await until(lambda: loaders(daemon), is_in_the_middle)
            victim = next(row for row in rows if 0 < row["bytes_done"] < row["size_bytes"])
            os.kill(victim["pid"], number)
            result = await handle.result()
            assert [pixels(i) for i in result.images] == family.reference("xl", **REFERENCE)
            fresh = await until(lambda: loaders(daemon), lambda rows: all(r["state"] == "idle" for r in rows))
            assert sum(row["restarts"] for row in fresh) == 1
            assert victim["pid"] not in {row["pid"] for row in fresh}
        quiet = await until(
            lambda: daemon.ask(admin.Status())["arena"],
            lambda a: a["quarantined_bytes"] == a["filling_bytes"] == a["leased_bytes"] == 0,
        )
        assert quiet["ready_bytes"] + quiet["free_bytes"] == quiet["size_bytes"]
        assert daemon.ask(admin.Status())["requests_failed"] == 0

    reference_first = family.reference("xl", **REFERENCE)  # imports torch while nothing is timed
    assert reference_first
    with running_daemon(family.store, tmp_path / "run", loader=SLOW, **COLD) as daemon:
        asyncio.run(scenario(daemon))


def flip_a_bit(path: Path) -> None:
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(-5000, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def test_damaged_files_fail_their_model_alone(own_store: Path, family: Family, tmp_path: Path) -> None:
    store = Store.open(own_store, writable=False)
    unet = {n: next(c for c in store.model(n).components if c.name == "unet").blob for n in ("sd-a", "sd-b")}
    with running_daemon(own_store, tmp_path / "run", **COLD, policy={"prefetch": False}) as daemon:
        flip_a_bit(store.blob_path(unet["sd-a"].sha256))
        store.blob_path(unet["sd-b"].sha256).unlink()
        with understudy.Client(endpoint=daemon.endpoint) as client:
            with pytest.raises(understudy.DaemonError, match="is damaged between") as corrupt:
                client.generate("sd-a", PROMPT, **OPTIONS)
            assert corrupt.value.code == "model_corrupt" and not corrupt.value.retryable
            with pytest.raises(understudy.DaemonError) as missing:
                client.generate("sd-b", PROMPT, **OPTIONS)
            assert missing.value.code == "load_failed"
            images = client.generate("sd-c", PROMPT, **OPTIONS).images
            assert [pixels(i) for i in images] == family.reference("sd-c", **REFERENCE)
            with pytest.raises(understudy.DaemonError, match="remove it and add it again"):
                client.generate("sd-a", PROMPT, **OPTIONS)
        arena = daemon.ask(admin.Status())["arena"]
        assert arena["ready_bytes"] + arena["free_bytes"] == arena["size_bytes"]


def test_a_model_removed_while_requests_wait(own_store: Path, tmp_path: Path) -> None:
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

    with running_daemon(own_store, tmp_path / "run", **COLD) as daemon:
        asyncio.run(scenario(daemon))
        assert "sd-a" not in Store.open(own_store, writable=False).names()


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


def test_a_client_killed_in_the_middle_frees_the_stage(family: Family, tmp_path: Path) -> None:
    program = (
        "import sys, understudy\n"
        "with understudy.Client(endpoint=sys.argv[1]) as client:\n"
        "    for event in client.stream('sd-a', 'x', seed=1, steps=500, width=128, height=128):\n"
        "        print(type(event).__name__, flush=True)\n"
    )
    with running_daemon(family.store, tmp_path / "run", **COLD) as daemon:
        with subprocess.Popen(
            [sys.executable, "-c", program, daemon.endpoint], stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None
            assert "Progress\n" in iter(child.stdout.readline, "")
            child.kill()
        asyncio.run(
            until(lambda: daemon.ask(admin.Status()), lambda s: s["request_running"] is None, timeout_s=10.0)
        )
        with understudy.Client(endpoint=daemon.endpoint) as client:
            assert client.generate("sd-a", PROMPT, **OPTIONS).images


def test_the_second_daemon_on_a_runtime_directory_is_refused(family: Family, tmp_path: Path) -> None:
    with running_daemon(family.store, tmp_path / "run", **COLD) as daemon:
        with running_daemon(family.store, tmp_path / "run", wait=False) as second:
            assert second.wait() == 1
        assert f"pid {daemon.process.pid}" in "".join(second.log)
        assert daemon.ask(admin.Status())["state"] == "ready"


def test_a_model_that_cannot_fit_is_refused_at_once(family: Family, tmp_path: Path) -> None:
    with running_daemon(family.store, tmp_path / "run", arena="2MiB", **COLD) as daemon:
        client = understudy.Client(endpoint=daemon.endpoint)
        with client, pytest.raises(understudy.CapacityError, match="arena") as error:
            client.generate("sd-a", PROMPT, **OPTIONS)
        assert error.value.code == "model_too_large"

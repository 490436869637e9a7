"""One daemon per runtime directory and socket: a living one is told at once, a dying one is waited for."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from understudyd.shell.lock import AlreadyRunning, DaemonLock, locked

FOREVER_S = 600.0
WAITING = "still gives its memory back"


@contextmanager
def process() -> Iterator[subprocess.Popen[bytes]]:
    """One that waits for its end, and is reaped here and nowhere before."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        yield child
        child.kill()


def held_by(pid: int, runtime_dir: Path) -> DaemonLock:
    """The lock as the process would hold it. Ours is the only descriptor, so that we say when it is free."""
    lock = DaemonLock(runtime_dir / "understudyd.lock", "here", "go elsewhere")
    (runtime_dir / "understudyd.lock").write_text(f"{pid}\n")
    return lock


async def told_to_wait(caplog: pytest.LogCaptureFixture) -> None:
    async with asyncio.timeout(60):
        while WAITING not in caplog.text:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("is_reaped", [False, True])
def test_a_dying_daemon_is_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, is_reaped: bool
) -> None:
    async def scenario(lock: DaemonLock) -> None:
        async def serve() -> None:
            async with locked(tmp_path, (), FOREVER_S):
                pass

        serving = asyncio.create_task(serve())
        await told_to_wait(caplog)
        assert not serving.done()
        lock.close()  # as the kernel does when the memory is gone
        async with asyncio.timeout(60):
            await serving

    caplog.set_level("INFO")
    with process() as dying:
        dying.kill()
        os.waitid(os.P_PID, dying.pid, os.WEXITED | (0 if is_reaped else os.WNOWAIT))
        asyncio.run(scenario(held_by(dying.pid, tmp_path)))
    assert caplog.text.count(WAITING) == 1 and f"pid {dying.pid}" in caplog.text


def test_a_daemon_that_cannot_end_is_told_after_a_while(tmp_path: Path) -> None:
    async def serve() -> None:
        async with locked(tmp_path, (), patience_s=0.1):
            raise AssertionError("it is locked")

    with process() as dying:
        dying.kill()
        os.waitid(os.P_PID, dying.pid, os.WEXITED | os.WNOWAIT)
        lock = held_by(dying.pid, tmp_path)
        with pytest.raises(AlreadyRunning, match=f"pid {dying.pid}"):
            asyncio.run(serve())
        lock.close()


def test_a_living_daemon_is_told_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """However patient we are."""

    async def serve() -> None:
        async with asyncio.timeout(60), locked(tmp_path, (), FOREVER_S):
            raise AssertionError("it is locked")

    caplog.set_level("INFO")
    with process() as living:
        lock = held_by(living.pid, tmp_path)
        with pytest.raises(
            AlreadyRunning, match=f"a daemon with pid {living.pid}.* serves {tmp_path} already"
        ):
            asyncio.run(serve())
        lock.close()
    assert WAITING not in caplog.text


def test_the_locks_of_endpoints_are_as_patient(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/x.sock"
    path = Path(f"{tmp_path}/x.sock.lock")

    async def serve() -> None:
        async with locked(tmp_path, (endpoint,), FOREVER_S):
            with pytest.raises(AlreadyRunning, match=f"pid {os.getpid()}"):
                DaemonLock(path, "here", "go elsewhere")

    asyncio.run(serve())
    DaemonLock(path, "here", "go elsewhere").close()

"""The event loop hangs while everything else lives: the service manager is told nothing more, and ends it.

Only the daemon's main thread is stopped, as a debugger stops one (ptrace(2)).
"""

import asyncio
import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from benchmarks.manager import Manager, managed

import understudy
from daemon_kit import configuration
from family_kit import Family, pixels

WATCHDOG_S = 2.0
PROMPT = "a red circle on blue"
OPTIONS: dict[str, Any] = {"seed": 7, "steps": 8, "width": 32, "height": 32}
REFERENCE = {"prompt": PROMPT, "seed": 7, "num_inference_steps": 8, "width": 32, "height": 32}
ATTACH, DETACH, ALL_CHILDREN = 16, 17, 0x40000000  # ptrace.h, wait.h


@contextlib.contextmanager
def stopped_thread(thread_id: int) -> Iterator[None]:
    """This thread of a descendant does not run meanwhile; the others do."""
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    if ptrace(ATTACH, thread_id, None, None) != 0:
        pytest.skip(f"this machine lets us stop no thread: {os.strerror(ctypes.get_errno())}")
    os.waitpid(thread_id, ALL_CHILDREN)
    try:
        yield
    finally:
        ptrace(DETACH, thread_id, None, None)  # in vain when the process has ended


def test_a_hung_event_loop(family: Family, tmp_path: Path) -> None:
    """No more signs of life; what the manager then does leaves tracebacks, no loader, and no request."""
    config = tmp_path / "understudyd.toml"
    config.write_text(configuration(family.store, tmp_path / "run", stage={"warm_up": False}))
    environ = {"OMP_NUM_THREADS": "1", "WATCHDOG_USEC": str(int(WATCHDOG_S * 1e6))}
    with managed(config, tmp_path / "run", tmp_path / "manager", environ) as manager:
        manager.start()
        manager.wait_for("READY=1")
        result = asyncio.run(hung(manager))
    assert [pixels(image) for image in result.images] == family.reference("sd-a", **REFERENCE)


async def hung(manager: Manager) -> understudy.Result:
    """What a client gets that asks while the daemon hangs."""
    life = manager.life
    assert life is not None
    daemon = psutil.Process(life.process.pid)
    loaders = daemon.children(recursive=True)
    assert loaders
    async with understudy.AsyncClient(endpoint=manager.endpoint) as client:
        await client.generate("sd-b", PROMPT, **OPTIONS)

        def signs_of_life() -> int:
            return life.notices.count("WATCHDOG=1")

        with stopped_thread(daemon.pid):
            seen = signs_of_life()
            handle = await client.submit("sd-a", PROMPT, **OPTIONS)
            with pytest.raises(TimeoutError):
                manager.wait_until(lambda: signs_of_life() > seen + 1, timeout_s=2 * WATCHDOG_S)
            assert manager.kill(signal.SIGABRT) == -signal.SIGABRT
        assert "Thread 0x" in manager.last_words(lines=400)
        assert not psutil.wait_procs(loaders, timeout=5.0)[1]
        manager.start()
        return await handle.result()

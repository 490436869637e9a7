"""A service manager that reads nothing must not hold the daemon up."""

import socket
import time
from pathlib import Path

from understudyd.shell.notify import notify


def test_a_manager_that_reads_nothing_is_not_waited_for(tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        started_s = time.monotonic()
        sent = [
            notify(f"STATUS={i}", address=address) for i in range(2000) if time.monotonic() < started_s + 5
        ]
        assert not all(sent), "its queue is full"
        last_s = time.monotonic()
        assert not notify("WATCHDOG=1", address=address)
        assert time.monotonic() - last_s < 1.0
        manager.recv(4096)
        assert notify("WATCHDOG=1", address=address), "and goes on when it reads again"

"""The service manager's side door: descriptors that it keeps, and how long it waits for a sign of life."""

import os
import socket
import threading
from pathlib import Path

from understudyd.shell.notify import ServiceManager


def test_descriptors_come_by_name_and_are_not_for_children() -> None:
    """They lie from 3 on, where this process has others: so the manager's count is none here."""
    environ = {"LISTEN_PID": "1", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b", "WATCHDOG_USEC": "5000000"}
    manager = ServiceManager.found(environ)
    assert manager.take("a") is None, "they are another process's"
    assert environ == {"WATCHDOG_USEC": "5000000"} and manager.watchdog_s == 5.0


def test_no_manager_no_watchdog() -> None:
    manager = ServiceManager.found({})
    assert manager.watchdog_s is None and not manager.notify("READY=1") and not manager.keep("a", 0)
    manager.forget("a")
    assert ServiceManager.found({"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}).watchdog_s is None
    assert ServiceManager.found({"WATCHDOG_USEC": "0"}).watchdog_s is None


def test_a_descriptor_is_taken_once() -> None:
    manager = ServiceManager(kept={"a": 17})
    assert manager.take("a") == 17 and manager.take("a") is None


def test_what_is_kept_and_forgotten_travels_in_order(tmp_path: Path) -> None:
    """`forget` returns when the manager has read everything before its barrier."""
    heard: list[str] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))

        def listen() -> None:
            for _ in range(4):
                packet, fds, _, _ = socket.recv_fds(sock, 4096, 4)
                heard.append(f"{packet.decode()} with {len(fds)}")
                for fd in fds:
                    os.close(fd)

        thread = threading.Thread(target=listen)
        thread.start()
        manager = ServiceManager(str(tmp_path / "notify"))
        fd = os.memfd_create("kept")
        assert manager.keep("a", fd)
        os.close(fd)
        manager.forget("a", "b")
        assert len(heard) == 4
        thread.join()
    assert heard == [
        "FDSTORE=1\nFDNAME=a with 1",
        "FDSTOREREMOVE=1\nFDNAME=a with 0",
        "FDSTOREREMOVE=1\nFDNAME=b with 0",
        "BARRIER=1 with 1",
    ]

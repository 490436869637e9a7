"""Signs of life: the watchdog, the status line, and when they stop."""

import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from core_kit import World, by_hand
from understudyd.core import events as ev
from understudyd.shell.notify import ServiceManager
from understudyd.shell.pulse import Pulse, status_line
from understudyd.shell.tally import Tally


class Listener:
    """Hears what a service manager would."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.sock.bind(str(path))
        self.manager = ServiceManager(str(path), watchdog_s=10.0)

    def heard(self) -> list[str]:
        found = []
        while True:
            try:
                found.append(self.sock.recv(4096).decode())
            except BlockingIOError:
                return found


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    made = Listener(tmp_path / "notify")
    yield made
    made.sock.close()


class Kept:
    written = 0

    def write(self, machine: object) -> None:
        self.written += 1


def runtime_over(world: World, **pending: Any) -> Any:
    return SimpleNamespace(machine=world.machine, pending=pending, tally=Tally(), stage_moved_at_s=0.0)


def test_a_stage_that_makes_no_step_lets_the_watchdog_bark(listener: Listener) -> None:
    world = by_hand(4, ("a", 1))
    world.make_resident("a")
    runtime, kept = runtime_over(world), Kept()
    now = SimpleNamespace(s=100.0)
    pulse = Pulse(listener.manager, runtime, kept, stalled_after_s=5.0, clock=lambda: now.s)  # type: ignore[arg-type]
    pulse.beat()
    assert listener.heard()[0] == "WATCHDOG=1", "idle for long, but nothing runs"
    world.tell(ev.RunStarted(world.ask("a")))
    runtime.stage_moved_at_s = 100.0
    now.s = 104.0
    pulse.beat()
    assert "WATCHDOG=1" in listener.heard()
    now.s = 106.0
    pulse.beat()
    assert "WATCHDOG=1" not in listener.heard()
    runtime.stage_moved_at_s = 106.0  # a step after all
    pulse.beat()
    assert "WATCHDOG=1" in listener.heard()


def test_what_is_worth_knowing_is_written_down_when_it_changes(listener: Listener) -> None:
    world = by_hand(4, ("a", 1))
    kept = Kept()
    pulse = Pulse(listener.manager, runtime_over(world), kept, stalled_after_s=5.0)  # type: ignore[arg-type]
    for _ in range(3):
        pulse.beat()
    assert kept.written == 1
    world.ask("a")
    pulse.beat()
    assert kept.written == 2
    assert len([said for said in listener.heard() if said.startswith("STATUS=")]) == 2, "only when it changes"


def test_a_manager_that_does_not_read_is_waited_for_by_no_beat(listener: Listener) -> None:
    """The event loop would stand still for as long, every second."""
    world = by_hand(4, ("a", 1))
    pulse = Pulse(listener.manager, runtime_over(world), Kept(), stalled_after_s=5.0)  # type: ignore[arg-type]
    while listener.manager.notify("WATCHDOG=1", patience_s=0):
        pass
    patience_s = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            socket.socket,
            "settimeout",
            lambda sock, value: patience_s.append(value) or sock.setblocking(False),
        )
        pulse.beat()
    assert patience_s == [0, 0]
    listener.heard()
    pulse.beat()
    assert listener.heard()[1].startswith("STATUS="), "what it did not take is said again"


def test_the_status_line_is_for_people() -> None:
    world = by_hand(4, ("a", 1), ("b", 1))
    world.make_resident("a")
    runtime = runtime_over(world)
    assert status_line(runtime) == "serving: 1 of 2 models resident; 0 requests wait"
    request = world.ask("a")
    world.tell(ev.RunStarted(request))
    world.ask("b")
    runtime.pending[request] = SimpleNamespace(step=3, steps=20)
    runtime.tally.failure("out_of_memory", "too\nlarge")
    for mistake in ("bad_request", "unknown_model", "unknown_adapter", "queue_full", "deadline_exceeded"):
        runtime.tally.failure(mistake, "not the daemon's fault")
    world.tell(ev.AdmissionChanged(is_open=False))
    assert status_line(runtime) == (
        "taking no requests: 1 of 2 models resident; 1 requests wait; running a, step 3 of 20; "
        "last error: out_of_memory: too large"
    )

"""Messages that never end, and connections without number: real sockets, real memory."""

import contextlib
from pathlib import Path

from understudy.wire import Accepted, Finished, InputInfo
from understudyd.shell.flood_guard import FloodGuard, private_bytes
from understudyd.shell.input_limits import InputLimits
from understudyd.shell.limits import Limits
from wire_kit import Dealer, FakeSink, Served, accepts, ipc, request, serving
from zmtp_kit import BarePeer

MIB = 2**20


def guard_of(served: Served) -> FloodGuard:
    router = served.frontend._router
    assert router is not None
    return router._guard


def flood(endpoint: str, most: int = 1500) -> None:
    """Frames of 1 MiB of one message, until the connection is cut."""
    with BarePeer(endpoint) as hostile, contextlib.suppress(ConnectionError):
        for _ in range(most):
            hostile.send_frame(b"x" * MIB, is_last=False)
        raise AssertionError("it was never cut off")


def test_a_message_without_end_is_cut_off_and_others_are_served(tmp_path: Path) -> None:
    with (
        serving(ipc(tmp_path), flood_bytes=32 * MIB) as served,
        Dealer(served.endpoint, b"good") as good,
    ):
        good.send(request("before"))
        good.receive_until(Finished)
        before = private_bytes()
        for round in (1, 2, 3):
            flood(served.endpoint)
            served.until(lambda expected=round: guard_of(served).cut_off == expected)
            served.until(lambda: guard_of(served).connections == 1)
        # What is free again may stay with the process, once and not for each of them.
        assert private_bytes() - before < 1200 * MIB
        good.send(request("after"))
        assert good.receive_until(Finished).id == "after"
        assert [wish.id for _, wish in served.sink.submitted] == ["before", "after"]


def test_large_requests_that_wait_are_no_flood(tmp_path: Path) -> None:
    """Their bytes are accounted for, however long they wait."""
    limits = Limits(
        max_open_input_bytes=1024 * MIB,
        inputs=InputLimits(max_pixels=4096 * 4096, max_total_bytes=64 * MIB),
    )
    image = InputInfo(name="image", format="raw", width=2048, height=2048, channels=3)
    with (
        serving(ipc(tmp_path), FakeSink(accepts), limits=limits, flood_bytes=64 * MIB) as served,
        Dealer(served.endpoint) as dealer,
    ):
        for i in range(12):  # one by one: what this process has yet to send is counted with the front end's
            dealer.send(request(f"r{i}", inputs=(image,)), bytes(2048 * 2048 * 3))
            dealer.receive_until(Accepted)
        assert served.frontend._input_room.held_bytes == 12 * 12 * MIB
        assert guard_of(served).cut_off == 0


def test_connections_are_bounded_and_make_room_when_they_go(tmp_path: Path) -> None:
    with serving(ipc(tmp_path), limits=Limits(max_connections=3)) as served:
        guard = guard_of(served)
        with contextlib.ExitStack() as peers:
            kept = [peers.enter_context(BarePeer(served.endpoint, b"%d" % i)) for i in range(3)]
            served.until(lambda: guard.connections == 3)
            with BarePeer(served.endpoint, b"extra") as extra:
                assert extra.is_shut()
            served.until(lambda: guard.connections == 3)
            assert guard.cut_off == 1
            kept[0].socket.close()
            served.until(lambda: guard.connections == 2)
            with Dealer(served.endpoint, b"good") as good:
                good.send(request())
                assert good.receive_until(Finished).id == "r1"
        served.until(lambda: guard.connections == 0)
        served.call(lambda: served.frontend.change_limits(Limits(max_connections=1)))
        with BarePeer(served.endpoint, b"one"), BarePeer(served.endpoint, b"two") as two:
            assert two.is_shut()


class Fake:
    """A guard over real connections with memory and time as the test says."""

    def __init__(self, served: Served) -> None:
        self.own_bytes, self.now_s = 1000, 0.0
        self.guard = guard = guard_of(served)
        guard._own_bytes, guard._clock = lambda: self.own_bytes, lambda: self.now_s
        guard._explained_bytes, guard._budget_bytes, guard._floor_bytes = lambda: 0, 100, 1000

    def look(self) -> None:
        self.now_s += 0.05
        self.guard.look()


def test_memory_that_grows_while_nobody_sends_is_nobodys_fault(tmp_path: Path) -> None:
    with serving(ipc(tmp_path)) as served, BarePeer(served.endpoint) as peer:
        served.until(lambda: guard_of(served).connections == 1)

        def grow() -> None:
            fake = Fake(served)
            for _ in range(50):
                fake.own_bytes += 50
                fake.look()
            assert fake.guard.cut_off == 0 and fake.guard._floor_bytes == fake.own_bytes
            connection = next(iter(fake.guard._open.values()))
            connection.busy_at_s, connection.busy = fake.now_s, 0.5
            fake.own_bytes += 101
            fake.look()
            assert fake.guard.cut_off == 1
            fake.look()
            assert fake.guard.cut_off == 1, "once, until it has grown again"

        served.call(grow)
        assert peer.is_shut()


def test_the_busiest_are_cut_and_others_are_not(tmp_path: Path) -> None:
    with (
        serving(ipc(tmp_path)) as served,
        BarePeer(served.endpoint, b"a") as busy,
        BarePeer(served.endpoint, b"b"),
        BarePeer(served.endpoint, b"c"),
    ):
        served.until(lambda: guard_of(served).connections == 3)

        def grow() -> None:
            fake = Fake(served)
            first, second, _ = fake.guard._open.values()
            first.busy, first.busy_at_s = 0.9, 0.0
            second.busy, second.busy_at_s = 0.2, 0.0
            fake.own_bytes += 200
            fake.look()
            assert fake.guard.cut_off == 1

        served.call(grow)
        assert busy.is_shut()
        served.until(lambda: guard_of(served).connections == 2)

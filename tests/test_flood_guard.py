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


def test_a_message_without_end_is_cut_off_and_others_are_served(tmp_path: Path) -> None:
    chunk, most = b"x" * MIB, 1500
    with (
        serving(ipc(tmp_path), limits=Limits(flood_bytes=32 * MIB)) as served,
        Dealer(served.endpoint, b"good") as good,
        BarePeer(served.endpoint) as hostile,
    ):
        good.send(request("before"))
        good.receive_until(Finished)
        before, peak, sent = private_bytes(), 0, 0
        with contextlib.suppress(ConnectionError):
            for sent in range(most):  # noqa: B007  how many got through
                hostile.send_frame(chunk, is_last=False)
                peak = max(peak, private_bytes() - before)
        assert sent < most - 1, "it was cut off"
        assert peak < 900 * MIB
        served.until(lambda: guard_of(served).cut_off == 1)
        served.until(lambda: private_bytes() - before < 64 * MIB)
        good.send(request("after"))
        assert good.receive_until(Finished).id == "after"
        assert [wish.id for _, wish in served.sink.submitted] == ["before", "after"]


def test_large_requests_that_wait_are_no_flood(tmp_path: Path) -> None:
    """Their bytes are accounted for, however long they wait."""
    limits = Limits(
        flood_bytes=32 * MIB,
        max_open_input_bytes=1024 * MIB,
        inputs=InputLimits(max_pixels=4096 * 4096, max_total_bytes=64 * MIB),
    )
    image = InputInfo(name="image", format="raw", width=2048, height=2048, channels=3)
    with (
        serving(ipc(tmp_path), FakeSink(accepts), limits=limits) as served,
        Dealer(served.endpoint) as dealer,
    ):
        for i in range(12):
            dealer.send(request(f"r{i}", inputs=(image,)), bytes(2048 * 2048 * 3))
        for _ in range(12):
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

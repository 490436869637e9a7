"""Floods at the clients' door: what they cost is bounded, and others are served beside them. Real sockets."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from understudy.wire import Finished, ListModels, Ping, encode
from understudyd.shell.outbox import MAX_TALK_BYTES, Outbox
from understudyd.shell.router import MAX_REST_S, MESSAGES_PER_TURN, Router
from wire_kit import Dealer, ipc, request, serving


def test_talk_that_nobody_reads_is_bounded_and_answers_are_not_talk() -> None:
    box = Outbox(10**9, 60.0, max_talk_bytes=10_000)
    for i in range(1000):
        box.put_notice(f"n{i}", (b"x" * 100,), 0.0)
        box.put_hint(f"p{i}", "pong", (b"x" * 100,), 0.0)
    assert box.size_bytes <= 10_000
    box.put_answer("a", (), (b"image" * 10_000,), 0.0)
    sent = []
    while (head := box.head) is not None:
        sent.append(head)
        box.sent(0.0)
    assert (b"image" * 10_000,) in sent
    box.put_notice("n", (b"x" * 100,), 0.0)
    assert box.head == (b"x" * 100,), "room again for who reads again"
    box.sent(0.0)
    box.put_notice("a long list", (b"x" * 20_000,), 0.0)
    assert box.head is not None, "what alone is more than all the room gets through"


def test_questions_without_end_whose_answers_nobody_reads(tmp_path: Path) -> None:
    with (
        serving(ipc(tmp_path)) as served,
        Dealer(served.endpoint, b"deaf", receive_high_water_mark=1) as deaf,
        Dealer(served.endpoint, b"good") as good,
    ):
        served.sink.entries *= 500
        for i in range(5000):
            deaf.send(Ping(id=f"p{i}") if i % 2 else ListModels(id=f"l{i}"))
        served.until(lambda: served.frontend.counters.received == 5000)
        held = served.call(lambda: sum(c.outbox.size_bytes for c in served.frontend._by_name.values()))
        assert held <= 1.5 * MAX_TALK_BYTES
        good.send(request("after"))
        assert good.receive_until(Finished).id == "after"


def computes(seconds: float) -> None:
    until_s = time.thread_time() + seconds
    while time.thread_time() < until_s:
        pass


@pytest.mark.parametrize("message_s", [2e-4, 5e-3])
def test_after_a_full_drain_the_socket_rests_thrice_as_long_as_it_computed(
    tmp_path: Path, message_s: float
) -> None:
    rests_s: list[float] = []
    heard: list[bytes] = []

    def hear(identity: bytes, frames: list[bytes], user: str) -> None:
        heard.append(frames[0])
        computes(message_s)

    async def scene() -> None:
        loop = asyncio.get_running_loop()
        real = loop.call_later

        def call_later(delay_s: float, callback: Any, *arguments: Any) -> asyncio.TimerHandle:
            if getattr(callback, "__name__", "") == "_drain":
                rests_s.append(delay_s)
            return real(delay_s, callback, *arguments)

        loop.call_later = call_later  # type: ignore[method-assign]
        router = Router(
            loop, [ipc(tmp_path)], hear, lambda: None,
            max_payload_frames=1, max_frame_bytes=1000, send_high_water_mark=10, receive_high_water_mark=1000,
        )  # fmt: skip
        with Dealer(ipc(tmp_path)) as dealer:
            for _ in range(5 * MESSAGES_PER_TURN):
                dealer.send(b"x")
            async with asyncio.timeout(15):
                while len(heard) < 5 * MESSAGES_PER_TURN:
                    await asyncio.sleep(0.01)
                assert max(rests_s) == pytest.approx(
                    min(MAX_REST_S, 3 * MESSAGES_PER_TURN * message_s), rel=0.5
                )
                rests_s.clear()
                dealer.send(b"alone")
                while heard[-1] != b"alone":
                    await asyncio.sleep(0.01)
            assert not any(rests_s), "what comes alone is heard at once, and no rest follows"
        router.close()

    asyncio.run(scene())


def test_the_socket_is_heard_again_after_a_rest(tmp_path: Path) -> None:
    """Edges that come while it rests are not lost: after the burst all is read without another message."""
    with serving(ipc(tmp_path)) as served, Dealer(served.endpoint) as dealer:
        for burst in range(5):
            for i in range(3 * MESSAGES_PER_TURN + burst):
                dealer.send(Ping(id=f"p{burst}-{i}"))
        total = sum(3 * MESSAGES_PER_TURN + burst for burst in range(5))
        served.until(lambda: served.frontend.counters.received == total)


def test_what_a_client_left_behind_does_not_fill_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with serving(ipc(tmp_path)) as served:
        with Dealer(served.endpoint, b"hasty") as hasty:
            hasty.socket.setsockopt(17, 2000)  # LINGER: what was sent still leaves
            for _ in range(500):
                hasty.send(b"\xc1")
        served.until(lambda: served.frontend.counters.received == 500)
        served.until(lambda: served.frontend.clients == 0, lambda: served.call(served.frontend.sweep))
    gone = [record for record in caplog.records if "is gone" in record.getMessage()]
    assert not gone


def test_names_for_people_do_not_give_a_routing_id_away(tmp_path: Path) -> None:
    secret = b"0123456789abcdef0123456789abcdef"
    with serving(ipc(tmp_path)) as served, Dealer(served.endpoint, secret) as dealer:
        dealer.send(encode(request()))
        dealer.receive_until(Finished)
        assert served.sink.submitted[0][0].startswith("01234567#")


def test_a_loop_can_be_closed_while_the_socket_rests(tmp_path: Path) -> None:
    with (
        Dealer(ipc(tmp_path)) as dealer,
        serving(ipc(tmp_path), new_loop=asyncio.new_event_loop) as served,
    ):
        for _ in range(20 * MESSAGES_PER_TURN):
            dealer.send(b"\xc1")
        served.until(lambda: served.frontend.counters.received > MESSAGES_PER_TURN)

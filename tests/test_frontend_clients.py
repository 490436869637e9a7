"""Clients that do not read, fall silent or die: what the front end keeps for them, and when it lets go."""

from pathlib import Path
from typing import Any

from understudy.wire import Accepted, Failed, Finished, Ping, Pong, Progress
from understudyd.shell.limits import Limits
from wire_kit import Dealer, FakeSink, accepts, finished, ipc, request, serving


def test_a_client_that_never_reads_is_held_to_its_cap_and_then_expired(tmp_path: Path) -> None:
    limits = Limits(outbox_bytes=300_000, client_timeout_s=1.0, send_high_water_mark=2)
    big = [b"x" * 100_000]

    def paints(sink: FakeSink, client: str, wish: Any) -> None:
        sink.reply(client, *finished(wish, big))

    with (
        serving(ipc(tmp_path), FakeSink(paints), limits=limits) as served,
        Dealer(served.endpoint, b"deaf", receive_high_water_mark=1) as deaf,
    ):
        for i in range(60):
            deaf.send(request(f"r{i}"))
        served.sink.wait_for(lambda sink: len(sink.submitted) == 60)
        assert served.call(lambda: served.frontend.counters.answers_lost) > 0
        held = served.call(lambda: [c.outbox.size_bytes for c in served.frontend._by_name.values()])
        assert all(size <= 300_000 for size in held)
        with Dealer(served.endpoint, b"good") as good:
            good.send(request("after"))
            assert good.receive_until(Finished).id == "after"
        # It talks, so only its not reading can expire it.
        served.until(lambda: served.frontend.counters.clients_gone > 0, lambda: deaf.send(Ping(id="here")))


def test_a_lost_answer_is_answered_with_a_typed_error(tmp_path: Path) -> None:
    limits = Limits(outbox_bytes=150_000, client_timeout_s=60, send_high_water_mark=1)

    def paints(sink: FakeSink, client: str, wish: Any) -> None:
        sink.reply(client, *finished(wish, [b"x" * 100_000]))

    with (
        serving(ipc(tmp_path), FakeSink(paints), limits=limits) as served,
        Dealer(served.endpoint, b"slow", receive_high_water_mark=1) as slow,
    ):
        names = {f"r{i}" for i in range(80)}
        for name in sorted(names):
            slow.send(request(name))
        served.sink.wait_for(lambda sink: len(sink.submitted) == 80)
        answers = [slow.receive() for _ in names]
        assert {answer.id for answer in answers} == names  # exactly one each
        failed = [answer for answer in answers if isinstance(answer, Failed)]
        assert failed and all(f.code == "queue_full" and f.retryable for f in failed)
        assert any(isinstance(answer, Finished) for answer in answers)


def test_progress_is_coalesced_for_a_client_that_reads_late(tmp_path: Path) -> None:
    limits = Limits(send_high_water_mark=1)
    with (
        serving(ipc(tmp_path), FakeSink(accepts), limits=limits) as served,
        Dealer(served.endpoint, receive_high_water_mark=1) as dealer,
    ):
        dealer.send(request())
        served.sink.wait_for(lambda sink: bool(sink.submitted))
        client, wish = served.sink.submitted[0]
        many = 20_000

        def run() -> None:
            for step in range(1, many + 1):
                served.sink.reply(client, Progress(id="r1", step=step, steps=many))

        served.call(run)
        assert served.call(lambda: served.frontend.unsent) <= 2  # one accepted, one progress
        seen = [dealer.receive_until(Progress).step]
        while seen[-1] < many:
            seen.append(dealer.receive_until(Progress).step)
        assert seen == sorted(seen) and len(seen) < many
        served.call(lambda: served.sink.finish(client, wish))
        assert isinstance(dealer.receive(), Finished)


def test_a_client_that_closed_is_gone_with_the_next_progress(tmp_path: Path) -> None:
    with serving(ipc(tmp_path), FakeSink(accepts)) as served:
        with Dealer(served.endpoint) as dealer:
            dealer.send(request())
            dealer.receive_until(Accepted)
        client = served.sink.submitted[0][0]
        served.until(lambda: bool(served.sink.gone), lambda: served.progress(client, "r1"))
        assert served.sink.gone == [client]


def test_a_silent_client_with_an_open_request_expires_and_a_talking_one_does_not(tmp_path: Path) -> None:
    limits = Limits(client_timeout_s=0.4)
    with (
        serving(ipc(tmp_path), FakeSink(accepts), limits=limits) as served,
        Dealer(served.endpoint, b"silent") as silent,
        Dealer(served.endpoint, b"alive") as alive,
    ):

        def talk() -> None:  # and listen: who reads nothing goes, too
            alive.send(Ping(id="p"))
            alive.receive_until(Pong)

        silent.send(request("s"))
        alive.send(request("a"))
        served.until(lambda: bool(served.sink.gone), talk)
        assert [name.partition("#")[0] for name in served.sink.gone] == ["silent"]
        # The same id runs anew under another name, and the old one's answer does not reach it.
        silent.send(request("s", seed=8))
        served.sink.wait_for(lambda sink: len(sink.submitted) == 3)
        old, new = (client for client, wish in served.sink.submitted if wish.id == "s")
        assert old != new
        served.call(lambda: served.sink.reply(old, Failed(id="s", code="client_gone", message="")))
        served.call(lambda: served.sink.finish(new, served.sink.submitted[2][1]))
        assert silent.receive_until(Finished).seed == 8


def test_a_stall_of_the_daemons_own_loop_expires_nobody(tmp_path: Path) -> None:
    now = [0.0]

    def sweep_at(seconds: float) -> None:
        now[0] = seconds
        served.frontend.sweep()

    sink = FakeSink(accepts)
    limits = Limits(client_timeout_s=1000)
    with (
        serving(ipc(tmp_path), sink, limits=limits, clock=lambda: now[0]) as served,
        Dealer(served.endpoint) as dealer,
    ):
        dealer.send(request())
        dealer.receive_until(Accepted)
        served.call(lambda: sweep_at(1400))  # the loop stood still; its backlog is unread
        assert served.frontend.clients == 1
        dealer.send(Ping(id="p"))
        dealer.receive_until(Pong)
        for seconds in (1800, 2200):
            served.call(lambda at=seconds: sweep_at(at))
        assert served.frontend.clients == 1
        served.call(lambda: sweep_at(2500))  # now it is the client that was silent
        sink.wait_for(lambda sink: len(sink.gone) == 1)

"""The front end over real ZeroMQ: what it accepts, refuses, repeats, and survives."""

import asyncio
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvloop

from understudy.wire import (
    PROTOCOL_VERSION,
    Accepted,
    Cancel,
    Failed,
    Finished,
    ListModels,
    ModelEntry,
    ModelList,
    Ping,
    Pong,
    decode_entries,
)
from understudyd.shell.endpoints import EndpointError, check_endpoint
from understudyd.shell.limits import Limits
from wire_kit import Dealer, FakeSink, Served, accepts, finished, image_of, ipc, request, serving


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def served(request: Any, tmp_path: Path) -> Iterator[Served]:
    with serving(ipc(tmp_path), new_loop=request.param) as served:
        yield served


@pytest.fixture
def dealer(served: Served) -> Iterator[Dealer]:
    with Dealer(served.endpoint) as dealer:
        yield dealer


def serves_on(dealer: Dealer) -> None:
    dealer.send(request("after", images=1))
    assert dealer.receive_until(Finished).id == "after"


def test_a_request_is_accepted_shows_progress_and_is_answered(dealer: Dealer) -> None:
    wish = request(images=2, steps=1)
    dealer.send(wish)
    dealer.send(Ping(id="p"))
    replies: dict[type, Any] = {}
    for _ in range(2):
        reply, payload = dealer.receive_all()
        replies[type(reply)] = (reply, payload)
        if isinstance(reply, Finished):
            assert payload == [image_of(wish, 0), image_of(wish, 1)]
    # accepted and progress were still unsent or had gone, but the answer and the pong must come
    while not {Finished, Pong} <= set(replies):
        reply, payload = dealer.receive_all()
        replies[type(reply)] = (reply, payload)
    assert replies[Finished][0].seed == 7
    assert replies[Pong][0].daemon == "daemon-1"


def test_the_model_list_travels_as_payload_however_long(served: Served, dealer: Dealer) -> None:
    served.sink.entries = [
        ModelEntry(name=f"m{i}" + "x" * 200, pipeline="P", size_bytes=i, tier="disk") for i in range(1500)
    ]
    dealer.send(ListModels(id="l"))
    reply, payload = dealer.receive_all()
    assert isinstance(reply, ModelList) and reply.id == "l"
    assert [e for frame in payload for e in decode_entries(frame)] == served.sink.entries


BAD_FIELDS = [
    ({"width": 100}, "multiple of 8"),
    ({"height": 0}, "multiple of 8"),
    ({"width": -64}, "multiple of 8"),
    ({"width": 65536, "height": 65536}, "limit is"),
    ({"steps": -5}, "steps is -5"),
    ({"steps": 0}, "1 to"),
    ({"steps": 10**6}, "1 to"),
    ({"images": 0}, "images is 0"),
    ({"images": 10**18}, "1 to"),
    ({"guidance": float("nan")}, "guidance"),
    ({"guidance": float("inf")}, "guidance"),
    ({"guidance": -1.0}, "guidance"),
    ({"seed": -1}, "seed is -1"),
    ({"seed": 2**63}, "seed"),
    ({"deadline_s": 0.0}, "deadline_s"),
    ({"deadline_s": -3.0}, "deadline_s"),
    ({"deadline_s": float("nan")}, "deadline_s"),
    ({"deadline_s": float("inf")}, "deadline_s"),
    ({"priority": 101}, "priority"),
    ({"format": "bmp"}, "png"),
    ({"model": ""}, "list_models"),
    ({"model": "m" * 257}, "list_models"),
    ({"prompt": "p" * 8193}, "shorten"),
    ({"negative_prompt": "p" * 8193}, "negative_prompt"),
    ({"task": "Paint!"}, "inpainting"),
    ({"task": "x" * 65}, "inpainting"),
    ({"scheduler": ""}, "class name"),
    ({"scheduler": "../x"}, "class name"),
    ({"format": "webp", "quality": 0}, "1 to 100"),
    ({"format": "jpeg", "quality": 101}, "1 to 100"),
    ({"format": "png", "quality": 90}, "leave it out"),
    ({"options": {"eta": float("nan")}}, "finite"),
    ({"options": {"sigmas": [1.0, float("inf")]}}, "finite"),
    ({"options": {"not a name": 1}}, "argument's name"),
    ({"options": {"x" * 65: 1}}, "argument's name"),
    ({"options": {f"x{i}": i for i in range(65)}}, "65 options"),
    ({"options": {"timesteps": list(range(501))}}, "501 items"),
    ({"options": {"prompt_2": "p" * 8193}}, "shorten"),
    ({"options": {"prompts": ["p", "p" * 8193]}}, "shorten"),
]


@pytest.mark.parametrize(("fields", "says"), BAD_FIELDS, ids=[str(f)[:40] for f, _ in BAD_FIELDS])
def test_a_field_out_of_bounds_is_refused_before_the_sink(
    tmp_path: Path, fields: dict[str, Any], says: str
) -> None:
    with serving(ipc(tmp_path)) as served, Dealer(served.endpoint) as dealer:
        dealer.send(request(**fields))
        reply = dealer.receive()
        assert isinstance(reply, Failed) and (reply.id, reply.code) == ("r1", "bad_request")
        assert says in reply.message and not reply.retryable
        assert served.sink.submitted == []
        serves_on(dealer)


def header(**fields: Any) -> bytes:
    whole = {"type": "generate", "v": 1, "id": "r1", "model": "m", "prompt": "p", "seed": 1} | fields
    return msgspec.msgpack.encode(whole)


UNREADABLE = {
    "prompt that is not text": (header(prompt=5), "r1", "bad_request", "str"),
    "prompt of broken UTF-8": (header(prompt="pp").replace(b"pp", b"\xff\xfe"), "r1", "bad_request", "utf-8"),
    "steps that are text": (header(steps="20"), "r1", "bad_request", "int"),
    "no model": (header(model=None), "r1", "bad_request", "str"),
    "unknown kind": (header(type="paint"), "r1", "bad_request", "paint"),
    "version of the future": (header(v=PROTOCOL_VERSION + 1), "r1", "unsupported_version", "install"),
    "version that is text": (header(v="x"), "r1", "unsupported_version", "install"),
    "id that is a number": (header(id=7), "", "bad_request", "str"),
    "id with a slash": (header(id="../x"), "", "bad_request", "characters"),
    "id that is empty": (header(id=""), "", "bad_request", "characters"),
    "id that is long": (header(id="x" * 65), "", "bad_request", "characters"),
    "no msgpack": (b"\xc1garbage", "", "bad_request", "msgpack"),
    "nothing": (b"", "", "bad_request", "msgpack"),
    "deep nesting": (b"\x91" * 60_000, "", "bad_request", "msgpack"),
    "deep nesting inside": (b"\x81\xa1x" + b"\x91" * 50_000, "", "bad_request", "msgpack"),
    "options that nest": (header(options={"x": [[1]]}), "r1", "bad_request", "options"),
    "options that are a map": (header(options={"x": {"y": 1}}), "r1", "bad_request", "options"),
    "options of bytes": (header(options={"x": b"y"}), "r1", "bad_request", "options"),
    "an option without a name": (header(options={1: 1}), "r1", "bad_request", "options"),
    "inputs that are no list": (header(inputs=5), "r1", "bad_request", "inputs"),
    "an input without a size": (header(inputs=[{"name": "image"}]), "r1", "bad_request", "inputs"),
    "an array": (msgspec.msgpack.encode([1, 2]), "", "bad_request", "msgpack"),
    "a header of 65 KiB": (header(prompt="p" * 65 * 1024), "r1", "bad_request", "limit"),
    "a header of 5 MiB": (header(prompt="p" * 5 * 1024 * 1024), "", "bad_request", "limit"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_header_is_answered_and_the_daemon_serves_on(tmp_path: Path, name: str) -> None:
    data, message_id, code, says = UNREADABLE[name]
    with serving(ipc(tmp_path)) as served, Dealer(served.endpoint) as dealer:
        dealer.send(data)
        reply = dealer.receive()
        assert isinstance(reply, Failed) and (reply.id, reply.code) == (message_id, code)
        assert says in reply.message
        assert served.sink.submitted == []
        assert served.frontend.counters.refused == 1
        serves_on(dealer)


def test_payload_frames_that_no_input_describes_are_refused(dealer: Dealer, served: Served) -> None:
    dealer.send(request(), b"an image")
    reply = dealer.receive()
    assert isinstance(reply, Failed) and "1 payload frames for 0 inputs" in reply.message
    dealer.send(request("r2"), *[b"x"] * 500)  # more frames than are even kept
    assert isinstance(dealer.receive(), Failed)
    serves_on(dealer)


def test_a_frame_above_the_hard_limit_costs_the_connection_only(tmp_path: Path) -> None:
    limits = Limits(max_frame_bytes=100_000)
    with serving(ipc(tmp_path), limits=limits) as served:
        with Dealer(served.endpoint, b"hostile") as hostile, Dealer(served.endpoint, b"good") as good:
            hostile.send(header(prompt="p" * 200_000))
            serves_on(good)
            hostile.send(Ping(id="p"))  # the socket reconnects by itself
            assert isinstance(hostile.receive(), Pong)
        assert [wish.id for _, wish in served.sink.submitted] == ["after"]


def test_an_open_request_that_comes_again_is_accepted_again_and_runs_once(tmp_path: Path) -> None:
    with serving(ipc(tmp_path), FakeSink(accepts)) as served, Dealer(served.endpoint) as dealer:
        dealer.send(request())
        first = dealer.receive()
        dealer.send(request())
        assert dealer.receive() == first == Accepted(id="r1", position=3, tier="disk")
        assert len(served.sink.submitted) == 1
        assert served.frontend.counters.repeated == 1


def test_an_answered_request_that_comes_again_gets_the_same_answer_and_runs_once(tmp_path: Path) -> None:
    with serving(ipc(tmp_path)) as served, Dealer(served.endpoint) as dealer:
        dealer.send(request(progress=False))
        dealer.receive_until(Finished)
        dealer.send(request(prompt="the id decides, not the words"))
        reply, payload = dealer.receive_all()
        assert isinstance(reply, Finished) and payload == [image_of(request())]
        dealer.send(Cancel(id="r1"))  # too late: the answer stands
        assert isinstance(dealer.receive(), Finished)
        assert len(served.sink.submitted) == 1 and served.sink.cancelled == []


def test_an_answer_is_forgotten_after_its_time_to_live(tmp_path: Path) -> None:
    limits = Limits(answer_ttl_s=0.0, client_timeout_s=0.4)
    with serving(ipc(tmp_path), limits=limits) as served, Dealer(served.endpoint) as dealer:
        dealer.send(request())
        dealer.receive_until(Finished)
        served.until(lambda: served.frontend.clients == 0)
        dealer.send(request())
        dealer.receive_until(Finished)
        assert len(served.sink.submitted) == 2
        assert served.sink.submitted[0][0] != served.sink.submitted[1][0]


def test_two_clients_may_use_the_same_id(served: Served) -> None:
    with Dealer(served.endpoint, b"one") as one, Dealer(served.endpoint, b"two") as two:
        one.send(request(seed=1))
        two.send(request(seed=2))
        assert one.receive_until(Finished).seed == 1
        assert two.receive_until(Finished).seed == 2


def test_a_second_answer_and_late_progress_are_not_sent(tmp_path: Path) -> None:
    with serving(ipc(tmp_path)) as served, Dealer(served.endpoint) as dealer:
        dealer.send(request())
        dealer.receive_until(Finished)
        client = served.sink.submitted[0][0]
        served.progress(client, "r1")
        served.call(lambda: served.sink.reply(client, Failed(id="r1", code="internal", message="late")))
        served.call(lambda: served.sink.reply("nobody#9", Failed(id="r1", code="internal", message="x")))
        dealer.send(Ping(id="p"))
        assert isinstance(dealer.receive(), Pong)


def test_too_many_open_requests_of_one_client(tmp_path: Path) -> None:
    limits = Limits(max_open_per_client=2)
    with (
        serving(ipc(tmp_path), FakeSink(accepts), limits=limits) as served,
        Dealer(served.endpoint) as dealer,
        Dealer(served.endpoint, b"other") as other,
    ):
        for name in ("a", "b", "c"):
            dealer.send(request(name))
        full = dealer.receive_until(Failed)
        assert (full.id, full.code, full.retryable) == ("c", "queue_full", True)
        other.send(request("a"))
        assert isinstance(other.receive(), Accepted)
        client, wish = served.sink.submitted[0]
        served.call(lambda: served.sink.finish(client, wish))
        dealer.receive_until(Finished)
        dealer.send(request("c"))
        assert dealer.receive_until(Accepted).id in ("b", "c")
        served.sink.wait_for(lambda sink: len(sink.submitted) == 4)


def test_cancel(tmp_path: Path) -> None:
    with serving(ipc(tmp_path), FakeSink(accepts)) as served, Dealer(served.endpoint) as dealer:
        dealer.send(request())
        dealer.send(Cancel(id="r1"))
        assert dealer.receive_until(Failed).code == "cancelled"
        assert served.sink.cancelled == [(served.sink.submitted[0][0], "r1")]
        dealer.send(Cancel(id="never-sent"))
        assert dealer.receive_until(Failed).id == "never-sent"
        assert len(served.sink.cancelled) == 1


def test_a_long_error_text_is_cut(tmp_path: Path) -> None:
    def fails(sink: FakeSink, client: str, wish: Any) -> None:
        sink.reply(client, Failed(id=wish.id, code="internal", message="x" * 200_000))

    with serving(ipc(tmp_path), FakeSink(fails)) as served, Dealer(served.endpoint) as dealer:
        dealer.send(request())
        assert 1000 < len(dealer.receive_until(Failed).message) < 10_000


@pytest.mark.parametrize(("count", "is_answered"), [(1000, True), (3000, False)])
def test_a_long_video_is_an_answer_or_a_typed_error(tmp_path: Path, count: int, is_answered: bool) -> None:
    def films(sink: FakeSink, client: str, wish: Any) -> None:
        sink.reply(client, *finished(wish, [b"frame"] * count))

    with serving(ipc(tmp_path), FakeSink(films)) as served, Dealer(served.endpoint) as dealer:
        dealer.send(request())
        reply, payload = dealer.receive_all()
        if is_answered:
            assert isinstance(reply, Finished) and len(payload) == len(reply.images) == count
        else:
            assert isinstance(reply, Failed) and "fewer frames" in reply.message and not payload


# -- the socket ----------------------------------------------------------------------------------------------


def test_a_burst_larger_than_a_turn_is_read_to_the_end(served: Served, dealer: Dealer) -> None:
    for i in range(1000):
        dealer.send(Ping(id=f"p{i}"))
    assert {dealer.receive().id for _ in range(1000)} == {f"p{i}" for i in range(1000)}


def test_the_socket_file_is_private_to_its_group_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "run" / "u.sock"
    with serving(f"ipc://{path}"):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o660
        assert stat.S_IMODE(os.stat(path.parent).st_mode) == 0o700
    assert not path.exists()


@pytest.mark.parametrize(
    ("endpoint", "says"),
    [
        ("tcp://0.0.0.0:7000", "forward the port"),
        ("tcp://*:7000", "forward the port"),
        ("tcp://eth0:7000", "forward the port"),
        ("tcp://[::]:7000", "forward the port"),
        ("ipc://relative/path", "absolute"),
        ("ipc://@abstract", "absolute"),
        ("ipc:///" + "x" * 200, "shorter"),
        ("udp://127.0.0.1:1", "no endpoint"),
        ("/run/u.sock", "no endpoint"),
    ],
)
def test_an_endpoint_that_is_not_served(endpoint: str, says: str) -> None:
    with pytest.raises(EndpointError, match=says):
        check_endpoint(endpoint)


def test_loopback_tcp_is_served_and_a_taken_port_is_an_error() -> None:
    with serving("tcp://127.0.0.1:*") as served, Dealer(served.endpoint) as dealer:
        serves_on(dealer)
        with pytest.raises(EndpointError, match="cannot listen"), serving(served.endpoint):
            pass
    check_endpoint("tcp://[::1]:7000")


def test_what_is_said_at_once_leaves_when_all_is_done_that_was_asked_for(tmp_path: Path) -> None:
    """The stage is told before the client is."""
    unsent: list[int] = []

    def note(sink: FakeSink, client: str, wish: Any) -> None:
        accepts(sink, client, wish)
        unsent.append(served.frontend.unsent)

    with serving(ipc(tmp_path), FakeSink(note)) as served, Dealer(served.endpoint) as dealer:
        dealer.send(request("r"))
        assert dealer.receive_until(Accepted).id == "r"
    assert unsent == [1]

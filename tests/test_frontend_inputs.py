"""Input images and options at the door: everything is checked before anything is decoded."""

import struct
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from understudy.inputs import inputs_from
from understudy.wire import Accepted, Failed, Finished, Generate, InputInfo
from understudyd.shell.input_limits import InputLimits, inputs_refusal, options_refusal
from understudyd.shell.input_room import InputRoom
from understudyd.shell.limits import Limits, refusal
from wire_kit import Dealer, FakeSink, accepts, ipc, request, serving


def png(width: int = 8, height: int = 8) -> bytes:
    """A PNG file's header, which is all that is looked at here."""
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBBI", 13, b"IHDR", width, height, 8, 2, 0, 0, 0, 0)


def raw(name: str = "image", width: int = 8, height: int = 4, channels: int = 3) -> InputInfo:
    return InputInfo(name=name, format="raw", width=width, height=height, channels=channels)


def file(name: str = "image", format: str = "png", width: int = 8, height: int = 8) -> InputInfo:
    return InputInfo(name=name, format=format, width=width, height=height)


REFUSED: dict[str, tuple[InputInfo, bytes, str]] = {
    "name that is none": (raw("not a name"), bytes(96), "mask_image for example"),
    "name that is long": (raw("x" * 65), bytes(96), "argument's name"),
    "format that is none": (file(format="bmp"), b"BM", "one of raw, png"),
    "two channels": (raw(channels=2), bytes(64), "1, 3 or 4"),
    "no width": (raw(width=0), b"", "at least 1x1"),
    "negative sizes": (raw(width=-8, height=-4), bytes(96), "at least 1x1"),
    "huge sizes": (raw(width=2**62, height=2**62), b"", "scale it down"),
    "one pixel too many": (raw(width=2048 * 2048 + 1, height=1, channels=1), b"", "scale it down"),
    "a byte too few": (raw(), bytes(95), "96"),
    "a byte too many": (raw(), bytes(97), "96"),
    "a file that is none": (file(), b"GIF89a", "whole png file"),
    "an empty file": (file(), b"", "whole png file"),
    "a file cut off": (file(), png()[:20], "cut off"),
    "a file of other sizes": (file(), png(8000, 8000), "8000x8000"),
    "a file of another format": (file(format="jpeg"), png(), "the file is png"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_input_that_is_not_what_it_says_is_refused(name: str) -> None:
    info, frame, says = REFUSED[name]
    message = inputs_refusal((info,), (frame,), InputLimits())
    assert message is not None and says in message and len(message) < 400


@pytest.mark.parametrize(
    ("info", "frame"),
    [(raw(), bytes(96)), (raw(channels=1), bytes(32)), (raw(channels=4), bytes(128)), (file(), png())],
)
def test_an_input_that_is_what_it_says_is_accepted(info: InputInfo, frame: bytes) -> None:
    assert inputs_refusal((info,), (frame,), InputLimits()) is None


def test_numbers_of_inputs_and_frames() -> None:
    limits = InputLimits(max_inputs=2, max_total_bytes=200)
    pair, frames = (raw("image"), raw("mask_image")), (bytes(96), bytes(96))
    assert inputs_refusal(pair, frames, limits) is None
    for inputs, payload, says in (
        (pair, frames[:1], "1 payload frames for 2 inputs"),
        (pair[:1], frames, "2 payload frames for 1 inputs"),
        ((*pair, raw()), (*frames, bytes(96)), "send fewer"),
        ((raw(), raw(width=9)), (bytes(96), bytes(108)), "limit is 200"),
    ):
        message = inputs_refusal(inputs, payload, limits)
        assert message is not None and says in message


def test_what_options_may_be() -> None:
    plain = {"eta": 0.5, "n": 3, "s": "text", "b": True, "none": None, "many": [1, 2.5, "x", None, False]}
    assert options_refusal(plain, InputLimits()) is None


plain_values = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(max_size=20)
)


@settings(max_examples=150, deadline=None)
@given(
    options=st.dictionaries(
        st.text(max_size=8), plain_values | st.lists(plain_values, max_size=4), max_size=4
    ),
    inputs=st.lists(
        st.builds(
            InputInfo,
            name=st.text(max_size=8) | st.just("image"),
            format=st.sampled_from(["raw", "png", "jpeg", "webp", "", "PNG\0"]),
            width=st.integers(-(2**63), 2**63) | st.integers(1, 8),
            height=st.integers(-(2**63), 2**63) | st.integers(1, 8),
            channels=st.integers(-1, 5),
        ),
        max_size=3,
    ),
    payload=st.lists(st.binary(max_size=64) | st.just(png()), max_size=3),
)
def test_whatever_comes_is_judged_and_what_passes_is_sound(
    options: dict[str, Any], inputs: list[InputInfo], payload: list[bytes]
) -> None:
    wish = request(options=options, inputs=tuple(inputs))
    message = refusal(wish, payload, Limits())
    if message is not None:
        assert isinstance(message, str) and len(message) < 1000
        return
    assert all(name.isidentifier() for name in options)
    for info, frame in zip(inputs, payload, strict=True):
        assert 1 <= info.width * info.height <= 2048 * 2048
        if info.format == "raw":
            assert len(frame) == info.width * info.height * info.channels


def test_the_books_of_waiting_inputs() -> None:
    room = InputRoom(per_client_bytes=100, in_all_bytes=150)
    assert room.take("a", "1", 60) is None and room.take("b", "1", 60) is None
    assert "this client's" in (room.take("a", "2", 50) or "")
    assert "all clients'" in (room.take("a", "2", 40) or "")
    assert room.take("a", "3", 0) is None and room.held_bytes == 120
    room.give_back("a", "1")
    room.give_back("a", "1")
    assert room.held_bytes == 60 and room.take("a", "2", 40) is None
    room.forget("b")
    room.forget("b")
    assert room.held_bytes == 40


# -- over the wire -------------------------------------------------------------------------------------------


def wish_with_image(request_id: str = "r1") -> Generate:
    return request(request_id, inputs=(raw(),))


def test_images_and_options_reach_the_sink_as_they_were_sent(tmp_path: Path) -> None:
    wish = request(
        inputs=(raw(), file("mask_image")),
        options={"strength": 0.5, "sigmas": [1.0, 0.5]},
        task="inpainting",
        scheduler="DDIMScheduler",
        format="webp",
        quality=80,
    )
    with serving(ipc(tmp_path)) as served, Dealer(served.endpoint) as dealer:
        dealer.send(wish, bytes(range(96)), png())
        dealer.receive_until(Finished)
        assert served.sink.submitted[0][1] == wish
        assert served.sink.payloads == [(bytes(range(96)), png())]


def test_a_refused_image_never_reaches_the_sink_and_the_daemon_serves_on(tmp_path: Path) -> None:
    with serving(ipc(tmp_path)) as served, Dealer(served.endpoint) as dealer:
        dealer.send(wish_with_image(), bytes(95))
        refused = dealer.receive_until(Failed)
        assert (refused.code, refused.retryable) == ("bad_request", False) and "uint8 rows" in refused.message
        dealer.send(wish_with_image("r2"), *[bytes(96)] * 17)  # more than are kept
        assert "payload frames for 1 inputs" in dealer.receive_until(Failed).message
        many = tuple(raw() for _ in range(16))
        dealer.send(request("r3", inputs=many), *[bytes(96)] * 17)
        assert "17 payload frames for 16 inputs" in dealer.receive_until(Failed).message
        dealer.send(request("r4", inputs=many), *[bytes(96)] * 16)
        assert dealer.receive_until(Finished).id == "r4"
        assert len(served.sink.submitted) == 1


def test_a_question_without_images_is_answered_by_who_knows_the_request(tmp_path: Path) -> None:
    with serving(ipc(tmp_path), FakeSink(accepts)) as served, Dealer(served.endpoint) as dealer:
        dealer.send(wish_with_image())
        missing = dealer.receive_until(Failed)
        assert (missing.code, missing.retryable) == ("inputs_missing", True)
        dealer.send(wish_with_image(), bytes(96))
        accepted = dealer.receive_until(Accepted)
        dealer.send(wish_with_image())
        assert dealer.receive_until(Accepted) == accepted
        assert len(served.sink.submitted) == 1


def test_waiting_images_of_a_client_are_bounded_and_let_go(tmp_path: Path) -> None:
    limits = Limits(max_open_input_bytes=200, max_all_input_bytes=300, client_timeout_s=1000)
    now = [0.0]

    def sweep_at(seconds: float) -> None:
        now[0] = seconds
        served.frontend.sweep()

    with (
        serving(ipc(tmp_path), FakeSink(accepts), limits=limits, clock=lambda: now[0]) as served,
        Dealer(served.endpoint, b"one") as one,
        Dealer(served.endpoint, b"two") as two,
    ):
        for name in ("a", "b", "c"):
            one.send(wish_with_image(name), bytes(96))
        full = one.receive_until(Failed)
        assert (full.id, full.code, full.retryable) == ("c", "queue_full", True)
        assert "input images" in full.message
        one.send(request("text"))  # without images there is room
        served.sink.wait_for(lambda sink: len(sink.submitted) == 3)
        client, wish = served.sink.submitted[0]
        served.call(lambda: served.sink.finish(client, wish))
        one.send(wish_with_image("c"), bytes(96))
        two.send(wish_with_image("a"), bytes(96))
        served.sink.wait_for(lambda sink: len(sink.submitted) == 5)
        two.send(wish_with_image("b"), bytes(96))
        assert "all clients'" in two.receive_until(Failed).message
        assert served.call(lambda: served.frontend._input_room.held_bytes) == 3 * 96
        for seconds in (400, 800, 1200):  # both fall silent: what they held is free again
            served.call(lambda at=seconds: sweep_at(at))
        assert served.frontend.clients == 0
        assert served.call(lambda: served.frontend._input_room.held_bytes) == 0


def test_what_the_client_library_sends_passes_the_door() -> None:
    Image = pytest.importorskip("PIL.Image")
    images = {"image": Image.new("RGB", (9, 7)), "mask_image": [Image.new("1", (9, 7)), png(3, 2)]}
    inputs = inputs_from(images)
    assert [info.name for info in inputs.infos] == ["image", "mask_image", "mask_image"]
    assert inputs_refusal(inputs.infos, inputs.payload, InputLimits()) is None

"""What one client may have open at a time, whatever its single requests look like: real sockets."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.wire import Accepted, Failed, Finished, InputInfo
from understudyd.config import load
from understudyd.shell.limits import Limits
from understudyd.shell.parts import limits_of
from understudyd.shell.work_room import Work, WorkRoom, work_asked
from wire_kit import Dealer, FakeSink, accepts, ipc, request, serving

MEGAPIXEL = 1024 * 1024


@pytest.mark.parametrize(
    ("fields", "pixels", "steps"),
    [
        ({}, MEGAPIXEL, 30),
        ({"width": 64, "height": 32, "steps": 2, "images": 3}, 64 * 32 * 3, 6),
        ({"width": 64}, MEGAPIXEL, 30),
        ({"width": 8, "height": 8, "options": {"num_frames": 10}, "steps": 4}, 640, 4),
        ({"width": 8, "height": 8, "options": {"num_frames": "many"}, "steps": 4}, 64, 4),
    ],
)
def test_the_work_that_is_asked_for(fields: dict[str, Any], pixels: int, steps: int) -> None:
    assert work_asked(request(**fields)) == Work(pixels, steps)


@pytest.mark.parametrize(
    ("most", "fields", "says"),
    [
        (Work(2 * 64 * 64, 10**6), {"width": 64, "height": 64}, r"12288 pixels .* 8192"),
        (Work(10**9, 50), {"steps": 20}, r"60 steps .* 50"),
    ],
)
def test_open_work_is_bounded_and_comes_back_with_answers(
    tmp_path: Path, most: Work, fields: dict[str, Any], says: str
) -> None:
    limits = Limits(max_open_work=most)
    with (
        serving(ipc(tmp_path), FakeSink(accepts), limits=limits) as served,
        Dealer(served.endpoint) as dealer,
        Dealer(served.endpoint, b"other") as other,
    ):
        for name in ("a", "b", "c"):
            dealer.send(request(name, **fields))
        full = dealer.receive_until(Failed)
        assert (full.id, full.code, full.retryable) == ("c", "queue_full", True)
        assert re.search(says, full.message) and "wait for answers" in full.message
        other.send(request("a", **fields))
        assert isinstance(other.receive(), Accepted), "another client has room of its own"
        client, wish = served.sink.submitted[0]
        served.call(lambda: served.sink.finish(client, wish))
        dealer.receive_until(Finished)
        dealer.send(request("d", **fields))
        served.sink.wait_for(lambda sink: [w.id for _, w in sink.submitted] == ["a", "b", "a", "d"])


def test_what_alone_is_too_much_is_not_told_to_wait(tmp_path: Path) -> None:
    limits = Limits(max_open_work=Work(10**9, 100))
    with serving(ipc(tmp_path), limits=limits) as served, Dealer(served.endpoint) as dealer:
        dealer.send(request(steps=51, images=2))
        reply = dealer.receive()
        assert isinstance(reply, Failed) and (reply.code, reply.retryable) == ("bad_request", False)
        assert "102 steps" in reply.message and served.sink.submitted == []


def test_a_request_without_room_for_its_images_leaves_no_work_behind(tmp_path: Path) -> None:
    limits = Limits(max_open_work=Work(10**9, 60), max_open_input_bytes=100)
    image = InputInfo(name="image", format="raw", width=8, height=8, channels=3)
    with (
        serving(ipc(tmp_path), FakeSink(accepts), limits=limits) as served,
        Dealer(served.endpoint) as dealer,
    ):
        for name in ("a", "b", "c"):  # 192 bytes each: never any room
            dealer.send(request(name, steps=30, inputs=(image,)), b"x" * 192)
            assert "input images" in dealer.receive_until(Failed).message
        for name in ("d", "e"):
            dealer.send(request(name, steps=30))
            assert dealer.receive_until(Accepted).id == name


def test_a_client_that_goes_takes_its_work_with_it() -> None:
    room = WorkRoom(Work(100, 100))
    assert room.take("a", "1", Work(100, 1)) is None and room.take("a", "2", Work(1, 1)) is not None
    room.forget("a")
    assert room.take("a", "1", Work(100, 100)) is None


works = st.builds(Work, st.integers(0, 60), st.integers(0, 60))
steps = st.lists(
    st.tuples(st.sampled_from("ab"), st.sampled_from("123"), st.one_of(works, st.just(None))), max_size=40
)


@given(steps)
def test_the_books_balance(taken: list[tuple[str, str, Work | None]]) -> None:
    """Against plain sums: never above the most, nothing left when all is given back."""
    room, held = WorkRoom(Work(100, 100)), dict[tuple[str, str], Work]()
    for client, name, work in taken:
        if work is None:
            room.give_back(client, name)
            held.pop((client, name), None)
        elif (client, name) not in held:
            others = [w for (whose, _), w in held.items() if whose == client]
            total = sum(others, Work()) + work
            fits = total.pixels <= 100 and total.steps <= 100
            assert (room.take(client, name, work) is None) == fits
            if fits:
                held[client, name] = work
    for client, name in held:
        room.give_back(client, name)
    assert not room._held and not room._sums


def test_the_configuration_reaches_the_front_end(tmp_path: Path) -> None:
    path = tmp_path / "u.toml"
    path.write_text('[server]\nmax_open_pixels = 7\nmax_open_steps = 8\nmax_input_bytes = "3MiB"\n')
    limits = limits_of(load(path, {}).server)
    assert limits.max_open_work == Work(7, 8) and limits.max_frame_bytes == 3 * 2**20
    path.write_text('[server]\nmax_input_bytes = "1KiB"\n')
    assert limits_of(load(path, {}).server).max_frame_bytes == 2**20, "a header must still get in"

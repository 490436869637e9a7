"""The session alone, on a virtual clock: exactly one answer, whatever the network and the daemon do."""

import pytest

from session_kit import PATIENCE, Driven
from understudy.errors import (
    CallerError,
    Cancelled,
    CapacityError,
    DeadlineExceeded,
    TransportError,
    UnderstudyError,
)
from understudy.results import Pinged, Result
from understudy.wire import (
    Accepted,
    Cancel,
    Failed,
    Generate,
    ListModels,
    ModelList,
    Ping,
    Pong,
    Progress,
    encode,
    encode_entries,
)
from wire_kit import MODELS, finished, request


@pytest.fixture
def driven() -> Driven:
    return Driven()


def test_hints_then_result(driven: Driven) -> None:
    wish = request()
    mailbox = driven.open(wish)
    assert driven.take(Generate) == [wish]
    driven.hear(Accepted(id="r1", position=1, tier="disk"))
    driven.hear(Progress(id="r1", step=1, steps=9))
    driven.hear(Progress(id="r1", step=2, steps=9))
    assert mailbox.take_hint() == Accepted(id="r1", position=1, tier="disk")
    assert mailbox.take_hint() == Progress(id="r1", step=2, steps=9)  # coalesced
    assert mailbox.take_hint() is None and mailbox.answer is None
    reply, images = finished(wish)
    driven.hear(reply, *images)
    assert isinstance(mailbox.answer, Result) and mailbox.answer.images == images
    assert driven.session.open_ids == () and driven.session.next_deadline_s() is None


def test_only_the_first_answer_counts(driven: Driven) -> None:
    mailbox = driven.open(request())
    driven.hear(Failed(id="r1", code="queue_full", message="full", retryable=True))
    reply, images = finished(request())
    driven.hear(reply, *images)
    assert isinstance(mailbox.answer, CapacityError) and mailbox.answer.retryable


def test_an_idle_session_is_silent_and_an_open_request_is_kept_alive(driven: Driven) -> None:
    driven.pass_time(100)
    assert driven.sent == []
    driven.open(request())
    for _ in range(5):
        driven.pass_time(1)
        driven.pong()
    assert 5 <= len(driven.take(Ping)) <= 6


def test_another_daemon_gets_all_open_requests(driven: Driven) -> None:
    driven.open(request("a"))
    driven.open(request("b"))
    driven.pass_time(0.5)
    driven.pong("d1")
    driven.take(Generate)
    driven.pong("d1")
    assert driven.take(Generate) == []
    driven.pong("d2")
    assert [wish.id for wish in driven.take(Generate)] == ["a", "b"]


def test_after_a_silence_everything_is_sent_again_once(driven: Driven) -> None:
    driven.open(request())
    driven.pong()
    driven.take(Generate)
    driven.pass_time(20)
    assert driven.take(Generate) == []  # nothing is piled up in silence
    driven.pong()
    driven.pong()
    assert [wish.id for wish in driven.take(Generate)] == ["r1"]


def test_a_request_nothing_is_heard_of_is_sent_again(driven: Driven) -> None:
    driven.open(request())
    driven.take(Generate)
    for _ in range(25):
        driven.pass_time(1)
        driven.pong()
    assert len(driven.take(Generate)) == 2


def missing(request_id: str = "r1") -> Failed:
    return Failed(id=request_id, code="inputs_missing", message="send it whole", retryable=True)


def test_images_are_sent_again_where_they_may_be_lost(driven: Driven) -> None:
    driven.open(request(), b"image", b"mask")
    driven.pong("d1")
    driven.pong("d2")
    driven.pass_time(20)
    driven.pong("d2")
    assert driven.payloads == [(b"image", b"mask")] * 3


def test_a_request_nothing_is_heard_of_is_asked_for_without_its_images(driven: Driven) -> None:
    mailbox = driven.open(request(), b"image")
    for _ in range(11):
        driven.pass_time(1)
        driven.pong()
    assert driven.payloads == [(b"image",), ()]
    driven.hear(missing())
    driven.hear(missing())  # an older question's answer, while the whole request is on its way
    assert driven.payloads == [(b"image",), (), (b"image",)]
    assert mailbox.answer is None
    reply, images = finished(request())
    driven.hear(reply, *images)
    assert isinstance(mailbox.answer, Result)


def test_a_cancelled_request_is_not_sent_whole_again(driven: Driven) -> None:
    mailbox = driven.open(request(), b"image")
    for _ in range(11):
        driven.pass_time(1)
        driven.pong()
    driven.session.cancel("r1", driven.now)
    driven.hear(missing())
    assert driven.payloads == [(b"image",), ()]
    driven.pass_time(PATIENCE.cancel_grace_s)
    assert isinstance(mailbox.answer, Cancelled)


def test_errors_say_which_request(driven: Driven) -> None:
    mailbox = driven.open(request("mine"))
    driven.hear(Failed(id="mine", code="queue_full", message="full", retryable=True))
    assert isinstance(mailbox.answer, UnderstudyError) and mailbox.answer.request_id == "mine"


def test_no_daemon_for_too_long_fails_everything_and_cancels_it(
    driven: Driven,
) -> None:
    boxes = [driven.open(request("a")), driven.open(Ping(id="p"))]
    driven.pass_time(29.9)
    assert boxes[0].answer is None
    driven.pass_time(0.2)
    for box in boxes:
        assert isinstance(box.answer, TransportError) and box.answer.code == "unreachable"
        assert "ipc:///test" in str(box.answer)
    assert driven.take(Cancel) == [Cancel(id="a")]


def test_the_deadline_travels_and_shrinks_and_is_kept_locally(driven: Driven) -> None:
    mailbox = driven.open(request(deadline_s=10.0))
    assert driven.take(Generate)[0].deadline_s == 10.0
    driven.pong("d1")
    driven.pass_time(2)
    driven.pong("d2")
    assert driven.take(Generate)[0].deadline_s == pytest.approx(8.0)
    for _ in range(9):
        driven.pass_time(1)
        driven.pong("d2")
    assert mailbox.answer is None
    driven.pass_time(1.1)
    assert isinstance(mailbox.answer, DeadlineExceeded)
    assert "the deadline of 10 s passed" in str(mailbox.answer) and "--deadline" in str(mailbox.answer)
    assert driven.take(Cancel) == [Cancel(id="r1")]


def test_cancel_is_confirmed_by_the_daemon(driven: Driven) -> None:
    mailbox = driven.open(request())
    driven.session.cancel("r1", driven.now)
    driven.session.cancel("r1", driven.now)
    driven.collect()
    assert driven.take(Cancel) == [Cancel(id="r1")]
    driven.hear(Failed(id="r1", code="cancelled", message="cancelled"))
    assert isinstance(mailbox.answer, Cancelled)


def test_a_finished_image_beats_the_cancel(driven: Driven) -> None:
    mailbox = driven.open(request())
    driven.session.cancel("r1", driven.now)
    reply, images = finished(request())
    driven.hear(reply, *images)
    assert isinstance(mailbox.answer, Result)


def test_cancel_without_a_daemon_is_answered_after_a_grace_and_never_runs_elsewhere(driven: Driven) -> None:
    mailbox = driven.open(request())
    driven.pong("d1")
    driven.take(Generate)
    driven.session.cancel("r1", driven.now)
    driven.pong("d2")
    assert driven.take(Generate) == [] and driven.take(Cancel) == [Cancel(id="r1")] * 2
    driven.pass_time(5)
    assert isinstance(mailbox.answer, Cancelled)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": 5},
        {"prompt": "\ud800"},
        {"steps": "20"},
        {"seed": 2**70},
        {"prompt": 1j},
        {"model": None},
    ],
    ids=str,
)
def test_a_field_of_a_wrong_type_never_leaves(driven: Driven, fields: dict[str, object]) -> None:
    with pytest.raises(CallerError, match="cannot be sent"):
        driven.open(request(**fields))
    assert driven.sent == [] and driven.session.open_ids == ()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"steps": "2"}, "steps is '2'; it must be a whole number or None"),
        ({"guidance": "high"}, "guidance is 'high'; it must be a number or None"),
        ({"prompt": 5}, "prompt is 5; it must be text"),
        ({"progress": "no"}, "progress is 'no'; it must be True or False"),
        ({"options": {"ip": {}}}, "got `object` - at"),
    ],
    ids=str,
)
def test_a_wrong_type_is_told_in_words_of_python(
    driven: Driven, fields: dict[str, object], says: str
) -> None:
    with pytest.raises(CallerError) as caught:
        driven.open(request(**fields))
    assert says in str(caught.value)


def test_a_header_that_is_too_large_and_an_id_in_use(driven: Driven) -> None:
    with pytest.raises(CallerError, match="shorten the prompt"):
        driven.open(request(prompt="p" * 70_000))
    driven.open(request())
    with pytest.raises(CallerError, match="in use"):
        driven.open(request())


def test_replies_that_cannot_be_read(driven: Driven) -> None:
    mailbox = driven.open(request())
    other = driven.open(request("r2"))
    for frames in ([b""], [b"\xc1"], [b"\x91" * 1000], [encode(Pong(id="x", daemon="d", v=9))]):
        driven.session.received(frames, driven.now)
    driven.session.received([encode(Failed(id="", code="bad_request", message="?"))], driven.now)
    assert mailbox.answer is None
    driven.session.received([encode(Accepted(id="r1", position=0, tier="x", v=2))], driven.now)
    assert isinstance(mailbox.answer, TransportError) and mailbox.answer.code == "unsupported_version"
    reply, _ = finished(request("r2"))
    driven.hear(reply)  # without its image
    assert isinstance(other.answer, TransportError) and "announced 1" in str(other.answer)


def test_models_and_ping(driven: Driven) -> None:
    models, ping = driven.open(ListModels(id="m")), driven.open(Ping(id="p"))
    driven.pass_time(0.25)
    driven.hear(Pong(id="p", daemon="d1"))
    assert ping.answer == Pinged(daemon="d1", round_trip_s=0.25)
    driven.hear(ModelList(id="m"), encode_entries(MODELS[:1]), encode_entries(MODELS[1:]))
    assert models.answer == MODELS

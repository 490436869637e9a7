"""The session alone, on a virtual clock: exactly one answer, whatever the network and the daemon do."""

import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from understudy.errors import (
    CallerError,
    Cancelled,
    CapacityError,
    DeadlineExceeded,
    TransportError,
    UnderstudyError,
)
from understudy.results import Pinged, Result
from understudy.session import HEARTBEAT_ID, Mailbox, Patience, Session
from understudy.wire import (
    Accepted,
    Cancel,
    Failed,
    Generate,
    ListModels,
    Message,
    ModelList,
    Ping,
    Pong,
    Progress,
    Request,
    decode_request,
    encode,
    encode_entries,
)
from wire_kit import MODELS, finished, request

PATIENCE = Patience(heartbeat_s=1, silence_s=3, reconnect_s=30, refresh_s=10, deadline_grace_s=2)


class Driven:
    """A session with a clock in hand."""

    def __init__(self) -> None:
        self.now = 100.0
        self.session = Session("ipc:///test", PATIENCE)
        self.sent: list[Request] = []

    def open(self, wish: Generate | ListModels | Ping) -> Mailbox:
        mailbox = self.session.open(wish, self.now)
        self.collect()
        return mailbox

    def pass_time(self, seconds: float) -> None:
        """Tick exactly when the session asks for it."""
        end = self.now + seconds
        while (due := self.session.next_deadline_s()) is not None and due <= end:
            self.now = max(self.now, due)
            self.session.tick(self.now)
            self.collect()
        self.now = end

    def hear(self, reply: Message, *payload: bytes) -> None:
        self.session.received([encode(reply), *payload], self.now)
        self.collect()

    def pong(self, daemon: str = "d1") -> None:
        self.hear(Pong(id=HEARTBEAT_ID, daemon=daemon))

    def collect(self) -> None:
        self.sent += [decode_request(frames[0]) for frames in self.session.take_outgoing()]

    def take(self, kind: type) -> list[Request]:
        taken = [message for message in self.sent if isinstance(message, kind)]
        self.sent = [message for message in self.sent if not isinstance(message, kind)]
        return taken


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


class Chaos(RuleBasedStateMachine):
    """Messages are lost, repeated and delayed in both directions; the daemon forgets everything at times."""

    def __init__(self) -> None:
        super().__init__()
        self.driven = Driven()
        self.driven.open(request("first"))  # so that time means something
        self.boxes: dict[str, Mailbox] = {}
        self.seeds: dict[str, int] = {}
        self.cancelled: set[str] = set()
        self.to_client: list[tuple[Message, list[bytes]]] = []
        self.daemons = itertools.count(1)
        self.longest_silence_s = 0.0
        self.restart()

    @rule()
    def restart(self) -> None:
        self.daemon = f"d{next(self.daemons)}"
        self.running: dict[str, Generate] = {}
        self.answers: dict[str, tuple[Message, list[bytes]]] = {}
        self.runs: dict[str, int] = {}

    @rule(deadline_s=st.sampled_from([None, None, 20.0]))
    def open(self, deadline_s: float | None) -> None:
        name = f"r{len(self.boxes)}"
        wish = request(name, seed=len(self.boxes), deadline_s=deadline_s)
        self.boxes[name], self.seeds[name] = self.driven.open(wish), wish.seed
        if deadline_s is not None:
            self.cancelled.add(name)  # may end without an image, like a cancelled one

    @rule(pick=st.randoms(use_true_random=False))
    def cancel(self, pick: object) -> None:
        if self.boxes:
            name = sorted(self.boxes)[pick.randrange(len(self.boxes))]  # type: ignore[attr-defined]
            self.cancelled.add(name)
            self.driven.session.cancel(name, self.driven.now)
            self.driven.collect()

    @rule(seconds=st.sampled_from([0.1, 1.0, 4.0]))
    def wait(self, seconds: float) -> None:
        self.driven.pass_time(seconds)

    @rule(lost=st.booleans(), twice=st.booleans())
    def deliver_to_daemon(self, lost: bool, twice: bool) -> None:
        if self.driven.sent:
            message = self.driven.sent.pop(0)
            for _ in range(0 if lost else 1 + twice):
                self.daemon_hears(message)

    @rule(lost=st.booleans(), twice=st.booleans())
    def deliver_to_client(self, lost: bool, twice: bool) -> None:
        if self.to_client:
            reply, payload = self.to_client.pop(0)
            for _ in range(0 if lost else 1 + twice):
                self.driven.hear(reply, *payload)

    @rule()
    def finish_one(self) -> None:
        if self.running:
            name, wish = self.running.popitem()
            self.answers[name] = finished(wish)
            self.to_client.append(self.answers[name])

    def daemon_hears(self, message: Request) -> None:
        match message:
            case Ping(id=name):
                self.to_client.append((Pong(id=name, daemon=self.daemon), []))
            case Generate(id=name) if name in self.answers:
                self.to_client.append(self.answers[name])
            case Generate(id=name):
                if name not in self.running:
                    self.runs[name] = self.runs.get(name, 0) + 1
                    self.running[name] = message
                self.to_client.append((Accepted(id=name, position=0, tier="disk"), []))
            case Cancel(id=name):
                self.running.pop(name, None)
                end = (Failed(id=name, code="cancelled", message="cancelled"), [])
                self.to_client.append(self.answers.setdefault(name, end))

    @invariant()
    def runs_once_in_a_daemons_life(self) -> None:
        assert all(count == 1 for count in self.runs.values())

    @invariant()
    def an_image_is_the_one_that_was_asked_for(self) -> None:
        for name, box in self.boxes.items():
            if isinstance(box.answer, Result):
                assert (box.answer.id, box.answer.seed) == (name, self.seeds[name])

    def teardown(self) -> None:
        """The network heals: within two refreshes every request has its answer."""
        for _ in range(60):
            self.driven.pass_time(0.5)
            while self.driven.sent or self.to_client or self.running:
                while self.driven.sent:
                    self.daemon_hears(self.driven.sent.pop(0))
                self.finish_one()
                while self.to_client:
                    reply, payload = self.to_client.pop(0)
                    self.driven.hear(reply, *payload)
        assert self.driven.session.open_ids == ()
        for name, box in self.boxes.items():
            assert box.answer is not None
            if name not in self.cancelled and isinstance(box.answer, UnderstudyError):
                assert box.answer.code == "unreachable"


Chaos.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestChaos = Chaos.TestCase

"""The session against a lossy network and a daemon that forgets: exactly one answer to each request."""

import itertools

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from session_kit import Driven
from understudy.errors import UnderstudyError
from understudy.results import Result
from understudy.session import Mailbox
from understudy.wire import Accepted, Cancel, Failed, Generate, Message, Ping, Pong, Request
from wire_kit import finished, request


class Chaos(RuleBasedStateMachine):
    """Messages are lost, repeated and delayed in both directions; the daemon forgets everything at times."""

    def __init__(self) -> None:
        super().__init__()
        self.driven = Driven()
        self.driven.open(request("first"))  # so that time means something
        self.with_images: set[str] = set()
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

    @rule(deadline_s=st.sampled_from([None, None, 20.0]), has_image=st.booleans())
    def open(self, deadline_s: float | None, has_image: bool) -> None:
        name = f"r{len(self.boxes)}"
        wish = request(name, seed=len(self.boxes), deadline_s=deadline_s)
        payload = (name.encode(),) if has_image else ()
        self.with_images |= {name} if has_image else set()
        self.boxes[name], self.seeds[name] = self.driven.open(wish, *payload), wish.seed
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
            message, payload = self.driven.sent.pop(0)
            for _ in range(0 if lost else 1 + twice):
                self.daemon_hears(message, payload)

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

    def daemon_hears(self, message: Request, payload: tuple[bytes, ...]) -> None:
        match message:
            case Ping(id=name):
                self.to_client.append((Pong(id=name, daemon=self.daemon), []))
            case Generate(id=name) if name in self.answers:
                self.to_client.append(self.answers[name])
            case Generate(id=name) if name in self.with_images - self.running.keys() and not payload:
                self.to_client.append((Failed(id=name, code="inputs_missing", message="send it whole"), []))
            case Generate(id=name):
                if name not in self.running:
                    assert payload == ((name.encode(),) if name in self.with_images else ())
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
                    self.daemon_hears(*self.driven.sent.pop(0))
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

"""The client's side of the protocol as a state machine: bytes in, bytes out, no I/O, no clock.

Both clients drive one `Session`: they call `open` and `cancel` for their callers, `received` for every
message of the socket and `tick` at `next_deadline_s()`, and send what `take_outgoing` returns.

What it promises: every opened id gets exactly one answer in its `Mailbox`, whatever gets lost or comes
twice. Messages get lost when the daemon dies, when it expires this client, and when a connection breaks.
So an open request is sent again under its id (a) when the daemon's name in a `Pong` changed, (b) when it
is heard after a silence, (c) when nothing was heard about this very request for `refresh_s`. A daemon
that knows the id answers `Accepted` again or repeats its answer; one that does not runs it with the same
seed. What the daemon never answers, the session answers: after the deadline, after a cancel, and when
there was no word from the daemon for `reconnect_s`. In case (c) input images stay here until the daemon
says that it has none.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from math import isfinite

import msgspec

from understudy.errors import (
    CallerError,
    Cancelled,
    DeadlineExceeded,
    NotAllowed,
    TransportError,
    UnderstudyError,
    error_from,
)
from understudy.paths import RECONNECT_S
from understudy.results import Answer, Hint, Pinged, result_from
from understudy.wire import (
    Accepted,
    Cancel,
    Failed,
    Finished,
    Generate,
    ListModels,
    ModelList,
    Ping,
    Pong,
    Progress,
    Reply,
    WireError,
    decode_entries,
    decode_reply,
    decode_request,
    encode,
)

HEARTBEAT_ID = "heartbeat"
_WRONG_TYPE = re.compile(r"Expected `([\w |]+)`, got `\w+` - at `\$\.(\w+)`")
_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "True or False",
    "null": "None",
}
_NO_TROUBLE = "is understudyd running, and is this its endpoint? `understudyd serve` starts one"
Frames = tuple[bytes, ...]
Openable = Generate | ListModels | Ping


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long the session waits for what, in seconds."""

    heartbeat_s: float = 1.0
    silence_s: float = 3.0
    reconnect_s: float = RECONNECT_S
    refresh_s: float = 10.0
    deadline_grace_s: float = 2.0
    cancel_grace_s: float = 5.0


class Mailbox:
    """What one request's caller has not seen yet: the newest of each hint, then the answer for good.

    A slow reader misses intermediate steps, never the answer. `wake` is called after each delivery.
    """

    def __init__(self) -> None:
        self.answer: Answer | None = None
        self.wake: Callable[[], None] = _nobody
        self._accepted: Accepted | None = None
        self._progress: Progress | None = None
        self._last_accepted: Accepted | None = None

    def take_hint(self) -> Hint | None:
        """The oldest unseen hint."""
        if self._accepted is not None:
            hint, self._accepted = self._accepted, None
            return hint
        progress, self._progress = self._progress, None
        return progress

    def put_hint(self, hint: Hint) -> None:
        """Replace an unseen hint of the same kind; a repeated `Accepted` says nothing new."""
        if isinstance(hint, Progress):
            self._progress = hint
        elif hint != self._last_accepted:
            self._accepted = self._last_accepted = hint
        self.wake()

    def put_answer(self, answer: Answer) -> None:
        """The first and last answer."""
        assert self.answer is None, "an id is answered once"
        self.answer = answer
        self.wake()


def _nobody() -> None:
    """Wake nobody: the caller has not begun to wait."""


@dataclass(slots=True)
class _Open:
    request: Openable
    opened_at_s: float
    refresh_at_s: float
    give_up_at_s: float
    cancelled: bool = False
    payload: Frames = ()
    asked_without_payload: bool = False
    mailbox: Mailbox = field(default_factory=Mailbox)


class Session:
    """All open requests of one client; see the module's text. `endpoint` is for messages only."""

    def __init__(self, endpoint: str, patience: Patience | None = None) -> None:
        self._endpoint = endpoint
        self._patience = patience or Patience()
        self._open: dict[str, _Open] = {}
        self._outgoing: list[Frames] = []
        self._daemon: str | None = None
        self._heard_s = float("-inf")
        self._heartbeat_at_s = float("-inf")
        self._wake_s = float("inf")
        self._trouble = _NO_TROUBLE

    # -- what callers want ------------------------------------------------------------------------------

    def open(self, request: Openable, now: float, payload: Frames = ()) -> Mailbox:
        """Send a request with its input frames; the mailbox gets its answer.

        Raises `CallerError` for a field of a wrong type.
        """
        header = _checked(request)
        if request.id in self._open:
            raise CallerError(f"request id {request.id!r} is in use; choose another", code="bad_request")
        if not self._open:
            self._heard_s = now  # silence is counted from when there was something to say
        give_up_at_s = _give_up_at_s(request, now, self._patience.deadline_grace_s)
        entry = _Open(request, now, now + self._patience.refresh_s, give_up_at_s, payload=payload)
        self._open[request.id] = entry
        self._outgoing.append((header, *payload))
        self._wake_at(min(self._heartbeat_at_s, entry.refresh_at_s, give_up_at_s))
        return entry.mailbox

    def cancel(self, request_id: str, now: float) -> None:
        """Take a request back. It is answered by the daemon, or by the session after a grace."""
        entry = self._open.get(request_id)
        if entry is None or entry.cancelled:
            return
        if not isinstance(entry.request, Generate):
            self._answer(request_id, Cancelled("cancelled", code="cancelled"))
            return
        entry.cancelled = True
        entry.give_up_at_s = min(entry.give_up_at_s, now + self._patience.cancel_grace_s)
        self._send(entry, now)
        self._wake_at(entry.give_up_at_s)

    def cancel_all(self, now: float) -> None:
        """Take every open request back: the client is closing."""
        for request_id in self.open_ids:
            self.cancel(request_id, now)

    def abandon(self, reason: str) -> None:
        """Answer everything that is open: no more messages will come."""
        for request_id in self.open_ids:
            self._answer(request_id, TransportError(reason, code="closed"))

    def refused(self, reason: str) -> None:
        """Answer everything that is open: the daemon does not let this client in."""
        message = f"the daemon at {self._endpoint} does not let this client in: {reason}"
        for request_id in self.open_ids:
            self._answer(request_id, NotAllowed(message, code="not_allowed"))

    def troubled(self, reason: str) -> None:
        """What to say when patience ends."""
        self._trouble = reason

    @property
    def open_ids(self) -> tuple[str, ...]:
        """Requests without an answer."""
        return tuple(self._open)

    # -- what the driver does ---------------------------------------------------------------------------

    def take_outgoing(self) -> list[Frames]:
        """Messages to send now, in order."""
        outgoing, self._outgoing = self._outgoing, []
        return outgoing

    def next_deadline_s(self) -> float | None:
        """When to call `tick` at the latest; None while nothing is open."""
        return self._wake_s if self._open else None

    def received(self, frames: list[bytes], now: float) -> None:
        """A message from the daemon. Never raises."""
        try:
            reply = decode_reply(frames[0])
        except WireError as error:
            if error.message_id in self._open:
                self._answer(error.message_id, TransportError(f"unreadable reply: {error}", code=error.code))
            return
        self._heard(reply, now)
        entry = self._open.get(reply.id)
        if entry is None:
            return  # answered already, or a heartbeat
        entry.refresh_at_s = now + self._patience.refresh_s
        if isinstance(reply, Failed) and reply.code == "inputs_missing" and entry.payload:
            if entry.asked_without_payload:  # else the whole request is on its way already
                self._send(entry, now)
        elif isinstance(reply, Accepted | Progress):
            entry.mailbox.put_hint(reply)
        else:
            self._answer(reply.id, _answer_from(reply, frames[1:], now - entry.opened_at_s))

    def tick(self, now: float) -> None:
        """Do what is due: heartbeats, sending again, giving up."""
        if now - self._heard_s >= self._patience.reconnect_s:
            self._give_up_all()
        silent = now - self._heard_s > self._patience.silence_s
        for request_id, entry in list(self._open.items()):
            if now >= entry.give_up_at_s:
                self._give_up(request_id, entry)
            elif now >= entry.refresh_at_s:
                entry.refresh_at_s = now + self._patience.refresh_s
                if not silent:  # in silence copies would only pile up in the socket
                    self._send(entry, now, is_question=True)
        if self._open and now >= self._heartbeat_at_s:
            self._heartbeat_at_s = now + self._patience.heartbeat_s
            self._outgoing.append((encode(Ping(id=HEARTBEAT_ID)),))
        self._wake_s = self._earliest()

    # -- inside -----------------------------------------------------------------------------------------

    def _heard(self, reply: Reply, now: float) -> None:
        """Something arrived: if what was sent before may be lost, send it again."""
        may_be_lost = now - self._heard_s > self._patience.silence_s
        self._heard_s, self._trouble = now, _NO_TROUBLE
        if isinstance(reply, Pong) and reply.daemon != self._daemon:
            may_be_lost |= self._daemon is not None
            self._daemon = reply.daemon
        if may_be_lost:
            for entry in self._open.values():
                self._send(entry, now)

    def _send(self, entry: _Open, now: float, *, is_question: bool = False) -> None:
        """Send again what was sent; a question leaves the images out, which the daemon most likely has."""
        request: Openable | Cancel = entry.request
        payload = () if is_question or entry.cancelled else entry.payload
        entry.asked_without_payload = is_question and bool(entry.payload)
        if entry.cancelled:
            request = Cancel(id=request.id)
        elif isinstance(request, Generate) and request.deadline_s is not None:
            left_s = request.deadline_s - (now - entry.opened_at_s)
            if left_s <= 0:
                return  # too late for anybody; the session gives up by itself
            request = msgspec.structs.replace(request, deadline_s=left_s)
        entry.refresh_at_s = now + self._patience.refresh_s
        self._outgoing.append((encode(request), *payload))

    def _give_up(self, request_id: str, entry: _Open) -> None:
        if entry.cancelled:
            self._answer(request_id, Cancelled("cancelled; the daemon did not confirm", code="cancelled"))
            return
        self._outgoing.append((encode(Cancel(id=request_id)),))
        deadline_s = entry.request.deadline_s if isinstance(entry.request, Generate) else None
        self._answer(
            request_id,
            DeadlineExceeded(
                f"the deadline of {deadline_s or 0:g} s passed without an answer; "
                "allow more time (deadline_s, --deadline) or ask for fewer steps",
                code="deadline_exceeded",
                retryable=True,
            ),
        )

    def _give_up_all(self) -> None:
        message = (
            f"no word from a daemon at {self._endpoint} for {self._patience.reconnect_s:g} s; {self._trouble}"
        )
        for request_id, entry in list(self._open.items()):
            # A daemon that comes back later must not run what nobody waits for.
            if isinstance(entry.request, Generate):
                self._outgoing.append((encode(Cancel(id=request_id)),))
            self._answer(request_id, TransportError(message, code="unreachable", retryable=True))

    def _answer(self, request_id: str, answer: Answer) -> None:
        if isinstance(answer, UnderstudyError):
            answer.request_id = request_id
        self._open.pop(request_id).mailbox.put_answer(answer)

    def _wake_at(self, at_s: float) -> None:
        self._wake_s = min(self._wake_s, at_s)

    def _earliest(self) -> float:
        due = [min(entry.refresh_at_s, entry.give_up_at_s) for entry in self._open.values()]
        return min([*due, self._heartbeat_at_s, self._heard_s + self._patience.reconnect_s])


def _checked(request: Openable) -> bytes:
    """The header, read back once: structs do not check their fields, the decoder does."""
    try:
        header = encode(request)
        decode_request(header)
    except (TypeError, ValueError, OverflowError) as error:
        why = _explained(request, str(error))
        raise CallerError(f"the request cannot be sent: {why}", code="bad_request") from error
    return header


def _explained(request: Openable, why: str) -> str:
    """The decoder's message, in Python's words where one field has a wrong type."""
    matched = _WRONG_TYPE.fullmatch(why)
    kinds = matched[1].split(" | ") if matched else []
    if matched is None or not all(kind in _WORDS for kind in kinds):
        return why
    value = getattr(request, matched[2])
    return f"{matched[2]} is {value!r:.40}; it must be {' or '.join(_WORDS[kind] for kind in kinds)}"


def _give_up_at_s(request: Openable, now: float, grace_s: float) -> float:
    """Infinity without a deadline, and with one that the daemon will refuse."""
    if isinstance(request, Generate) and request.deadline_s is not None and isfinite(request.deadline_s):
        return now + request.deadline_s + grace_s
    return float("inf")


def _answer_from(
    reply: Finished | Failed | ModelList | Pong, payload: list[bytes], elapsed_s: float
) -> Answer:
    match reply:
        case Finished():
            return result_from(reply, payload)
        case Failed(code=code, message=message, retryable=retryable):
            return error_from(code, message, retryable)
        case Pong(daemon=daemon):
            return Pinged(daemon=daemon, round_trip_s=elapsed_s)
        case ModelList():
            try:
                return [entry for frame in payload for entry in decode_entries(frame)]
            except WireError as error:
                return TransportError(str(error), code="bad_reply")

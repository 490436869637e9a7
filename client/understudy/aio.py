"""The asyncio client.

    async with AsyncClient() as client:
        result = await client.generate("sd15-anime", "a red circle", steps=20)
        async for event in client.stream("sd15-anime", "a blue square"):
            ...  # Accepted, Progress, ..., Result

One client is one ZeroMQ connection and belongs to one event loop; it may carry any number of requests
at a time. See `session.py` for what it survives.
"""

import asyncio
import itertools
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from types import TracebackType
from typing import Self, Unpack, cast

import zmq

from understudy.errors import CallerError, TransportError, UnderstudyError
from understudy.handshake import HandshakeWatch, use_keys
from understudy.keys import Keys
from understudy.many import check_in_flight, outcome
from understudy.paths import RECONNECT_S, default_endpoint
from understudy.request import Request, RequestFields, compose, parts_of
from understudy.results import Answer, Hint, Pinged, Result
from understudy.session import Mailbox, Openable, Patience, Session
from understudy.wire import Generate, ListModels, ModelEntry, Ping

_MESSAGES_PER_TURN = 64
# Numbers, not pyzmq's flags: to combine those takes microseconds, several times a request.
_NOBLOCK, _POLLIN = int(zmq.NOBLOCK), int(zmq.POLLIN)
_FAREWELL_MS = 250


class AsyncHandle:
    """One submitted request."""

    def __init__(self, client: "AsyncClient", request: Generate, mailbox: Mailbox) -> None:
        self._client = client
        self._mailbox = mailbox
        self._news = asyncio.Event()
        mailbox.wake = self._news.set
        self.id = request.id
        self.seed = request.seed

    async def result(self) -> Result:
        """Wait for the images. Raises `UnderstudyError` when there are none."""
        while not isinstance(event := await self.next_event(), Result):
            pass
        return event

    async def events(self) -> AsyncIterator[Hint | Result]:
        """`Accepted` and `Progress` as they come, then `Result`. Raises `UnderstudyError` instead of it."""
        while True:
            yield (event := await self.next_event())
            if isinstance(event, Result):
                return

    def __aiter__(self) -> AsyncIterator[Hint | Result]:
        return self.events()

    async def next_event(self) -> Hint | Result:
        """The next event; once there is an answer, that answer again and again."""
        while (hint := self._mailbox.take_hint()) is None and self._mailbox.answer is None:
            self._news.clear()
            await self._news.wait()
        return hint or _result_or_raise(self._mailbox.answer)

    @property
    def done(self) -> bool:
        """Whether the answer is there."""
        return self._mailbox.answer is not None

    def cancel(self) -> None:
        """Take the request back; `result()` then raises `Cancelled`, unless it was finished before."""
        self._client._cancel(self.id)


class AsyncClient:
    """Asks a daemon for images.

    `endpoint` is where the daemon listens (default: see `paths.py`); `timeout_s` the deadline of every
    request that names none (None: as long as the daemon is there); `reconnect_s` how long to wait for a
    daemon that cannot be reached before all open requests fail with `TransportError`; `keys` are for a
    `tcp://` endpoint that asks for them (default: the files that the environment names, see `keys.py`).
    """

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        timeout_s: float | None = None,
        reconnect_s: float = RECONNECT_S,
        patience: Patience | None = None,
        keys: Keys | None = None,
    ) -> None:
        self.endpoint = endpoint or default_endpoint()
        self._keys = keys or (Keys.from_environment() if self.endpoint.startswith("tcp:") else None)
        self._timeout_s = timeout_s
        self._session = Session(self.endpoint, patience or Patience(reconnect_s=reconnect_s))
        # The daemon knows this client by its routing id, which must outlive any one connection.
        self._routing_id = uuid.uuid4().hex.encode()
        self._wire: _Wire | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        self._connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- requests -----------------------------------------------------------------------------------------

    async def generate(self, model: str, prompt: str = "", **fields: Unpack[RequestFields]) -> Result:
        """Images for a prompt. Cancelling the task cancels the request. Raises `UnderstudyError`.

        Fields, all optional: `negative_prompt`, `seed`, `size` or `width` and `height`, `steps`, `guidance`,
        `images`, `adapters`, `scheduler`, `options`; `image`, `mask`, `control_image`, `inputs`, `task`;
        `format`, `quality`, `progress`; `priority`, `deadline_s`, `request_id`.
        `understudy.request.RequestFields` explains them.
        """
        fields.setdefault("progress", False)
        handle = await self.submit(model, prompt, **fields)
        try:
            return await handle.result()
        finally:
            if not handle.done:
                handle.cancel()

    async def stream(
        self, model: str, prompt: str = "", **fields: Unpack[RequestFields]
    ) -> AsyncGenerator[Hint | Result, None]:
        """`Accepted`, `Progress`, ..., `Result`. Leaving the loop early cancels the request."""
        handle = await self.submit(model, prompt, **fields)
        try:
            async for event in handle:
                yield event
        finally:
            handle.cancel()

    async def submit(self, model: str, prompt: str = "", **fields: Unpack[RequestFields]) -> AsyncHandle:
        """Send a request and return at once; `RequestFields` says what it may ask for.

        Raises `CallerError` for an unknown field, a wrong type, or an input that is no image.
        """
        request, payload = compose(model, prompt, fields, self._timeout_s)
        return AsyncHandle(self, request, self._open(request, payload))

    async def generate_many(
        self,
        requests: Iterable[Request | tuple[str, str]],
        *,
        in_flight: int = 32,
        ordered: bool = False,
        return_errors: bool = False,
    ) -> AsyncGenerator[Result | UnderstudyError, None]:
        """Results as they finish, or in the order of `requests`, with `in_flight` of them open at most.

        A request is a dict (see `Request`) or (model, prompt); the iterable is read as there is room. A
        result's `id`, and an error's `request_id`, is the `request_id` that was given. The first error ends
        it, unless `return_errors` has errors take the place of results. Leaving early cancels the rest.
        """
        source = iter(requests)
        waiting: dict[asyncio.Task[Result], None] = {}
        check_in_flight(in_flight)
        try:
            while True:
                for request in itertools.islice(source, in_flight - len(waiting)):
                    waiting[asyncio.ensure_future(self._generate_one(request))] = None
                if not waiting:
                    return
                among = [next(iter(waiting))] if ordered else list(waiting)
                done, _ = await asyncio.wait(among, return_when=asyncio.FIRST_COMPLETED)
                task = done.pop()
                del waiting[task]
                yield outcome(task, return_errors)
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def models(self) -> list[ModelEntry]:
        """What may be asked for, with tiers. Raises `TransportError`."""
        answer = await self._ask(ListModels(id=uuid.uuid4().hex))
        assert isinstance(answer, list), answer
        return answer

    async def ping(self) -> Pinged:
        """Is the daemon there, and how far? Raises `TransportError`."""
        answer = await self._ask(Ping(id=uuid.uuid4().hex))
        assert isinstance(answer, Pinged), answer
        return answer

    def close(self) -> None:
        """Take all open requests back and disconnect. Waits at most a quarter of a second."""
        self._closed = True
        if self._wire is None:
            return
        self._session.cancel_all(self._wire.now())
        self._wire.pump()
        self._wire.close(_FAREWELL_MS)
        self._session.abandon("the client was closed")
        self._wire = None

    # -- inside -------------------------------------------------------------------------------------------

    def _connect(self) -> "_Wire":
        if self._closed:
            raise TransportError("this client was closed; make another", code="closed")
        if self._wire is not None and self._wire.was_refused:
            self._wire.close(0)  # ZeroMQ does not try again; perhaps the daemon knows the key by now
            self._wire = None
        if self._wire is None:
            self._wire = _Wire(self._session, self.endpoint, self._routing_id, self._keys)
        return self._wire

    async def _generate_one(self, request: Request | tuple[str, str]) -> Result:
        model, prompt, fields = parts_of(request)
        try:
            return await self.generate(model, prompt, **cast(RequestFields, fields))
        except UnderstudyError as error:
            error.request_id = error.request_id or fields.get("request_id") or ""
            raise

    def _open(self, request: Openable, payload: tuple[bytes, ...] = ()) -> Mailbox:
        wire = self._connect()
        mailbox = self._session.open(request, wire.now(), payload)
        wire.pump()
        return mailbox

    def _cancel(self, request_id: str) -> None:
        if self._wire is not None:
            self._session.cancel(request_id, self._wire.now())
            self._wire.pump()

    async def _ask(self, request: ListModels | Ping) -> Answer:
        mailbox = self._open(request)
        news = asyncio.Event()
        mailbox.wake = news.set
        try:
            while mailbox.answer is None:
                news.clear()
                await news.wait()
        finally:
            self._cancel(request.id)
        if isinstance(mailbox.answer, UnderstudyError):
            raise mailbox.answer
        return mailbox.answer


class _Wire:
    """Moves frames between a session and a DEALER socket on the running event loop."""

    def __init__(self, session: Session, endpoint: str, routing_id: bytes, keys: Keys | None) -> None:
        self._loop = asyncio.get_running_loop()
        self._session = session
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._timer: asyncio.TimerHandle | None = None
        self._turn: asyncio.Handle | None = None
        self.was_refused = False
        self._watch = self._watch_handshakes(keys) if endpoint.startswith("tcp:") else None
        self._socket.setsockopt(zmq.ROUTING_ID, routing_id)
        # What waits to be sent is bounded by the caller's own open requests, so a send never blocks.
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self._release(0)
            raise CallerError(
                f"{endpoint!r} is no endpoint ({error}); write ipc:///path or tcp://host:port",
                code="bad_endpoint",
            ) from error
        self._fd = int(self._socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self._read)

    @staticmethod
    def now() -> float:
        return time.monotonic()

    def pump(self) -> None:
        """Send what the session wants sent and come back when it wants to be woken."""
        self._send()
        self._rearm()

    def close(self, linger_ms: int) -> None:
        for pending in (self._timer, self._turn):
            if pending is not None:
                pending.cancel()
        self._loop.remove_reader(self._fd)
        self._release(linger_ms)

    def _release(self, linger_ms: int) -> None:
        if self._watch is not None:
            self._watch.close()
        self._socket.close(linger=linger_ms)
        self._context.term()

    def _watch_handshakes(self, keys: Keys | None) -> HandshakeWatch:
        if keys is not None:
            use_keys(self._socket, keys)
        return HandshakeWatch(
            self._loop, self._socket, keys, refused=self._refused, troubled=self._session.troubled
        )

    def _refused(self, reason: str) -> None:
        self.was_refused = True
        self._session.refused(reason)

    def _read(self) -> None:
        self._turn = None
        for _ in range(_MESSAGES_PER_TURN):
            if not self._has_message():
                break
            self._session.received(self._socket.recv_multipart(_NOBLOCK), self.now())
        self.pump()

    def _send(self) -> None:
        due_s = self._session.next_deadline_s()
        if due_s is not None and due_s <= self.now():
            self._session.tick(self.now())
        for frames in self._session.take_outgoing():
            self._socket.send_multipart(frames, _NOBLOCK)

    def _has_message(self) -> bool:
        return bool(int(self._socket.get(zmq.EVENTS)) & _POLLIN)

    def _rearm(self) -> None:
        # The descriptor signals an edge only: after each send and receive the socket itself is asked.
        if self._turn is None and self._has_message():
            self._turn = self._loop.call_soon(self._read)
        due_s = self._session.next_deadline_s()
        if due_s is None:
            return
        at = self._loop.time() + max(0.0, due_s - self.now())
        if self._timer is not None:
            if not self._timer.cancelled() and self._timer.when() <= at:
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(at, self._wake)

    def _wake(self) -> None:
        self._timer = None
        self.pump()


def _result_or_raise(answer: Answer | None) -> Result:
    if isinstance(answer, UnderstudyError):
        raise answer
    assert isinstance(answer, Result), answer
    return answer

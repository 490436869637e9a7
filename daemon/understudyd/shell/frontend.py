"""The daemon's ZeroMQ front end: checks requests, hands them to a sink once, and carries the answers back.

It keeps the protocol's promise on this side: within the daemon's life an id runs once and is answered once.
A request that comes again while it is open gets its last `Accepted` again; one that was answered gets the
same answer again, as long as the client's outbox holds it.

A client is its ZeroMQ routing id. It is *gone* when it cannot be reached, when it has been silent for
`client_timeout_s` with requests open, or when it did not read for as long: the sink hears of it, and its
ids are forgotten. When it comes back it is a new client (another name to the sink), so that what the
old one's cancelled requests still say cannot answer the new one's.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence

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
    decode_request,
    encode,
    encode_entries,
    peek_id,
)
from understudyd.shell.answers import answer_frames, dropped, readable
from understudyd.shell.client_book import Client, Counters, UserBook
from understudyd.shell.curve import ServerKeys
from understudyd.shell.endpoints import check_endpoint
from understudyd.shell.input_room import InputRoom
from understudyd.shell.limits import ID_RULE, Limits, is_id, refusal
from understudyd.shell.outbox import Outbox
from understudyd.shell.ports import RequestSink
from understudyd.shell.router import Router, Sent
from understudyd.shell.socket_access import SocketAccess
from understudyd.shell.work_room import WorkRoom, work_asked

_log = logging.getLogger(__name__)

_RETRY_S = 0.02
_SWEEP_S = 1.0
_PEEK_BYTES = 1024 * 1024
_ENTRIES_PER_FRAME = 512
_MISSING = "the input images are missing, and this request is not known here; send it whole"


class Frontend:
    """See the module's text. `start` listens; every method belongs to the loop's thread.

    `endpoints` are `ipc:///path` or `tcp://`, with `keys` where others than this machine's users can reach
    them; `daemon_id` must differ in each daemon's life. Implements `ReplySink`. Raises `EndpointError`.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        endpoints: Sequence[str],
        sink: RequestSink,
        *,
        limits: Limits,
        daemon_id: str,
        clock: Callable[[], float] = time.monotonic,
        access: SocketAccess | None = None,
        keys: ServerKeys | None = None,
        directory_mode: int = 0o700,
        flood_bytes: int = 512 * 1024 * 1024,
    ) -> None:
        for endpoint in endpoints:
            check_endpoint(endpoint, has_keys=keys is not None)
        self._loop = loop
        self._wanted = tuple(endpoints)
        self._sink = sink
        self._limits = limits
        self._clock = clock
        self._access, self._keys, self._directory_mode = access, keys, directory_mode
        self._flood_bytes = flood_bytes
        self._daemon_id = daemon_id
        self._by_identity: dict[bytes, Client] = {}
        self._by_name: dict[str, Client] = {}
        self._users = UserBook()
        self._blocked: set[str] = set()
        self._touched: dict[str, Client] | None = None  # while a message is handled, who has a reply coming
        self._serial = 0
        self._input_room = InputRoom(limits.max_open_input_bytes, limits.max_all_input_bytes)
        self._work_room = WorkRoom(limits.max_open_work)
        self._retry: asyncio.TimerHandle | None = None
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._swept_at_s = 0.0
        self._router: Router | None = None
        self.counters = Counters()

    def change_limits(self, limits: Limits) -> None:
        """From now on; who is connected keeps the outbox that it has."""
        self._limits = limits
        self._input_room.change(limits.max_open_input_bytes, limits.max_all_input_bytes)
        self._work_room.most = limits.max_open_work
        if self._router is not None:
            self._router.change_max_connections(limits.max_connections)

    def start(self) -> list[str]:
        """Listen; returns the endpoints with wildcard ports filled in. Raises `EndpointError`."""
        self._router = Router(
            self._loop,
            self._wanted,
            self._on_message,
            self._flush_blocked,
            together=self._sink.together,
            max_payload_frames=self._limits.inputs.max_inputs,
            max_frame_bytes=self._limits.max_frame_bytes,
            send_high_water_mark=self._limits.send_high_water_mark,
            receive_high_water_mark=self._limits.receive_high_water_mark,
            access=self._access,
            keys=self._keys,
            directory_mode=self._directory_mode,
            max_connections=self._limits.max_connections,
            flood_bytes=self._flood_bytes,
            explained_bytes=lambda: self._input_room.held_bytes,
        )
        self._swept_at_s = self._clock()
        self._rearm_sweep()
        return self._router.endpoints

    def close(self, linger_s: float = 0.0) -> None:
        """Stop listening. Answers given to the socket may still leave for `linger_s`, which blocks."""
        for timer in (self._retry, self._sweep_timer):
            if timer is not None:
                timer.cancel()
        if self._router is not None:
            self._router.close(linger_s)
        self._router = None
        self._by_identity.clear()
        self._by_name.clear()

    def admit(self, clients: Mapping[str, str]) -> None:
        """Another list of client keys, names by public key, for who connects from now on."""
        if self._router is not None:
            self._router.admit(clients)

    @property
    def clients(self) -> int:
        """Clients that were heard of lately."""
        return len(self._by_name)

    @property
    def unsent(self) -> int:
        """Messages that wait for their clients to read."""
        return sum(len(client.outbox) for client in self._by_name.values())

    # -- from the runtime -----------------------------------------------------------------------------------

    def send(self, client: str, reply: Reply, payload: Sequence[bytes] = ()) -> None:
        """Queue a reply. Ignored: clients that are gone, second answers, hints after the answer."""
        known = self._by_name.get(client)
        if known is None or reply.id not in known.open:
            return
        now = self._clock()
        match reply:
            case Accepted():
                known.open[reply.id] = reply
                known.outbox.put_hint(reply.id, "accepted", (encode(reply),), now)
            case Progress():
                known.outbox.put_hint(reply.id, "progress", (encode(reply),), now)
            case Finished() | Failed():
                if self._touched is not None:
                    self._flush(known)  # a hint that waits would be dropped for the answer
                del known.open[reply.id]
                self._users.closed(known.user)
                self._give_back(client, reply.id)
                self.counters.answered += 1
                frames = answer_frames(reply, payload)
                known.outbox.put_answer(reply.id, ("accepted", "progress"), frames, now)
            case Pong() | ModelList():
                raise AssertionError(f"the front end answers this itself: {reply}")
        if self._touched is None:
            self._flush(known)
        else:
            self._touched[known.name] = known

    # -- from the socket ------------------------------------------------------------------------------------

    def _on_message(self, identity: bytes, frames: list[bytes], user: str) -> None:
        """Replies leave once all is done that the message asks for: the stage has begun by then."""
        self.counters.received += 1
        client = self._client(identity, user)
        self._touched = touched = {client.name: client}
        try:
            self._handle(client, frames)
        finally:
            self._touched = None
        for one in touched.values():
            self._flush(one)

    def _handle(self, client: Client, frames: list[bytes]) -> None:
        header = frames[0] if frames else b""
        try:
            request = decode_request(header)
        except WireError as error:
            self._unreadable(client, header, error)
            return
        if not is_id(request.id):
            self._refuse(
                client, "", "bad_request", f"request id {request.id!r:.80} is not allowed; {ID_RULE}"
            )
            return
        match request:
            case Generate():
                self._generate(client, request, frames[1:])
            case Cancel(id=request_id):
                self._cancel(client, request_id)
            case ListModels(id=request_id):
                entries = self._sink.models()
                chunks = [
                    entries[i : i + _ENTRIES_PER_FRAME] for i in range(0, len(entries), _ENTRIES_PER_FRAME)
                ]
                payload = tuple(encode_entries(chunk) for chunk in chunks)
                client.outbox.put_notice(
                    request_id, (encode(ModelList(id=request_id)), *payload), self._clock()
                )
            case Ping(id=request_id):
                pong = encode(Pong(id=request_id, daemon=self._daemon_id))
                client.outbox.put_hint(request_id, "pong", (pong,), self._clock())

    def _generate(self, client: Client, request: Generate, payload: Sequence[bytes]) -> None:
        request_id = request.id
        if self._repeat(client, request_id):
            return
        if request.inputs and not payload:
            self._refuse(client, request_id, "inputs_missing", _MISSING, retryable=True)
        elif message := refusal(request, payload, self._limits):
            self._refuse(client, request_id, "bad_request", message)
        elif message := self._no_room(client, request, payload):
            self._give_back(client.name, request_id)
            self._refuse(client, request_id, "queue_full", message, retryable=True)
        else:
            client.open[request_id] = None
            self._users.opened(client.user)
            self.counters.submitted += 1
            self._sink.submit(client.name, request, payload)

    def _no_room(self, client: Client, request: Generate, payload: Sequence[bytes]) -> str | None:
        """Why this client must wait before it asks for more; None books the room."""
        if len(client.open) >= self._limits.max_open_per_client:
            return (
                f"{len(client.open)} requests of this client are open, which is the limit; wait for answers"
            )
        if (count := self._users.open_requests(client.user)) >= self._limits.max_open_per_user:
            return f"{count} requests of {client.user} are open, which is the limit; wait for answers"
        return self._work_room.take(client.name, request.id, work_asked(request)) or self._input_room.take(
            client.name, request.id, sum(map(len, payload))
        )

    def _give_back(self, client: str, request_id: str) -> None:
        self._work_room.give_back(client, request_id)
        self._input_room.give_back(client, request_id)

    def _repeat(self, client: Client, request_id: str) -> bool:
        """A request that is known already: say again what was said last."""
        if request_id in client.open:
            if (accepted := client.open[request_id]) is not None:
                client.outbox.put_hint(request_id, "accepted", (encode(accepted),), self._clock())
        elif client.outbox.is_answered(request_id):
            client.outbox.repeat(request_id, self._clock())
        else:
            return False
        self.counters.repeated += 1
        return True

    def _cancel(self, client: Client, request_id: str) -> None:
        if request_id in client.open:
            self._sink.cancel(client.name, request_id)
        elif not self._repeat(client, request_id):
            self._refuse(client, request_id, "cancelled", "cancelled; no such request was open here")

    def _unreadable(self, client: Client, header: bytes, error: WireError) -> None:
        self.counters.unreadable += 1
        request_id = error.message_id or (peek_id(header) if len(header) <= _PEEK_BYTES else "")
        self._refuse(client, request_id, error.code, str(error))

    def _refuse(
        self, client: Client, request_id: str, code: str, message: str, *, retryable: bool = False
    ) -> None:
        self.counters.refused += 1
        failed = Failed(id=request_id, code=code, message=message, retryable=retryable)
        client.outbox.put_notice(request_id, answer_frames(failed), self._clock())

    # -- clients --------------------------------------------------------------------------------------------

    def _client(self, identity: bytes, user: str) -> Client:
        client = self._by_identity.get(identity)
        if client is not None and client.user != user:
            self._gone(client, f"{user} has taken the routing id of {client.user}")
            client = None
        if client is None:
            self._serial += 1
            outbox = Outbox(self._limits.outbox_bytes, self._limits.answer_ttl_s)
            client = Client(f"{readable(identity)}#{self._serial}", identity, user, 0.0, outbox)
            self._by_identity[identity] = self._by_name[client.name] = client
        client.heard_at_s = self._clock()
        return client

    def _flush(self, client: Client) -> None:
        """Give the socket what it takes, then hold the cap."""
        if self._router is None or client.name not in self._by_name:
            return
        while (frames := client.outbox.head) is not None:
            sent = self._router.send(client.identity, frames)
            if sent is Sent.GONE:
                self._gone(client, "it cannot be reached")
                return
            if sent is Sent.FULL:
                self._block(client)
                break
            client.outbox.sent(self._clock())
        self._hold_cap(client)

    def _hold_cap(self, client: Client) -> None:
        """A client that reads too slowly for its images still gets an answer, a small one."""
        replaced: set[str] = set()
        while lost := set(client.outbox.trim()) - replaced:
            replaced |= lost
            self.counters.answers_lost += len(lost)
            for request_id in lost:
                failed = dropped(request_id, self._limits.outbox_bytes)
                client.outbox.put_answer(request_id, (), answer_frames(failed), self._clock())

    def _block(self, client: Client) -> None:
        self._blocked.add(client.name)
        if self._retry is None:
            self._retry = self._loop.call_later(_RETRY_S, self._try_again)

    def _try_again(self) -> None:
        self._retry = None
        self._flush_blocked()

    def _flush_blocked(self) -> None:
        blocked, self._blocked = self._blocked, set()
        for name in blocked:
            if (client := self._by_name.get(name)) is not None:
                self._flush(client)

    def _gone(self, client: Client, reason: str) -> None:
        """Forget a client. The sink hears of it in a turn of its own: it may be in the middle of a send."""
        self._forget(client)
        self.counters.clients_gone += 1
        # Whoever leaves messages behind comes and goes with each of them: no reason to fill the log.
        level = logging.INFO if client.open else logging.DEBUG
        _log.log(level, "client %s is gone with %d open requests: %s", client.name, len(client.open), reason)
        if client.open:
            self._loop.call_soon(self._sink.client_gone, client.name)

    def _forget(self, client: Client) -> None:
        self._users.closed(client.user, len(client.open))
        self._work_room.forget(client.name)
        self._input_room.forget(client.name)
        del self._by_name[client.name]
        del self._by_identity[client.identity]

    def _rearm_sweep(self) -> None:
        every_s = min(_SWEEP_S, self._limits.client_timeout_s / 4)
        self._sweep_timer = self._loop.call_later(every_s, self._sweep_and_rearm)

    def _sweep_and_rearm(self) -> None:
        self._rearm_sweep()
        self.sweep()

    def sweep(self) -> None:
        """Expire answers and clients; runs by itself."""
        now = self._clock()
        stalled = now - self._swept_at_s > self._limits.client_timeout_s / 2
        self._swept_at_s = now
        if stalled:
            return  # this loop did not run: what the clients said meanwhile is still to be read
        for client in list(self._by_name.values()):
            client.outbox.expire(now)
            self._judge(client, now - self._limits.client_timeout_s)

    def _judge(self, client: Client, since_s: float) -> None:
        waiting_since_s = client.outbox.waiting_since_s
        if waiting_since_s is not None and waiting_since_s <= since_s:
            self._gone(client, f"it has read nothing for {self._limits.client_timeout_s:g} s")
        elif client.heard_at_s > since_s:
            return
        elif client.open:
            self._gone(client, f"it has been silent for {self._limits.client_timeout_s:g} s")
        elif client.outbox.is_empty:
            self._forget(client)

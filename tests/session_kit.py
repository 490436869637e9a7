"""A session with a clock in hand, and all that it sends."""

from understudy.session import HEARTBEAT_ID, Mailbox, Patience, Session
from understudy.wire import Generate, ListModels, Message, Ping, Pong, Request, decode_request, encode

PATIENCE = Patience(heartbeat_s=1, silence_s=3, reconnect_s=30, refresh_s=10, deadline_grace_s=2)


class Driven:
    """A session with a clock in hand."""

    def __init__(self) -> None:
        self.now = 100.0
        self.session = Session("ipc:///test", PATIENCE)
        self.sent: list[tuple[Request, tuple[bytes, ...]]] = []
        self.payloads: list[tuple[bytes, ...]] = []  # of each Generate that was sent, in order

    def open(self, wish: Generate | ListModels | Ping, *payload: bytes) -> Mailbox:
        mailbox = self.session.open(wish, self.now, payload)
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
        for frames in self.session.take_outgoing():
            message = decode_request(frames[0])
            self.sent.append((message, frames[1:]))
            if isinstance(message, Generate):
                self.payloads.append(frames[1:])

    def take(self, kind: type) -> list[Request]:
        taken = [message for message, _ in self.sent if isinstance(message, kind)]
        self.sent = [sent for sent in self.sent if not isinstance(sent[0], kind)]
        return taken

"""What the daemon still has to say to one client, and the answers it may have to repeat. Pure.

Three kinds of messages. *Hints* (accepted, progress, pong) are worth their newest value only: a second one
of the same kind replaces the first where it stands. *Answers* end a request; once sent they are kept for a
while, because a client whose connection broke asks again. *Notices* are short replies (a refusal, a list)
that are not kept: the client simply asks again.

Answers and notices leave before hints. The byte cap covers everything held here, kept answers included;
what is dropped for it, the oldest first in each: hints, kept answers, unsent answers and notices. Hints and
notices together have a cap of their own, a small one: they cost their sender nothing, and who does not read
them gets no more. A client asks again for what it misses.
"""

from collections import OrderedDict
from dataclasses import dataclass

Frames = tuple[bytes, ...]

_OVERHEAD_BYTES = 512
"""What holding one message costs beside its frames, roughly: a flood of tiny ones counts too."""
MAX_TALK_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class _Item:
    frames: Frames
    at_s: float  # unsent: since when; kept: until when
    is_answer: bool = False

    @property
    def size_bytes(self) -> int:
        return sum(map(len, self.frames)) + _OVERHEAD_BYTES


class Outbox:
    """Unsent messages, and sent answers by request id."""

    def __init__(self, max_bytes: int, answer_ttl_s: float, max_talk_bytes: int = MAX_TALK_BYTES) -> None:
        self._max_bytes = max_bytes
        self._max_talk_bytes = max_talk_bytes
        self._answer_ttl_s = answer_ttl_s
        self._hints: OrderedDict[tuple[str, str], _Item] = OrderedDict()
        self._replies: OrderedDict[str, _Item] = OrderedDict()
        self._kept: OrderedDict[str, _Item] = OrderedDict()
        self.size_bytes = 0
        self._talk_bytes = 0

    # -- in -----------------------------------------------------------------------------------------------

    def put_hint(self, request_id: str, kind: str, frames: Frames, now: float) -> None:
        """Queue a hint, or bring the one of this kind that still waits up to date."""
        old = self._hints.get((request_id, kind))
        item = _Item(frames, old.at_s if old else now)
        if old is None and not self._has_room_for_talk(item):
            return
        self._add(-old.size_bytes if old else 0, is_talk=True)
        self._hints[request_id, kind] = item
        self._add(item.size_bytes, is_talk=True)

    def put_notice(self, request_id: str, frames: Frames, now: float) -> None:
        """Queue a reply that is not kept; it never takes the place of an answer."""
        item = _Item(frames, now)
        if not self.is_answered(request_id) and self._has_room_for_talk(item):
            self._put(request_id, item)

    def put_answer(self, request_id: str, kinds: tuple[str, ...], frames: Frames, now: float) -> None:
        """Queue the end of a request; its hints of these kinds are pointless from now on."""
        for kind in kinds:
            if (hint := self._hints.pop((request_id, kind), None)) is not None:
                self._add(-hint.size_bytes, is_talk=True)
        self._put(request_id, _Item(frames, now, is_answer=True))

    def repeat(self, request_id: str, now: float) -> None:
        """Queue a kept answer again; an unsent one waits already."""
        if (kept := self._kept.pop(request_id, None)) is not None:
            self._replies[request_id] = _Item(kept.frames, now, is_answer=True)

    # -- out ----------------------------------------------------------------------------------------------

    @property
    def head(self) -> Frames | None:
        """The message to send next."""
        item = next(iter(self._replies.values()), None) or next(iter(self._hints.values()), None)
        return item.frames if item else None

    @property
    def waiting_since_s(self) -> float | None:
        """When the head was queued."""
        item = next(iter(self._replies.values()), None) or next(iter(self._hints.values()), None)
        return item.at_s if item else None

    def sent(self, now: float) -> None:
        """The head is out: forget it, or keep it if it is an answer."""
        if not self._replies:
            self._add(-self._hints.popitem(last=False)[1].size_bytes, is_talk=True)
            return
        request_id, item = self._replies.popitem(last=False)
        if item.is_answer:
            self._kept[request_id] = _Item(item.frames, now + self._answer_ttl_s)
        else:
            self._add(-item.size_bytes, is_talk=True)

    # -- limits -------------------------------------------------------------------------------------------

    def trim(self) -> list[str]:
        """Drop until the cap holds; returns the requests whose answer was lost before it was sent."""
        lost = []
        while self.size_bytes > self._max_bytes:
            if self._hints:
                self._add(-self._hints.popitem(last=False)[1].size_bytes, is_talk=True)
            elif self._kept:
                self._add(-self._kept.popitem(last=False)[1].size_bytes)
            else:
                request_id, item = self._replies.popitem(last=False)
                self._add(-item.size_bytes, is_talk=not item.is_answer)
                if item.is_answer:
                    lost.append(request_id)
        return lost

    def expire(self, now: float) -> None:
        """Forget kept answers whose time to live is over."""
        while self._kept and next(iter(self._kept.values())).at_s <= now:
            self._add(-self._kept.popitem(last=False)[1].size_bytes)

    # -- questions ----------------------------------------------------------------------------------------

    def is_answered(self, request_id: str) -> bool:
        """Whether the answer of this request is held here, sent or not."""
        waiting = self._replies.get(request_id)
        return request_id in self._kept or (waiting is not None and waiting.is_answer)

    @property
    def is_empty(self) -> bool:
        """Nothing to send and nothing to repeat."""
        return not (self._hints or self._replies or self._kept)

    def __len__(self) -> int:
        """Unsent messages."""
        return len(self._hints) + len(self._replies)

    def _put(self, request_id: str, item: _Item) -> None:
        for held in (self._replies, self._kept):
            if (old := held.pop(request_id, None)) is not None:
                self._add(-old.size_bytes, is_talk=not old.is_answer and held is self._replies)
        self._replies[request_id] = item
        self._add(item.size_bytes, is_talk=not item.is_answer)

    def _has_room_for_talk(self, item: _Item) -> bool:
        """One that is larger than all the room gets in where nothing else is: a long list of models."""
        return not self._talk_bytes or self._talk_bytes + item.size_bytes <= self._max_talk_bytes

    def _add(self, size_bytes: int, *, is_talk: bool = False) -> None:
        self.size_bytes += size_bytes
        if is_talk:
            self._talk_bytes += size_bytes

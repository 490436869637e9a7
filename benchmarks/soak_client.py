"""One client process of `benchmarks.soak`: `python -m benchmarks.soak_client ENDPOINT WISHES JOURNAL SEED`.

Asks for one image after the other, several at a time, some of them urgent, some with a deadline, some taken
back; now and then it leaves and comes back as another client. It ends when its standard input does, once all
that is open has been answered. Every step goes into the journal at once, as a line that outlives `kill -9`.
No torch here.
"""

import asyncio
import hashlib
import os
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from understudy import AsyncClient
from understudy.errors import UnderstudyError
from understudy.wire import Cancel, Failed, Finished, Generate, WireError, decode_reply, decode_request

WORKERS = 3
ASKS_PER_LIFE = 12
RECONNECT_S = 60.0
STEPS, SIDE_PX = 2, 32
STRENGTH = 0.75
PROMPT = "a red circle"
CANCELLED_SHARE, HURRIED_SHARE = 0.1, 0.05
CANCELLED_WITHIN_S = HURRY_S = 0.3


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What an image depends on. `image` is a file's bytes to begin with.

    `right` are the hashes that the image may have: one for each edition of a model that is replaced.
    A `guest` comes and goes: whoever asks may be told that it is not there.
    """

    model: str
    seed: int
    right: tuple[str, ...]
    adapters: tuple[tuple[str, float], ...] = ()
    image: bytes | None = None
    guest: bool = False


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the journal. `step` is "asked", "image", "again" (one answer too many) or an error's code.

    `excuses` are the errors that the client has brought about itself.
    """

    id: str
    wish: int
    step: str
    sha256: str = ""
    message: str = ""
    excuses: tuple[str, ...] = ()


class Journal:
    """Writes entries, each whole."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def note(self, entry: Entry) -> None:
        os.write(self._fd, msgspec.json.encode(entry) + b"\n")


def entries(path: Path) -> list[Entry]:
    """What a journal says; a client that was killed early has none."""
    return msgspec.json.Decoder(Entry).decode_lines(path.read_bytes()) if path.exists() else []


class Ears:
    """Counts on the wire what was asked and what was answered, by id: no asking has more than one answer.

    Asked for again, by a client that hears nothing or takes back what has just been done, it is said again.
    """

    def __init__(self, client: Any, journal: Journal) -> None:
        self._journal = journal
        self._asked: Counter[str] = Counter()
        self._answered: Counter[str] = Counter()
        session = client._session
        self._received, self._take = session.received, session.take_outgoing
        session.received, session.take_outgoing = self._hear, self._say

    def _say(self) -> Any:
        outgoing = self._take()
        for header, *_ in outgoing:
            if isinstance(message := decode_request(header), Generate | Cancel):
                self._asked[message.id] += 1
        return outgoing

    def _hear(self, frames: list[bytes], now: float) -> None:
        try:
            reply = decode_reply(frames[0])
        except WireError as error:
            self._journal.note(Entry(id="", wish=-1, step="unreadable", message=str(error)))
            return
        if isinstance(reply, Finished | Failed):
            self._answered[reply.id] += 1
            if self._answered[reply.id] > self._asked[reply.id]:
                self._journal.note(Entry(id=reply.id, wish=-1, step="again"))
        self._received(frames, now)


class Asker:
    """Asks at random, as `dice` says, which makes a run with the same seed ask much the same."""

    def __init__(self, wishes: list[Wish], journal: Journal, name: str, seed: int) -> None:
        self._wishes = wishes
        self._journal = journal
        self._name = name
        self._dice = random.Random(seed)
        self._asked = 0

    async def ask_once(self, client: Any) -> None:
        """One request; the journal has it before it is sent and once it is answered."""
        dice = self._dice
        number = dice.randrange(len(self._wishes))
        wish = self._wishes[number]
        self._asked += 1
        name = f"{self._name}-{self._asked}"
        fields: dict[str, Any] = {
            "request_id": name,
            "seed": wish.seed,
            "steps": STEPS,
            "format": "raw",
            "adapters": wish.adapters,
            "priority": dice.choice([-1, 0, 0, 0, 1]),
            "progress": dice.random() < 0.5,
        }
        if wish.image is None:
            fields |= {"width": SIDE_PX, "height": SIDE_PX}
        else:
            fields |= {"image": wish.image, "options": {"strength": STRENGTH}}
        excuses = ["unknown_model", "model_removed", "unknown_adapter"] if wish.guest else []
        if dice.random() < HURRIED_SHARE:
            fields["deadline_s"] = dice.uniform(0.01, HURRY_S)
            excuses.append("deadline_exceeded")
        cancel_after_s = dice.uniform(0.0, CANCELLED_WITHIN_S) if dice.random() < CANCELLED_SHARE else None
        if cancel_after_s is not None:
            excuses.append("cancelled")
        self._journal.note(Entry(id=name, wish=number, step="asked"))
        try:
            handle = await client.submit(wish.model, PROMPT, **fields)
            if cancel_after_s is not None:
                asyncio.get_running_loop().call_later(cancel_after_s, handle.cancel)
            result = await handle.result()
        except UnderstudyError as error:
            ending = Entry(id=name, wish=number, step=error.code, message=str(error), excuses=tuple(excuses))
        else:
            digest = hashlib.sha256(b"".join(result.images)).hexdigest()
            ending = Entry(id=name, wish=number, step="image", sha256=digest)
        self._journal.note(ending)


async def live(endpoint: str, asker: Asker, journal: Journal) -> None:
    """One client after the other until standard input ends."""
    over = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), over.set)

    async def worker(client: Any) -> None:
        for _ in range(ASKS_PER_LIFE):
            if over.is_set():
                return
            await asker.ask_once(client)

    while not over.is_set():
        async with AsyncClient(endpoint, reconnect_s=RECONNECT_S) as client, asyncio.TaskGroup() as group:
            Ears(client, journal)
            for _ in range(WORKERS):
                group.create_task(worker(client))
    asyncio.get_running_loop().remove_reader(sys.stdin.fileno())


def main() -> None:
    endpoint, wishes_path, journal_path, seed = sys.argv[1:]
    wishes = msgspec.json.decode(Path(wishes_path).read_bytes(), type=list[Wish])
    journal = Journal(Path(journal_path))
    asker = Asker(wishes, journal, Path(journal_path).stem, int(seed))
    asyncio.run(live(endpoint, asker, journal))


if __name__ == "__main__":
    main()

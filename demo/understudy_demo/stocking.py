"""A family in a store, and how much memory holds a part of it."""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from understudy_demo.members import Member
from understudyd.store.ingest import ingest_many
from understudyd.store.records import ModelRecord
from understudyd.store.store import Store

_PAGE_BYTES = 4096


def stock(path: Path, members: Sequence[Member], on_added: Callable[[str], None]) -> list[ModelRecord]:
    """Ingest the members that the store at `path` does not have yet; the records of all."""
    store = Store.open(path, writable=True)
    have = set(store.names())
    for name in have & {member.name for member in members}:
        on_added(name)

    def sources() -> Iterable[tuple[str, str | Path]]:
        previous = ""
        for member in members:
            if member.name in have:
                continue
            if previous:
                on_added(previous)
            previous = member.name
            yield member.name, member.path
        if previous:
            on_added(previous)

    ingest_many(store, sources())
    return [store.model(member.name) for member in members]


def own_bytes(records: Sequence[ModelRecord]) -> dict[str, int]:
    """Arena bytes that only this model needs, by model."""
    users = _users(records)
    return {
        record.name: sum(size for blob, size in _blobs(record).items() if users[blob] == 1)
        for record in records
    }


def shared_bytes(records: Sequence[ModelRecord]) -> int:
    """Arena bytes of blobs that several models use, each counted once."""
    users = _users(records)
    sizes = {blob: size for record in records for blob, size in _blobs(record).items()}
    return sum(size for blob, size in sizes.items() if users[blob] > 1)


def room_for(records: Sequence[ModelRecord], models: int) -> int:
    """Arena bytes for what is shared and `models` models of average size beside it."""
    wanted = shared_bytes(records) + models * statistics.mean(own_bytes(records).values())
    return -(-int(wanted) // _PAGE_BYTES) * _PAGE_BYTES


def _blobs(record: ModelRecord) -> dict[str, int]:
    return {part.blob.sha256: part.blob.size_bytes for part in record.components}


def _users(records: Sequence[ModelRecord]) -> Counter[str]:
    return Counter(blob for record in records for blob in _blobs(record))

"""What lies where in the host pool, in a few pages of shared memory that outlive the process with it.

Two slots are written in turn, contents first, then the head that makes them count: whenever the process is
killed, one of them is whole. A head is magic, format, sequence, length in bytes and XXH3-64 of the contents.
"""

import os
import struct

import msgspec
import xxhash

from understudyd.core.events import CopiesFound

FORMAT = 1
"""Of the index and of what it says about the pool. Another one is not understood."""

_MAGIC = b"understudy index"
_HEAD = struct.Struct("<16sQQQQ")
_SLOT_BYTES = 64 * 1024 * 1024
_CONTENTS_AT = 4096


class StaleIndex(Exception):
    """The index, or the pool it speaks about, cannot be used; the message says why."""


class PoolRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`pool_id` is the inode of the pool's memfd: an index speaks about that pool alone."""

    pool_id: int
    pool_bytes: int
    found: CopiesFound


class PoolIndex:
    """Over a memfd, which is its owner's. Its pages come with what is written: slots are mostly holes."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._sequence = 0

    def write(self, record: PoolRecord) -> None:
        """Replace what it says. Raises `StaleIndex` when that does not fit; it says nothing then."""
        contents = msgspec.msgpack.encode(record)
        if len(contents) > _SLOT_BYTES - _CONTENTS_AT:
            os.ftruncate(self.fd, 0)
            raise StaleIndex(f"{len(contents)} bytes do not fit")
        self._sequence += 1
        start = self._sequence % 2 * _SLOT_BYTES
        head = _HEAD.pack(_MAGIC, FORMAT, self._sequence, len(contents), xxhash.xxh3_64_intdigest(contents))
        _write(self.fd, contents, start + _CONTENTS_AT)
        _write(self.fd, head, start)

    def read(self) -> PoolRecord:
        """The newest whole record; later ones follow it. Raises `StaleIndex`."""
        slots = [slot for start in (0, _SLOT_BYTES) if (slot := self._slot(start)) is not None]
        if not slots:
            raise StaleIndex("its index is damaged")
        self._sequence, contents = max(slots)
        try:
            return msgspec.msgpack.decode(contents, type=PoolRecord)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise StaleIndex(f"its index is damaged: {error}") from error

    def _slot(self, start: int) -> tuple[int, bytes] | None:
        head = os.pread(self.fd, _HEAD.size, start)
        if len(head) < _HEAD.size:
            return None
        magic, version, sequence, size_bytes, digest = _HEAD.unpack(head)
        if magic != _MAGIC:
            return None
        if version != FORMAT:
            raise StaleIndex(f"it is of format {version}, this daemon's is {FORMAT}")
        contents = os.pread(self.fd, min(size_bytes, _SLOT_BYTES), start + _CONTENTS_AT)
        if len(contents) != size_bytes or xxhash.xxh3_64_intdigest(contents) != digest:
            return None
        return sequence, contents


def _write(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count

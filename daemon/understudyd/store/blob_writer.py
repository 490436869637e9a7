"""Writing a blob in one pass: the file, its sha256 and the chunk checksums of its data section."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash

from understudyd.store.records import BlobRecord
from understudyd.store.safetensors_file import BlobLayout, TensorSpan

CHECKSUM_CHUNK_BYTES = 16 * 1024 * 1024
_SLICE_BYTES = 4 * 1024 * 1024

ReadTensor = Callable[[TensorSpan], memoryview]
"""Give a tensor's bytes, `span.size_bytes` of them, C-contiguous."""


def write_blob(
    path: Path, layout: BlobLayout, read: ReadTensor, on_bytes: Callable[[int], None] | None = None
) -> BlobRecord:
    """Create `path` with the header and every tensor of `layout`.

    `on_bytes` is told the data bytes so far, every few MiB and at the end. The file is not synced:
    `Writer.publish` does that for the blobs it keeps. Raises `OSError`, and `ValueError` when `read`
    returns too little or too much.
    """
    sha = hashlib.sha256(layout.header)
    sums = _ChunkSums()
    done = told = 0
    with path.open("xb") as file:
        file.write(layout.header)
        for piece in _pieces(layout, read):
            sha.update(piece)
            sums.update(piece)
            file.write(piece)
            done += len(piece)
            if on_bytes is not None and (done - told >= _SLICE_BYTES or done == layout.size_bytes):
                on_bytes(told := done)
    return BlobRecord(
        sha256=sha.hexdigest(),
        data_start_bytes=layout.data_start_bytes,
        size_bytes=layout.size_bytes,
        chunk_bytes=CHECKSUM_CHUNK_BYTES,
        xxh3=sums.finish(),
    )


def _pieces(layout: BlobLayout, read: ReadTensor) -> Iterator[memoryview]:
    """The data section in order, in pieces of at most a few MiB: one tensor is in memory at a time."""
    for span in layout.tensors:
        data = memoryview(bytes(span.size_bytes)) if span.is_padding else read(span)
        if data.nbytes != span.size_bytes:
            raise ValueError(f"{span.name}: {data.nbytes} bytes given, {span.size_bytes} planned")
        for at in range(0, span.size_bytes, _SLICE_BYTES):
            yield data[at : at + _SLICE_BYTES]


class _ChunkSums:
    """XXH3-64 of every `CHECKSUM_CHUNK_BYTES` of a stream."""

    def __init__(self) -> None:
        self._sums: list[int] = []
        self._current = xxhash.xxh3_64()
        self._room = CHECKSUM_CHUNK_BYTES

    def update(self, piece: memoryview) -> None:
        while piece:
            head, piece = piece[: self._room], piece[self._room :]
            self._current.update(head)
            self._room -= len(head)
            if not self._room:
                self._close_chunk()

    def finish(self) -> tuple[int, ...]:
        if self._room < CHECKSUM_CHUNK_BYTES:
            self._close_chunk()
        return tuple(self._sums)

    def _close_chunk(self) -> None:
        self._sums.append(self._current.intdigest())
        self._current = xxhash.xxh3_64()
        self._room = CHECKSUM_CHUNK_BYTES

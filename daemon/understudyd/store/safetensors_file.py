"""Reading safetensors headers strictly, and laying out the store's own blobs.

The format (https://huggingface.co/docs/safetensors): eight bytes little-endian header length N, N bytes of
JSON `{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}`, then the data
section, which the tensors cover without holes or overlaps.

A blob of the store is such a file with three more properties, so that a load is one sequential read to
an aligned address and an offset in the file is an offset in the extent:

* the header is padded with spaces until the data section starts at a multiple of 4096;
* every tensor starts at a multiple of 512 in the data section, gaps are covered by U8 tensors `__pad.N`;
* the data section's length is a multiple of 4096.

No torch here: whoever reads a store needs none.
"""

import json
import math
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from understudyd.store.errors import StoreError, StoreErrorCode
from understudyd.store.records import DATA_ALIGN_BYTES, TENSOR_ALIGN_BYTES

MAX_HEADER_BYTES = 100_000_000  # the reference implementation's own limit
PAD_PREFIX = "__pad."
_LENGTH_BYTES = 8
_MAX_DIMENSIONS = 64  # torch's limit; also keeps a hostile shape's product small

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorSpan:
    """One tensor of a file: `[begin, end)` are byte offsets in the data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size_bytes(self) -> int:
        """Length in the data section."""
        return self.end - self.begin

    @property
    def is_padding(self) -> bool:
        """Whether it only fills a gap."""
        return self.name.startswith(PAD_PREFIX)


@dataclass(frozen=True, slots=True)
class Header:
    """A validated header; `tensors` are in data order and cover `[0, data_size_bytes)` exactly."""

    tensors: tuple[TensorSpan, ...]
    metadata: dict[str, str]
    data_start_bytes: int
    data_size_bytes: int


def tensor_size_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor. Raises `ValueError` for an unknown dtype or a size that is no whole byte."""
    if dtype not in DTYPE_BITS:
        raise ValueError(f"unknown dtype {dtype!r:.40}")
    bits = DTYPE_BITS[dtype] * math.prod(shape)
    if bits % 8:
        raise ValueError(f"{bits} bits are no whole number of bytes")
    return bits // 8


# -- reading ---------------------------------------------------------------------------------------


def read_header(path: Path) -> Header:
    """Read and validate the header of a regular file.

    Raises `StoreError`: `unreadable` or `corrupt_source`, nothing else.
    """
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            raw, file_bytes = _read_raw_header(fd)
        finally:
            os.close(fd)
        return parse_header(raw, data_size_bytes=file_bytes - _LENGTH_BYTES - len(raw))
    except PermissionError as error:
        why = f"{path} may not be read by the user who adds it; let that user read it and try again"
        raise StoreError(StoreErrorCode.UNREADABLE, why) from error
    except (OSError, ValueError) as error:
        why = f"{path.name}: {error}; get a complete safetensors file (download or convert it again)"
        raise StoreError(StoreErrorCode.CORRUPT_SOURCE, why) from error


def _read_raw_header(fd: int) -> tuple[bytes, int]:
    """The header's JSON and the file's length."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("is not a regular file")
    length = int.from_bytes(os.pread(fd, _LENGTH_BYTES, 0), "little")
    if status.st_size < _LENGTH_BYTES + 2 or length > status.st_size - _LENGTH_BYTES:
        raise ValueError(f"is truncated: {status.st_size} bytes cannot hold its header")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"has a header of {length} bytes, the limit is {MAX_HEADER_BYTES}")
    raw = os.pread(fd, length, _LENGTH_BYTES)  # one call suffices: the kernel's limit is 2 GiB
    if len(raw) != length:
        raise ValueError("became shorter while it was read")
    return raw, status.st_size


def parse_header(raw: bytes, *, data_size_bytes: int) -> Header:
    """Validate header JSON against the length of the data section. Raises `ValueError`, nothing else."""
    document = _load_json(raw)
    metadata = _metadata(document.pop("__metadata__", {}))
    spans = sorted((_span(name, entry) for name, entry in document.items()), key=lambda s: (s.begin, s.end))
    at = 0
    for span in spans:
        if span.begin != at:
            kind = "overlaps the tensor before it" if span.begin < at else "leaves a hole before it"
            raise ValueError(f"tensor {span.name!r:.80} {kind} (starts at {span.begin}, expected {at})")
        at = span.end
    if at != data_size_bytes:
        raise ValueError(f"the tensors need {at} bytes of data, the file has {data_size_bytes}")
    return Header(tuple(spans), metadata, _LENGTH_BYTES + len(raw), data_size_bytes)


def _load_json(raw: bytes) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        raise ValueError("the header does not start with '{'")
    try:
        document = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant
        )
    except UnicodeDecodeError as error:
        raise ValueError("the header is not UTF-8") from error
    except RecursionError as error:
        raise ValueError("the header is nested too deeply") from error
    assert isinstance(document, dict)  # it starts with '{' and parsed
    return document


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the header has the key {twice!r:.80} twice")
    return document


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"the header holds {text}")


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise ValueError("__metadata__ is not a map of strings")
    return value


def _span(name: str, entry: Any) -> TensorSpan:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r:.80} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    well_typed = isinstance(dtype, str) and _counts(shape) and _counts(offsets)
    if not well_typed or len(shape) > _MAX_DIMENSIONS or len(offsets) != 2:
        raise ValueError(f"tensor {name!r:.80} has a dtype, shape or data_offsets of the wrong type")
    begin, end = offsets
    try:
        size = tensor_size_bytes(dtype, shape)
    except ValueError as error:
        raise ValueError(f"tensor {name!r:.80}: {error}") from error
    if end - begin != size:
        raise ValueError(f"tensor {name!r:.80}: data_offsets span {end - begin} bytes, its shape {size}")
    return TensorSpan(name, dtype, tuple(shape), begin, end)


def _counts(value: Any) -> bool:
    """Whether a list of non-negative 64-bit integers (JSON's `true` is none)."""
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


# -- laying out ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BlobLayout:
    """Where everything of a blob goes. `tensors` include the padding and cover the data section."""

    header: bytes
    tensors: tuple[TensorSpan, ...]
    size_bytes: int

    @property
    def data_start_bytes(self) -> int:
        """Where the data section starts in the file."""
        return len(self.header)


def plan_blob(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> BlobLayout:
    """Lay out `(name, dtype, shape)` in the given order. Names must be unique and not start with `__pad.`."""
    spans: list[TensorSpan] = []
    at = pads = 0

    def pad_to(multiple: int) -> None:
        nonlocal at, pads
        if gap := -at % multiple:
            spans.append(TensorSpan(f"{PAD_PREFIX}{pads}", "U8", (gap,), at, at + gap))
            at, pads = at + gap, pads + 1

    for name, dtype, shape in tensors:
        if name.startswith(PAD_PREFIX) or name == "__metadata__":
            raise ValueError(f"{name!r} is the format's own name")
        pad_to(TENSOR_ALIGN_BYTES)
        size = tensor_size_bytes(dtype, shape)
        spans.append(TensorSpan(name, dtype, shape, at, at + size))
        at += size
    pad_to(DATA_ALIGN_BYTES)
    return BlobLayout(_header_bytes(spans), tuple(spans), at)


def _header_bytes(spans: list[TensorSpan]) -> bytes:
    # `format` is what transformers demands of a file before it reads it.
    document: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for span in spans:
        offsets = [span.begin, span.end]
        document[span.name] = {"dtype": span.dtype, "shape": span.shape, "data_offsets": offsets}
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(len(text) + _LENGTH_BYTES) % DATA_ALIGN_BYTES)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text

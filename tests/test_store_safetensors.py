"""The strict header reader and the blob layout, against the reference implementation and hostile files."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from store_kit import raw_file, write_weights
from understudyd.store import safetensors_file
from understudyd.store.blob_writer import CHECKSUM_CHUNK_BYTES, write_blob
from understudyd.store.errors import StoreError, StoreErrorCode
from understudyd.store.safetensors_file import DTYPE_BITS, TensorSpan, plan_blob, read_header

F32_TWO = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def entry(begin: int, end: int, **changes: Any) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]} | changes


REFUSED = {
    "duplicate key": (b'{"a":%b,"a":%b}' % ((json.dumps(F32_TWO).encode(),) * 2), 8),
    "duplicate dtype": (b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, 12),
    "same bytes twice": ({"a": entry(0, 8), "b": entry(0, 8)}, 8),
    "hole": ({"a": entry(0, 8), "b": entry(12, 16)}, 16),
    "hole at the start": ({"a": entry(4, 8)}, 8),
    "past the end": ({"a": entry(0, 16)}, 8),
    "data nobody names": ({"a": entry(0, 8)}, 9),
    "no tensors but data": ({}, 1),
    "begin after end": ({"a": entry(8, 0, shape=[0])}, 8),
    "size is not the shape's": ({"a": F32_TWO | {"shape": [3]}}, 8),
    "negative shape": ({"a": F32_TWO | {"shape": [-2]}}, 8),
    "negative offset": ({"a": F32_TWO | {"data_offsets": [-8, 0]}}, 8),
    "shape of truths": ({"a": entry(0, 1, shape=[True])}, 1),
    "shape of fractions": ({"a": F32_TWO | {"shape": [2.0]}}, 8),
    "too many dimensions": ({"a": entry(0, 1, shape=[1] * 65)}, 1),
    "shape no list": ({"a": F32_TWO | {"shape": "2"}}, 8),
    "three offsets": ({"a": F32_TWO | {"data_offsets": [0, 8, 8]}}, 8),
    "number beyond 64 bits": ({"a": F32_TWO | {"shape": [2**64]}}, 8),
    "number beyond reason": (b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', 8),
    "half a byte": ({"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 0]}}, 0),
    "unknown dtype": ({"a": F32_TWO | {"dtype": "F33"}}, 8),
    "dtype no text": ({"a": F32_TWO | {"dtype": 3}}, 8),
    "extra key": ({"a": F32_TWO | {"more": 1}}, 8),
    "entry no map": ({"a": [1]}, 0),
    "metadata no strings": ({"__metadata__": {"a": 1}}, 0),
    "metadata no map": ({"__metadata__": "pt"}, 0),
    "not UTF-8": (b'{"\xff":1}', 0),
    "not JSON": (b"{nonsense}", 0),
    "not a map": (b"[]", 0),
    "NaN": (b'{"a":NaN}', 0),
    "space before": (b" {}", 0),
    "deep nesting": (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", 0),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str, tmp_path: Path) -> None:
    header, size = REFUSED[name]
    with pytest.raises(StoreError) as caught:
        read_header(raw_file(tmp_path / "x.safetensors", header, bytes(size)))
    assert caught.value.code is StoreErrorCode.CORRUPT_SOURCE
    assert caught.value.message.startswith("x.safetensors: ")


@pytest.mark.parametrize("keep", [0, 7, 8, 9, 100, -1])
def test_refuses_a_truncated_file(keep: int, tmp_path: Path) -> None:
    path = write_weights(tmp_path / "x.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(StoreError):
        read_header(path)


def test_refuses_a_header_over_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    limit = safetensors_file.MAX_HEADER_BYTES
    with path.open("wb") as file:
        file.write((limit + 1).to_bytes(8, "little"))
        file.truncate(limit + 100)  # sparse: takes no room
    with pytest.raises(StoreError, match="the limit is"):
        read_header(path)


def test_refuses_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, tmp_path / "missing", tmp_path / "a\0b"):
        with pytest.raises(StoreError):
            read_header(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused_and_nothing_else(data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "damaged.safetensors"
    path.unlink(missing_ok=True)
    good = write_weights(path).read_bytes()
    raw = bytearray(good[: 8 + 120] if data.draw(st.booleans()) else good)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(200, len(raw) - 1)))
        raw[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    path.write_bytes(raw)
    try:
        header = read_header(path)
    except StoreError:
        return
    assert header.data_start_bytes + header.data_size_bytes == len(raw)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("F32"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "a"]), inner)
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(
    header=st.dictionaries(st.text(max_size=4), json_values) | st.binary(max_size=60), size=st.integers(0, 64)
)
def test_any_header_is_parsed_or_a_value_error(header: object, size: int) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    try:
        parsed = safetensors_file.parse_header(raw, data_size_bytes=size)
    except ValueError:
        return
    assert sum(span.size_bytes for span in parsed.tensors) == size


shapes = st.lists(st.integers(0, 40), max_size=3).map(tuple)
torch_free_dtypes = st.sampled_from(["U8", "BOOL", "I64", "F16", "F32", "F64"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors=st.lists(st.tuples(torch_free_dtypes, shapes), min_size=1, max_size=8))
def test_a_blob_is_what_the_reference_reads(
    tensors: list[tuple[str, tuple[int, ...]]], tmp_path: Path
) -> None:
    planned = [(f"t{i}", dtype, shape) for i, (dtype, shape) in enumerate(tensors)]
    layout = plan_blob(planned)
    path = tmp_path / "blob.safetensors"
    path.unlink(missing_ok=True)

    def content(span: TensorSpan) -> memoryview:
        return memoryview(bytes((7 * i + span.begin) % 2 for i in range(span.size_bytes)))

    record = write_blob(path, layout, content)
    header = read_header(path)
    assert header.tensors == layout.tensors
    assert header.data_start_bytes % 4096 == 0 == header.data_size_bytes % 4096
    assert all(span.begin % 512 == 0 for span in header.tensors if not span.is_padding)
    assert record.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    with safe_open(path, framework="np") as reference:
        assert reference.metadata() == {"format": "pt"}
        for span in header.tensors:
            array = reference.get_tensor(span.name)
            assert array.shape == span.shape
            assert array.tobytes() == (bytes(span.size_bytes) if span.is_padding else bytes(content(span)))


def test_chunk_checksums_cover_the_data_section(tmp_path: Path) -> None:
    size = 2 * CHECKSUM_CHUNK_BYTES + 4096
    content = memoryview(os.urandom(4096) * (size // 4096))
    seen: list[int] = []
    path = tmp_path / "blob.safetensors"
    record = write_blob(path, plan_blob([("t", "U8", (size,))]), lambda span: content, seen.append)
    data = path.read_bytes()[record.data_start_bytes :]
    assert data == bytes(content)
    pieces = [data[at : at + record.chunk_bytes] for at in range(0, size, record.chunk_bytes)]
    assert record.xxh3 == tuple(xxhash.xxh3_64_intdigest(piece) for piece in pieces)
    assert len(record.xxh3) == 3
    assert seen == sorted(seen)
    assert seen[-1] == record.size_bytes == size


def test_equal_content_makes_equal_bytes(tmp_path: Path) -> None:
    one = write_weights(tmp_path / "one.safetensors").read_bytes()
    assert one == write_weights(tmp_path / "other.safetensors").read_bytes()


def test_a_reader_of_the_wrong_length_is_caught(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="12 planned"):
        write_blob(
            tmp_path / "x",
            plan_blob([("t", "F32", (3,))]),
            lambda span: memoryview(bytes(span.size_bytes + 1)),
        )


@pytest.mark.parametrize("name", ["__pad.0", "__metadata__"])
def test_the_formats_own_names_are_taken(name: str) -> None:
    with pytest.raises(ValueError, match="own name"):
        plan_blob([(name, "F32", (1,))])


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
def test_every_dtype_is_the_references_too(dtype: str, tmp_path: Path) -> None:
    shape = [8]
    size = DTYPE_BITS[dtype]
    path = raw_file(
        tmp_path / "x.safetensors",
        {"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}},
        bytes(size),
    )
    assert read_header(path).data_size_bytes == size
    with safe_open(path, framework="np") as reference:
        assert reference.get_slice("a").get_dtype() == dtype

"""Raw bytes of a known shape and dtype as numpy arrays and as safetensors files, without torch.

The file format is safetensors' own: https://github.com/huggingface/safetensors#format
"""

import json
from math import prod
from typing import Any

from understudy.errors import CallerError, TransportError

# name on the wire: (name in a safetensors file, bytes an element)
_DTYPES = {
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "uint8": ("U8", 1),
}
_ALIGNMENT = 8


def safetensors_file(name: str, data: bytes, dtype: str, shape: tuple[int, ...]) -> bytes:
    """A safetensors file that holds one C-contiguous array. Raises `TransportError` as `as_numpy` does."""
    _check(data, dtype, shape)
    entry = {"dtype": _DTYPES[dtype][0], "shape": list(shape), "data_offsets": [0, len(data)]}
    header = json.dumps({name: entry}).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    return len(header).to_bytes(8, "little") + header + data


def as_numpy(data: bytes, dtype: str, shape: tuple[int, ...]) -> Any:
    """A writable numpy array of these bytes. Raises `TransportError` where they do not fit."""
    _check(data, dtype, shape)
    try:
        import numpy
    except ImportError as error:
        raise CallerError("arrays need numpy: pip install numpy", code="missing_package") from error
    return numpy.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


def _check(data: bytes, dtype: str, shape: tuple[int, ...]) -> None:
    if dtype not in _DTYPES or any(extent < 0 for extent in shape):
        raise TransportError(f"the daemon sent an array of {dtype!r:.40} {shape}", code="bad_reply")
    if prod(shape) * _DTYPES[dtype][1] != len(data):
        raise TransportError(
            f"the daemon sent {len(data)} bytes for a {dtype} array {list(shape)}", code="bad_reply"
        )

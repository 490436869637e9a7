"""A component's shape: its canonical config and the table of every tensor it holds.

Fine-tunes of one architecture get the same signature, so that one skeleton serves them all; whatever
changes how a component computes (class, config, dtypes, ties, attention) changes the signature.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import msgspec
import torch
from torch import nn

from understudyd.store.errors import StoreError, StoreErrorCode
from understudyd.store.records import SignatureRecord, TensorKind, TensorRecord
from understudyd.store.safetensors_file import BlobLayout, plan_blob
from understudyd.store.tensor_places import tensor_places

_DTYPE_NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.uint16: "U16", torch.int16: "I16",
    torch.uint32: "U32", torch.int32: "I32", torch.uint64: "U64", torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64", torch.complex64: "C64",
    torch.complex128: "C128",
}  # fmt: skip

# Who saved a config, and in which dtype: the tensor table says the latter exactly.
_CONFIG_NOISE = frozenset({"transformers_version", "torch_dtype", "dtype", "architectures"})


def dtype_name(dtype: torch.dtype) -> str:
    """The record's name of a torch dtype, safetensors' own but for C128. Raises `KeyError` for others."""
    return _DTYPE_NAMES[dtype]


def file_form(dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """How a tensor is written: the format has no C128, so such a tensor is pairs of F64 in its blob."""
    return ("F64", (*shape, 2)) if dtype == "C128" else (dtype, shape)


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors name. Raises `KeyError` where torch has none."""
    return {n: dtype for dtype, n in _DTYPE_NAMES.items()}[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What a skeleton builds a module from; the fields are those of `SignatureRecord`."""

    library: str
    class_name: str
    config: dict[str, Any]
    attn_implementation: str | None = None

    @classmethod
    def of(cls, module: nn.Module) -> Self:
        """That of a module of diffusers or transformers."""
        config = getattr(module, "config", {})
        return cls(
            library=library_of(type(module)),
            class_name=type(module).__name__,
            config=canonical_config(config),
            attn_implementation=getattr(config, "_attn_implementation", None),
        )


class Component:
    """A live module read as data: `signature`, the blob's `layout`, and the tensors behind it."""

    def __init__(self, name: str, module: nn.Module, recipe: Recipe | None = None) -> None:
        """Without a `recipe` it is read off the module, one of diffusers or transformers."""
        held = list(held_tensors(module))
        if not held:
            raise _unsupported(name, "holds no tensors")
        first_paths: dict[tuple[Any, ...], str] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        for path, _, tensor in held:
            _check_tensor(f"{name}.{path}", tensor)
            if first_paths.setdefault(_identity(path, tensor), path) == path:
                self._tensors[path] = tensor
        self.layout: BlobLayout = plan_blob(
            (path, *file_form(dtype_name(tensor.dtype), tuple(tensor.shape)))
            for path, tensor in self._tensors.items()
        )
        spans = {span.name: span for span in self.layout.tensors}
        records = []
        for path, kind, tensor in held:
            first = first_paths[_identity(path, tensor)]
            records.append(
                TensorRecord(
                    path=path,
                    kind=kind,
                    dtype=dtype_name(tensor.dtype),
                    shape=tuple(tensor.shape),
                    offset=spans[first].begin,
                    size_bytes=spans[first].size_bytes,
                    alias_of=None if first == path else first,
                )
            )
        self.signature = _signature(recipe or Recipe.of(module), self.layout.size_bytes, tuple(records))

    def read(self, path: str) -> memoryview:
        """The bytes of a tensor that is no tie, C-contiguous whatever its strides in the live module.

        A tensor in another memory format (channels_last) is stored, and served, contiguous: equal values,
        possibly another kernel. `from_pretrained` makes none.
        """
        return bytes_of(self._tensors[path])


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes, C-contiguous whatever its strides."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def held_tensors(module: nn.Module) -> Iterator[tuple[str, TensorKind, torch.Tensor]]:
    """Every tensor of a module tree as `(path, kind, tensor)`; see `tensor_places`."""
    for place in tensor_places(module):
        yield place.path, place.kind, place.tensor


def _identity(path: str, tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for two tensors that are the same view of the same memory. Empty ones are all different."""
    if not tensor.numel():
        return (path,)
    return (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _check_tensor(path: str, tensor: torch.Tensor) -> None:
    if tensor.is_meta:
        raise StoreError(StoreErrorCode.CORRUPT_SOURCE, f"{path} has no data: its weights are missing")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.dtype not in _DTYPE_NAMES:
        raise _unsupported(path, f"is a {tensor.dtype} tensor of layout {tensor.layout}")


def _signature(recipe: Recipe, size_bytes: int, tensors: tuple[TensorRecord, ...]) -> SignatureRecord:
    draft = SignatureRecord(
        id="",
        library=recipe.library,
        class_name=recipe.class_name,
        config=recipe.config,
        attn_implementation=recipe.attn_implementation,
        size_bytes=size_bytes,
        tensors=tensors,
    )
    canonical = msgspec.json.encode(draft, order="sorted")
    return msgspec.structs.replace(draft, id=hashlib.sha256(canonical).hexdigest()[:32])


def library_of(cls: type) -> str:
    """The module path that exports a class: diffusers, transformers or diffusers.pipelines.<package>."""
    packages = cls.__module__.split(".")
    if packages[:2] == ["diffusers", "pipelines"]:
        return ".".join(packages[:3])
    return packages[0]


def canonical_config(config: Any) -> dict[str, Any]:
    """What of a config shapes the component: plain JSON, without who saved it, where and in which dtype.

    `config` is a transformers config or diffusers' `FrozenDict`. The values are those of the live module:
    defaults are filled in, and what a pipeline's constructor rewrote is rewritten.
    """
    document = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    canonical = _without_noise(json.loads(json.dumps(document, default=str)))
    assert isinstance(canonical, dict)
    return canonical


def _without_noise(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_noise(item)
            for key, item in sorted(value.items())
            if not key.startswith("_") and key not in _CONFIG_NOISE
        }
    if isinstance(value, list):
        return [_without_noise(item) for item in value]
    return value


def _unsupported(path: str, why: str) -> StoreError:
    return StoreError(
        StoreErrorCode.UNSUPPORTED_SOURCE, f"{path} {why}, which cannot be served yet; use another model"
    )

"""Tensors over the arena: what a skeleton is bound to.

They are made once, when a blob becomes resident, outside `inference_mode` and without gradients, so that
binding them later costs neither an allocation nor a kernel.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from understudyd.stage.errors import NotResident, StageError
from understudyd.store.records import TensorRecord

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "C128": torch.complex128,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The records' names to torch's: those of safetensors, and C128, which that format lacks."""

SHELF_TENSORS = 50_000
"""Views kept for later: 44 Stable Diffusion 1.5 or 18 SDXL models."""

_MOVE_PIECE_BYTES = 64 * 1024 * 1024

TENSORS_PER_SLICE = 64
"""Views made between two breaths: about 0.5 ms on a slow core."""


def dtype_of(record: TensorRecord) -> torch.dtype:
    """The record's dtype. Raises `StageError` for one that torch does not have."""
    try:
        return DTYPES[record.dtype]
    except KeyError as error:
        raise StageError(
            f"{record.path} has dtype {record.dtype}, which this release cannot serve"
        ) from error


class Layout(Protocol):
    """Which tensors an extent holds: a component's signature, or an overlay's layout."""

    @property
    def id(self) -> str:
        """Equal for equal layouts only."""

    @property
    def tensors(self) -> Sequence[TensorRecord]:
        """Their places count from the start of the extent; ties come after what they point to."""


class WeightArena:
    """The arena as torch sees it: flat tensors of every dtype over the same bytes."""

    def __init__(self, memory: Tensor) -> None:
        """`memory` is the whole arena, shape [bytes], uint8, its length a multiple of 16."""
        if memory.dtype != torch.uint8 or memory.dim() != 1 or memory.numel() % 16:
            raise StageError("the arena must be one flat uint8 tensor whose length is a multiple of 16")
        self._memory = memory
        self._typed: dict[torch.dtype, Tensor] = {}

    @property
    def address_range(self) -> range:
        """The addresses of the arena's bytes."""
        start = self._memory.data_ptr()
        return range(start, start + self._memory.numel())

    def move_down(self, offset: int, to_offset: int, size_bytes: int) -> None:
        """Copy `size_bytes` from `offset` to a lower `to_offset`; the places may overlap.

        Piece by piece in ascending order, each by way of a buffer of its own: neither `memcpy` nor a device
        copy allows that source and target overlap.
        """
        for start in range(0, size_bytes, _MOVE_PIECE_BYTES):
            end = min(start + _MOVE_PIECE_BYTES, size_bytes)
            piece = self._memory[offset + start : offset + end].clone()
            self._memory[to_offset + start : to_offset + end].copy_(piece)

    def tensor(self, record: TensorRecord, extent_offset: int) -> Tensor:
        """The record's tensor where its blob lies at `extent_offset` bytes. No copy."""
        dtype = dtype_of(record)
        start = (extent_offset + record.offset) // dtype.itemsize
        return self._flat(dtype).as_strided(record.shape, _contiguous_strides(record.shape), start)

    def run(self, dtype: torch.dtype, offset: int, size_bytes: int) -> Tensor:
        """Everything from `offset` on, as numbers of one dtype, shape [size_bytes / item size]. No copy."""
        return self._flat(dtype)[offset // dtype.itemsize : (offset + size_bytes) // dtype.itemsize]

    @property
    def device(self) -> torch.device:
        """Where the arena is."""
        return self._memory.device

    def _flat(self, dtype: torch.dtype) -> Tensor:
        flat = self._typed.get(dtype)
        if flat is None:
            flat = self._typed[dtype] = self._memory.view(dtype)
        return flat


def _contiguous_strides(shape: Sequence[int]) -> list[int]:
    strides = [1] * len(shape)
    for axis in range(len(shape) - 1, 0, -1):
        strides[axis - 1] = strides[axis] * max(shape[axis], 1)
    return strides


class BlobViews:
    """One blob's tensors, or one overlay's, in the order of its layout's records.

    `bound` is what goes into the module: a `Parameter` or a plain tensor, the same object for tied
    paths. Parameters are mutable (`module.to` changes their `data` in place), so `_pristine` keeps plain
    tensors to set them right again.
    """

    def __init__(self, layout: Layout, extent_offset: int) -> None:
        self.layout = layout
        self.extent_offset = extent_offset
        self.bound: list[Tensor] = []
        self._pristine: list[tuple[nn.Parameter, Tensor]] = []

    @classmethod
    def build(
        cls,
        arena: WeightArena,
        layout: Layout,
        extent_offset: int,
        breathe: Callable[[], None],
    ) -> "BlobViews":
        """Make all views, calling `breathe` between slices so that the stage is not held up."""
        views = cls(layout, extent_offset)
        by_path: dict[str, Tensor] = {}
        for index, record in enumerate(layout.tensors):
            if index % TENSORS_PER_SLICE == TENSORS_PER_SLICE - 1:
                breathe()
            if record.alias_of is None:
                by_path[record.path] = views._make(record, arena.tensor(record, extent_offset))
            views.bound.append(by_path[record.alias_of or record.path])
        return views

    def _make(self, record: TensorRecord, view: Tensor) -> Tensor:
        if record.kind != "parameter":
            return view
        parameter = nn.Parameter(view, requires_grad=False)
        self._pristine.append((parameter, view))
        return parameter

    def restore(self) -> list[Tensor]:
        """Point every parameter at the arena again; returns what they held, for the caller to free."""
        displaced = [parameter.data for parameter, _ in self._pristine]
        for parameter, view in self._pristine:
            parameter.data = view
        return displaced


class ViewShelf:
    """Views that no blob needs now, kept for the next one that fits.

    Views depend on nothing but the layout and the offset: where fine-tunes replace each other at the
    same places, building views becomes a look-up. Not thread-safe; forgets the longest unused beyond
    `capacity` tensors (about 1 KB each).
    """

    def __init__(self, capacity: int = SHELF_TENSORS) -> None:
        self._capacity = capacity
        self._tensors = 0
        self._views: OrderedDict[tuple[str, int], BlobViews] = OrderedDict()

    def take(self, layout: Layout, extent_offset: int) -> BlobViews | None:
        """Views for a blob of this layout at this offset, if there are any; they leave the shelf."""
        views = self._views.pop((layout.id, extent_offset), None)
        if views is not None:
            self._tensors -= len(views.bound)
        return views

    def put(self, views: BlobViews) -> None:
        """Keep views that are bound to nothing and point where they were built to point."""
        key = (views.layout.id, views.extent_offset)
        if key in self._views:
            return
        self._views[key] = views
        self._tensors += len(views.bound)
        while self._tensors > self._capacity:
            _, forgotten = self._views.popitem(last=False)
            self._tensors -= len(forgotten.bound)


@dataclass(slots=True)
class _Resident:
    offset: int
    generation: int
    views: dict[str, BlobViews]  # by layout id; empty while they are being built


class ResidentBlobs:
    """The blobs and overlays that have views now. Thread-safe."""

    def __init__(self, arena: WeightArena) -> None:
        self._arena = arena
        self._lock = threading.Lock()
        self._blobs: dict[str, _Resident] = {}
        self._shelf = ViewShelf()

    @property
    def address_range(self) -> range:
        """The addresses of the arena's bytes."""
        return self._arena.address_range

    def expect(self, blob: str, offset: int, generation: int) -> None:
        """From now on the blob lies at `offset`; its views will be built."""
        with self._lock:
            self._blobs[blob] = _Resident(offset, generation, {})

    def build(
        self, blob: str, generation: int, layouts: Sequence[Layout], breathe: Callable[[], None]
    ) -> None:
        """Build the views of an expected blob, once for each layout it is used with.

        A blob that was dropped meanwhile is left alone.
        """
        resident = self._blobs.get(blob)
        if resident is None or resident.generation != generation:
            return
        for layout in layouts:
            with self._lock:
                views = self._shelf.take(layout, resident.offset)
            if views is None:
                views = BlobViews.build(self._arena, layout, resident.offset, breathe)
            with self._lock:
                if self._blobs.get(blob) is resident:
                    resident.views[layout.id] = views
                else:
                    self._shelf.put(views)

    def views(self, blob: str, layout: Layout) -> BlobViews:
        """The views to bind. Raises `NotResident`.

        A layout that became known only after the blob was resident has its views built here and now.
        """
        resident = self._blobs.get(blob)
        if resident is None or not resident.views:
            raise NotResident(f"blob {blob[:12]} has no views in the arena")
        if layout.id not in resident.views:
            self.build(blob, resident.generation, [layout], lambda: None)
        return resident.views[layout.id]

    def drop(self, blob: str, generation: int) -> list[BlobViews]:
        """Forget the blob if it is still of this generation; returns the views nobody may use any more."""
        with self._lock:
            resident = self._blobs.get(blob)
            if resident is None or resident.generation != generation:
                return []
            del self._blobs[blob]
            return list(resident.views.values())

    def keep(self, views: BlobViews) -> None:
        """Dropped views that no skeleton is bound to wait for the next blob at their place."""
        with self._lock:
            self._shelf.put(views)

"""One component without weights, shared by every fine-tune of its signature.

The module is built once, without memory. Every tensor a blob brings has a slot, a place of the module tree:
binding writes views into the slots and does nothing else. That the slots cover the whole module is
proved once, here, so that nothing can be left without weights after a bind. An overlay's views go over some
of the base's: from one overlay to another over one base, nothing but their slots is touched.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from operator import setitem
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from understudyd.stage.building import build_module
from understudyd.stage.errors import SkeletonMismatch
from understudyd.stage.leftovers import PlainState
from understudyd.stage.regions import CompiledBlocks
from understudyd.stage.views import BlobViews, Layout, dtype_of
from understudyd.store.records import SignatureRecord, TensorRecord
from understudyd.store.tensor_places import TensorPlace, tensor_places


class Skeleton:
    """A module waiting for weights.

    `on_touch` is called on the computing thread before the module computes or moves: it is where a run
    takes the baton and where it can be cancelled. `bind`, `unbind` and `restore` may be called from
    any thread, but only the holder of the baton binds. `compiled` opens what is to be compiled of the module.
    """

    def __init__(
        self,
        signature: SignatureRecord,
        on_touch: Callable[[], None] = lambda: None,
        device: torch.device = torch.device("cpu"),  # noqa: B008  immutable
        compiled: Callable[[SignatureRecord, nn.Module], CompiledBlocks | None] = lambda signature, module: (
            None
        ),
    ) -> None:
        self.signature = signature
        self.module = build_module(signature)
        self._blocks = compiled(signature, self.module)
        places = {place.path: place for place in tensor_places(self.module, every_path=True)}
        slots = _find_slots(places, signature.tensors)
        _check_cover(places, slots)
        self._owners = [slot.owner for slot in slots]
        self._keys = [slot.key for slot in slots]
        self._replaceable = [i for i, slot in enumerate(slots) if slot.kind != "parameter"]
        self._placeholders = list(_placeholders(signature.tensors, device))
        self.unbound_addresses = frozenset(tensor.data_ptr() for tensor in self._placeholders)
        attributes = vars(self.module)
        self._config = {key: attributes[key] for key in ("_internal_dict", "config") if key in attributes}
        self._lock = threading.Lock()
        self._bound: BlobViews | None = None
        self._overlay: BlobViews | None = None
        self._slots_of: WeakKeyDictionary[Layout, tuple[int, ...]] = WeakKeyDictionary()
        self._values: list[Tensor] = []  # what belongs into the slots now
        self._is_dirty = False
        self._on_touch = on_touch
        self._put(self._placeholders)
        self._watch()
        self._plain_state = PlainState(self.module, {slot.identity[:2] for slot in slots})

    @property
    def is_dirty(self) -> bool:
        """Something moved or cast the module since it was bound (SDXL upcasts its VAE)."""
        return self._is_dirty

    @property
    def is_bound(self) -> bool:
        """A blob's views are in the slots."""
        return self._bound is not None

    def fit(self, layout: Layout) -> tuple[int, ...]:
        """The slots that an overlay of this layout takes. Raises `SkeletonMismatch` if it has others.

        Worked out once; a layout is told from others by its identity.
        """
        slots = self._slots_of.get(layout)
        if slots is None:
            slots = self._slots_of[layout] = _overlaid_slots(self.signature.tensors, layout.tensors)
        return slots

    def bind(self, views: BlobViews, overlay: BlobViews | None = None) -> bool:
        """Put the blob's views into every slot, the overlay's over them; False when all are there already.

        Raises `SkeletonMismatch` for views of others.
        """
        if self._blocks is not None:
            self._blocks.adopt()
        if views.layout.id != self.signature.id:
            raise SkeletonMismatch(f"views of {views.layout.id} cannot be bound to {self.signature.id}")
        if overlay is not None:
            self.fit(overlay.layout)
        with self._lock:
            if self._bound is not views or self._is_dirty:
                self._bound, self._overlay = views, None
                self._put(views.bound)
            elif self._overlay is overlay:
                return False
            self._lift_overlay()
            self._lay(overlay)
            return True

    def unbind(self, views: BlobViews) -> None:
        """Let go of these views if they are bound, as base or as overlay: their extent will be used again."""
        with self._lock:
            if self._bound is views:
                self._bound = self._overlay = None
                self._put(self._placeholders)
            elif self._overlay is views:
                self._lift_overlay()

    def restore(self) -> list[Tensor]:
        """Undo what the last run did to the shared module: tensors moved, cast or replaced, attributes set.

        Returns the tensors that lay outside the arena, so that the caller chooses when to free them.
        """
        if self._blocks is not None:
            self._blocks.run_ended()
        vars(self.module).update(self._config)
        self._plain_state.restore()
        with self._lock:
            if not self._is_dirty:
                self._put_back_replaced()
                return []
            self._is_dirty = False
            displaced = [t for views in (self._bound, self._overlay) if views for t in views.restore()]
            self._put(self._values)
            return displaced

    def strays(self, address_range: range) -> list[str]:
        """Paths whose tensor does not lie in these addresses now: none, if all is well."""
        return [
            record.path
            for record, owner, key in zip(self.signature.tensors, self._owners, self._keys)
            if owner[key].numel() and owner[key].data_ptr() not in address_range
        ]

    def tensors(self) -> Iterator[tuple[TensorRecord, Tensor]]:
        """What is in the slots now, ties included."""
        for record, owner, key in zip(self.signature.tensors, self._owners, self._keys):
            yield record, owner[key]

    def _put(self, values: Sequence[Tensor]) -> None:
        # The loop runs in C: thrice as fast as a Python loop, and this is the hot path of a switch.
        deque(map(setitem, self._owners, self._keys, values), maxlen=0)
        self._values = list(values)

    def _put_at(self, slots: Iterable[int], values: Iterable[Tensor]) -> None:
        owners, keys, kept = self._owners, self._keys, self._values
        for slot, value in zip(slots, values):
            owners[slot][keys[slot]] = kept[slot] = value

    def _lay(self, overlay: BlobViews | None) -> None:
        self._overlay = overlay
        if overlay is not None:
            self._put_at(self.fit(overlay.layout), overlay.bound)

    def _lift_overlay(self) -> None:
        if self._overlay is not None and self._bound is not None:
            slots = self.fit(self._overlay.layout)
            self._put_at(slots, map(self._bound.bound.__getitem__, slots))
        self._overlay = None

    def _put_back_replaced(self) -> None:
        """Buffers and attributes are sometimes assigned to while a module computes; parameters never."""
        for i in self._replaceable:
            if self._owners[i][self._keys[i]] is not self._values[i]:
                self._owners[i][self._keys[i]] = self._values[i]

    def _watch(self) -> None:
        """Have every computation and every `_apply` (`to`, `half`, `cuda`, ...) come by here first."""
        for module in self.module.modules():
            vars(module)["_apply"] = partial(self._noticed_apply, module)
        for module in _checkpoints(self.module):
            module.register_forward_pre_hook(self._noticed_forward)

    def _noticed_forward(self, _module: nn.Module, _args: Any) -> None:
        self._on_touch()

    def _noticed_apply(self, module: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
        self._on_touch()
        self._is_dirty = True
        applied: nn.Module = type(module)._apply(module, fn, recurse)
        return applied


def _find_slots(places: Mapping[str, TensorPlace], records: Sequence[TensorRecord]) -> list[TensorPlace]:
    """One place per record. Raises `SkeletonMismatch` naming the first record without one."""
    slots: list[TensorPlace] = []
    for record in records:
        place = places.get(record.path)
        if place is None or place.kind != record.kind:
            raise SkeletonMismatch(f"the module has no {record.kind} {record.path}; add the model again")
        if tuple(place.tensor.shape) != tuple(record.shape):
            shape = tuple(place.tensor.shape)
            raise SkeletonMismatch(
                f"{record.path} has shape {shape} in the module, {record.shape} in the blob"
            )
        slots.append(place)
    return slots


def _check_cover(places: Mapping[str, TensorPlace], slots: Sequence[TensorPlace]) -> None:
    """Raise `SkeletonMismatch` if the module holds a tensor that no slot will fill."""
    covered = {slot.identity for slot in slots}
    for path, place in places.items():
        if place.identity not in covered:
            raise SkeletonMismatch(f"{path} is in no blob of this signature; add the model again")


def _overlaid_slots(records: Sequence[TensorRecord], overlay: Sequence[TensorRecord]) -> tuple[int, ...]:
    """Where the overlay's tensors go. Ties are refused: the other path would keep the base's weight."""
    slots = {record.path: slot for slot, record in enumerate(records)}
    tied = {path for record in records if record.alias_of for path in (record.path, record.alias_of)}
    for record in overlay:
        base = records[slots[record.path]] if record.path in slots else None
        if base is None or base.path in tied or _form(base) != _form(record):
            raise SkeletonMismatch(f"an overlay has {record.path} of which the component has no such weight")
    return tuple(slots[record.path] for record in overlay)


def _form(record: TensorRecord) -> tuple[object, ...]:
    return record.kind, record.dtype, record.shape


def _placeholders(records: Sequence[TensorRecord], device: torch.device) -> Iterator[Tensor]:
    """What an unbound module shows: the served shapes, dtypes and device, without memory.

    A request that waits asks components for their device and dtype before it binds them. Every float is
    one and the same NaN, so that computing unbound cannot look like a picture.
    """
    for record in records:
        dtype = dtype_of(record)
        value = float("nan") if dtype.is_floating_point else 0
        tensor = torch.full((), value, dtype=dtype, device=device).expand(record.shape)
        yield nn.Parameter(tensor, requires_grad=False) if record.kind == "parameter" else tensor


def _checkpoints(root: nn.Module) -> Iterator[nn.Module]:
    """Where a run may be stopped: the module and its children; inside an autoencoder every block too.

    An autoencoder decodes a whole image in one call, often longer than a denoising step, and by
    `decode`, not by its own `forward`.
    """
    children = list(root.children())
    yield root
    yield from children
    if hasattr(root, "decode"):
        known = {root, *children}
        yield from (m for m in root.modules() if m not in known and any(True for _ in m.children()))

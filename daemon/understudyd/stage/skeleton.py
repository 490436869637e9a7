"""One component without weights, shared by every fine-tune of its signature.

The module is built once on the meta device. Every tensor a blob brings has a slot, a (dict, key) pair of
the module tree: binding writes views into the slots and does nothing else. That the slots cover the
whole module is proved once, here, so that nothing can be left without weights after a bind.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from operator import setitem
from typing import Any

import torch
from torch import Tensor, nn

from understudyd.stage.classes import resolve
from understudyd.stage.errors import SkeletonMismatch
from understudyd.stage.views import BlobViews, dtype_of
from understudyd.store.records import SignatureRecord, TensorRecord

Slot = tuple[dict[str, Any], str]


class Skeleton:
    """A module waiting for weights.

    `on_touch` is called on the computing thread before the module computes or moves: it is where a run
    takes the baton and where it can be cancelled. `bind`, `unbind` and `restore` may be called from
    any thread, but only the holder of the baton binds.
    """

    def __init__(
        self,
        signature: SignatureRecord,
        on_touch: Callable[[], None] = lambda: None,
        device: torch.device = torch.device("cpu"),  # noqa: B008  immutable
    ) -> None:
        self.signature = signature
        self.module = _build(signature)
        slots = _find_slots(self.module, signature.tensors)
        _check_cover(self.module, slots)
        self._dicts = [owner for owner, _ in slots]
        self._keys = [key for _, key in slots]
        self._placeholders = list(_placeholders(signature.tensors, device))
        self._config_key = "_internal_dict" if "_internal_dict" in vars(self.module) else "config"
        self._config = vars(self.module)[self._config_key]
        self._lock = threading.Lock()
        self._bound: BlobViews | None = None
        self._is_dirty = False
        self._on_touch = on_touch
        self._put(self._placeholders)
        self._watch()

    @property
    def is_dirty(self) -> bool:
        """Something moved or cast the module since it was bound (SDXL upcasts its VAE)."""
        return self._is_dirty

    @property
    def is_bound(self) -> bool:
        """A blob's views are in the slots."""
        return self._bound is not None

    def bind(self, views: BlobViews) -> bool:
        """Put the blob's views into every slot; False when they are there already."""
        if views.signature.id != self.signature.id:
            raise SkeletonMismatch(f"views of {views.signature.id} cannot be bound to {self.signature.id}")
        with self._lock:
            if self._bound is views and not self._is_dirty:
                return False
            self._bound = views
            self._put(views.bound)
            return True

    def unbind(self, views: BlobViews) -> None:
        """Let go of these views if they are the bound ones: their extent will be used again."""
        with self._lock:
            if self._bound is views:
                self._bound = None
                self._put(self._placeholders)

    def restore(self) -> list[Tensor]:
        """Undo what the last run did to the shared module: moved or cast tensors, a rewritten config.

        Returns the tensors that lay outside the arena, so that the caller chooses when to free them.
        """
        vars(self.module)[self._config_key] = self._config
        with self._lock:
            if not self._is_dirty:
                return []
            self._is_dirty = False
            if self._bound is None:
                self._put(self._placeholders)
                return []
            displaced = self._bound.restore()
            self._put(self._bound.bound)
            return displaced

    def strays(self, address_range: range) -> list[str]:
        """Paths whose tensor does not lie in these addresses now: none, if all is well."""
        return [
            record.path
            for record, owner, key in zip(self.signature.tensors, self._dicts, self._keys)
            if owner[key].numel() and owner[key].data_ptr() not in address_range
        ]

    def tensors(self) -> Iterator[tuple[TensorRecord, Tensor]]:
        """What is in the slots now, ties included."""
        for record, owner, key in zip(self.signature.tensors, self._dicts, self._keys):
            yield record, owner[key]

    def _put(self, values: Iterable[Tensor]) -> None:
        # The loop runs in C: thrice as fast as a Python loop, and this is the hot path of a switch.
        deque(map(setitem, self._dicts, self._keys, values), maxlen=0)

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


def _build(signature: SignatureRecord) -> nn.Module:
    """The bare module on the meta device, in eval mode."""
    component_class = resolve(signature.library, signature.class_name)
    config = dict(signature.config)
    with torch.device("meta"):
        if hasattr(component_class, "from_config"):
            module = component_class.from_config(config)
        else:
            module = _build_transformer(component_class, config, signature)
    if not isinstance(module, nn.Module):
        raise SkeletonMismatch(f"{signature.library}.{signature.class_name} is no torch module")
    return module.eval().requires_grad_(False)


def _build_transformer(
    model_class: type[Any], values: dict[str, Any], signature: SignatureRecord
) -> nn.Module:
    """A transformers model. `dtype=None`: naming one would set torch's default dtype process-wide."""
    config = model_class.config_class.from_dict(values)
    attn = signature.attn_implementation
    options = {} if attn is None else {"attn_implementation": attn}
    module: nn.Module = model_class._from_config(config, dtype=None, **options)
    dtype = next((dtype_of(record) for record in signature.tensors if record.kind == "parameter"), None)
    for owner in (config, *(getattr(config, key) for key in config.sub_configs)):
        if owner is not None:
            owner.dtype = dtype
    return module


def _find_slots(root: nn.Module, records: Sequence[TensorRecord]) -> list[Slot]:
    """One slot per record. Raises `SkeletonMismatch` naming the first record without a place."""
    modules = dict(root.named_modules(remove_duplicate=False))
    slots: list[Slot] = []
    for record in records:
        parent, _, key = record.path.rpartition(".")
        module = modules.get(parent)
        owner = None if module is None else _owner(module, record)
        if owner is None or not isinstance(owner.get(key), Tensor):
            raise SkeletonMismatch(f"the module has no {record.kind} {record.path}; add the model again")
        if tuple(owner[key].shape) != tuple(record.shape):
            shape = tuple(owner[key].shape)
            raise SkeletonMismatch(
                f"{record.path} has shape {shape} in the module, {record.shape} in the blob"
            )
        slots.append((owner, key))
    return slots


def _owner(module: nn.Module, record: TensorRecord) -> dict[str, Any]:
    tables: dict[str, dict[str, Any]] = {
        "parameter": module._parameters,
        "buffer": module._buffers,
        "temporary_buffer": module._buffers,
        "attribute": vars(module),
    }
    return tables[record.kind]


def _check_cover(root: nn.Module, slots: Sequence[Slot]) -> None:
    """Raise `SkeletonMismatch` if the module holds a tensor that no slot will fill."""
    covered = {(id(owner), key) for owner, key in slots}
    for path, module in root.named_modules():
        for owner in (module._parameters, module._buffers, vars(module)):
            for key, value in owner.items():
                if isinstance(value, Tensor) and (id(owner), key) not in covered:
                    name = f"{path}.{key}".lstrip(".")
                    raise SkeletonMismatch(f"{name} is in no blob of this signature; add the model again")


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

"""Folding as the daemon does it, beside the same pipeline fused by diffusers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ingest_kit import reference
from understudyd.stage.folding import ArenaFoldMemory, fold_steps
from understudyd.stage.views import WeightArena
from understudyd.store.adapters.overlays import AppliedAdapter, OverlayPlan, plan_overlays
from understudyd.store.adapters.shelf import AdapterShelf
from understudyd.store.pretrained import quiet_libraries
from understudyd.store.records import BlobRecord, ModelRecord, SignatureRecord
from understudyd.store.store import Store


def fused(folder: Path, dtype: Any, adapters: Sequence[tuple[Path, float]]) -> Any:
    """diffusers' own: load, set, fuse every component that takes adapters."""
    pipeline = reference(folder, torch_dtype=dtype)
    names = [f"adapter-{number}" for number in range(len(adapters))]
    with quiet_libraries():
        for name, (path, _) in zip(names, adapters, strict=True):
            pipeline.load_lora_weights(str(path), adapter_name=name)
        pipeline.set_adapters(names, [scale for _, scale in adapters])
        components = [c for c in pipeline._lora_loadable_modules if getattr(pipeline, c, None) is not None]
        pipeline.fuse_lora(components=components, adapter_names=names)
    return pipeline


def plain_path(path: str) -> str:
    """The path of a tensor before PEFT wrapped its layer."""
    return path.replace(".base_layer.", ".")


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """A fused component's tensors under their own names, the adapters' left out."""
    return {plain_path(path): t for path, t in module.state_dict().items() if ".lora_" not in path}


@dataclass(frozen=True)
class Folded:
    """One component: its plan, every tensor that would be bound, and whether the base kept its bytes."""

    plan: OverlayPlan
    bound: dict[str, Tensor]
    is_base_untouched: bool


def fold(store: Store, model: ModelRecord, adapters: Sequence[tuple[str, float]]) -> Iterator[Folded]:
    """Fold adapters by name and scale in an arena as large as needed, component by component."""
    shelf = AdapterShelf(store)
    signatures = {c.name: store.signature(c.signature) for c in model.components}
    blobs = {c.name: c.blob for c in model.components}
    applied = [AppliedAdapter(shelf.adapter(name), scale) for name, scale in adapters]
    for plan in plan_overlays(signatures, applied):
        signature = signatures[plan.component]
        parts = [
            read_blob(store, b) for b in (blobs[plan.component], *(a.record.blob for a in plan.adapters))
        ]
        memory = torch.cat([*parts, torch.full((plan.size_bytes,), 0xFF, dtype=torch.uint8)])
        offsets = [sum(p.numel() for p in parts[:i]) for i in range(len(parts) + 1)]
        arena = WeightArena(memory)
        done = list(fold_steps(plan, ArenaFoldMemory(arena, 0, offsets[1:-1], offsets[-1])))
        assert done == sorted(done) and done[-1] == sum(w.folded.size_bytes for w in plan.weights)
        untouched = torch.equal(memory[: offsets[-1]], torch.cat(parts))
        yield Folded(plan, _bound(arena, signature, plan, offsets[-1]), untouched)


def _bound(
    arena: WeightArena, signature: SignatureRecord, plan: OverlayPlan, overlay_offset: int
) -> dict[str, Tensor]:
    bound = {record.path: arena.tensor(record, 0) for record in signature.tensors}
    return bound | {w.base.path: arena.tensor(w.folded, overlay_offset) for w in plan.weights}


def base_tensors(store: Store, model: ModelRecord) -> dict[str, dict[str, Tensor]]:
    """Every tensor of a stored model by component and path."""
    found = {}
    for component in model.components:
        arena = WeightArena(read_blob(store, component.blob))
        records = store.signature(component.signature).tensors
        found[component.name] = {record.path: arena.tensor(record, 0) for record in records}
    return found


def read_blob(store: Store, blob: BlobRecord) -> Tensor:
    """A blob's data section, as a loader would put it into an extent."""
    data = store.blob_path(blob.sha256).read_bytes()[blob.data_start_bytes :]
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)

"""Real-size models with random weights in a real store, and as folders that `from_pretrained` reads.

The weights are the libraries' own initial ones: the images that they paint are noise, but finite and
different for each seed. A model's blobs are valid safetensors files: the diffusers folder is links to them.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.real_size import Architecture, save_parts
from understudyd.stage.classes import resolve
from understudyd.store.blob_writer import write_blob
from understudyd.store.records import BlobRecord, ComponentRecord, ModelRecord, PartRecord, SignatureRecord
from understudyd.store.safetensors_file import TensorSpan, plan_blob
from understudyd.store.signature import Component
from understudyd.store.store import Store
from understudyd.store.writer import Draft

_SHIFT_BYTES = 4096


def publish(
    store: Store,
    architecture: Architecture,
    name: str,
    *,
    seed: int,
    dtypes: Mapping[str, torch.dtype],
    device: str = "cpu",
) -> ModelRecord:
    """Draw a model's weights on `device`, in these dtypes by component, and put it into the store."""
    torch.manual_seed(seed)
    with store.writing() as writer:
        workspace = writer.workspace()
        folder = workspace / "model"
        parts = _save_small_files(architecture, folder)
        components, signatures, blobs = [], [], {}
        for part, build in architecture.builders.items():
            component = Component(part, _random_module(build, dtypes[part], device))
            path = workspace / f"{part}.safetensors"
            blob = _write(path, component)
            components.append(ComponentRecord(name=part, signature=component.signature.id, blob=blob))
            signatures.append(component.signature)
            blobs[blob.sha256] = path
        record = ModelRecord(
            name=name,
            pipeline_class=architecture.pipeline_class,
            components=tuple(components),
            parts=parts,
            absent=architecture.absent,
            init_kwargs=architecture.init_kwargs,
        )
        return writer.publish(Draft(record, tuple(signatures), blobs, folder), replace=False)


def diffusers_folder(store: Store, name: str, folder: Path) -> Path:
    """Make `folder` what `from_pretrained` reads as this model: small files and links to the blobs."""
    record = store.model(name)
    shutil.copytree(store.model_folder(name), folder)
    for component in record.components:
        library = store.signature(component.signature).library
        weights = "model" if library == "transformers" else "diffusion_pytorch_model"
        os.link(store.blob_path(component.blob.sha256), folder / component.name / f"{weights}.safetensors")
    return folder


def random_component(
    path: Path, build: Callable[[], nn.Module], dtype: torch.dtype, *, seed: int, device: str = "cpu"
) -> tuple[SignatureRecord, BlobRecord]:
    """Draw one component's weights on `device` and write its blob, outside of any store."""
    torch.manual_seed(seed)
    component = Component(path.stem, _random_module(build, dtype, device))
    return component.signature, _write(path, component)


def random_blob(path: Path, signature: SignatureRecord, seed: int = 0) -> BlobRecord:
    """Write a blob of this shape whose bytes are noise: enough for a load, not for a picture."""
    layout = plan_blob((record.path, record.dtype, record.shape) for record in signature.tensors)
    longest_bytes = max(span.size_bytes for span in layout.tensors)
    generator = np.random.default_rng(seed)
    noise = generator.integers(0, 256, longest_bytes + len(layout.tensors) * _SHIFT_BYTES, dtype=np.uint8)
    shifts = {span.name: i * _SHIFT_BYTES for i, span in enumerate(layout.tensors)}

    def read(span: TensorSpan) -> memoryview:
        return memoryview(noise)[shifts[span.name] :][: span.size_bytes]

    return write_blob(path, layout, read)


def _write(path: Path, component: Component) -> BlobRecord:
    return write_blob(path, component.layout, lambda span: component.read(span.name))


def _random_module(build: Callable[[], nn.Module], dtype: torch.dtype, device: str) -> nn.Module:
    """Drawn in `dtype` on the device: a GPU draws billions of numbers in no time."""
    with torch.device(device), _default_dtype(dtype):
        module = build()
    return module.to(dtype).eval().cpu()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _save_small_files(architecture: Architecture, folder: Path) -> tuple[PartRecord, ...]:
    """What a diffusers folder holds beside weights; the records of scheduler and tokenizers."""
    records = save_parts(architecture, folder)
    parts = {r.name: resolve(r.library, r.class_name).from_pretrained(folder / r.name) for r in records}
    with torch.device("meta"):
        modules: dict[str, Any] = {part: build() for part, build in architecture.builders.items()}
    for part, module in modules.items():
        if hasattr(module, "save_config"):
            module.save_config(folder / part)
        else:
            module.config.save_pretrained(folder / part)
    absent = dict.fromkeys(architecture.absent)
    pipeline_class = resolve("diffusers", architecture.pipeline_class)
    pipeline_class(**absent, **architecture.init_kwargs, **parts, **modules).save_config(folder)
    return records

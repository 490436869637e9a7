"""Shared by the store's tests: hand-made sources that need no torch, and views of a store's files."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from understudyd.store.blob_writer import write_blob
from understudyd.store.records import ComponentRecord, ModelRecord, PartRecord, SignatureRecord
from understudyd.store.safetensors_file import plan_blob
from understudyd.store.writer import Draft, Writer


def listing(folder: Path) -> dict[str, str]:
    """Every file below a folder with the sha256 of its bytes, but for the locks'."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("writer.lock", "serving.lock")
    }


def write_weights(path: Path, *, dtype: str = "F32", shape: tuple[int, ...] = (3, 5)) -> Path:
    """A valid safetensors file of one tensor."""
    layout = plan_blob([("weight", dtype, shape)])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_blob(path, layout, lambda span: memoryview(b"\1" * span.size_bytes))
    return path


def plain_draft(writer: Writer, name: str, parts: Mapping[str, tuple[SignatureRecord, bytes]]) -> Draft:
    """A model, each component of which has a shape and one byte that its weights are over and over."""
    workspace = writer.workspace()
    components, blobs = [], {}
    for part, (shape, content) in parts.items():
        layout = plan_blob([(t.path, t.dtype, t.shape) for t in shape.tensors])
        path = workspace / f"{part}.safetensors"
        blob = write_blob(path, layout, lambda span, content=content: memoryview(content * span.size_bytes))
        components.append(ComponentRecord(name=part, signature=shape.id, blob=blob))
        blobs[blob.sha256] = path
    folder = workspace / "model"
    (folder / "scheduler").mkdir(parents=True)
    (folder / "scheduler" / "config.json").write_text("{}")
    scheduler = PartRecord(name="scheduler", library="diffusers", class_name="DDIMScheduler", content="c")
    record = ModelRecord(
        name=name,
        pipeline_class="StableDiffusionPipeline",
        components=tuple(components),
        parts=(scheduler,),
    )
    shapes = {shape.id: shape for shape, _ in parts.values()}
    return Draft(record, tuple(shapes.values()), blobs, folder)


def raw_file(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    """A safetensors file with any header: bytes as they are, anything else as JSON."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def fake_source(folder: Path) -> Path:
    """A folder that passes the guard (no library could load it): one component and one scheduler."""
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.36.0",
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
    }
    write_json(folder / "model_index.json", index)
    write_json(folder / "scheduler" / "scheduler_config.json", {"beta_start": 0.1})
    write_json(folder / "unet" / "config.json", {"sample_size": 8})
    write_weights(folder / "unet" / "diffusion_pytorch_model.safetensors")
    return folder


def write_json(path: Path, document: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return path


def edit_json(path: Path, change: Callable[[dict[str, object]], object]) -> Path:
    document = json.loads(path.read_text())
    change(document)
    return write_json(path, document)

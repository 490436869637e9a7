"""Turning a source into a model of the store.

`python -m understudyd.store.ingest --store S --name N --source P` runs in a process of its own: it checks
the source, loads it on the CPU with the libraries' own `from_pretrained`, writes what that made as blobs
into the store's workspace, and publishes all of it at once. What is refused leaves nothing behind.

torch is imported only once the source has passed the guard.
"""

import hashlib
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from understudyd.store.blob_writer import write_blob
from understudyd.store.errors import StoreError, StoreErrorCode, translated_write_errors
from understudyd.store.guard import PICKLE_SUFFIXES, SourcePart, SourcePlan, check_source
from understudyd.store.records import BlobRecord, ComponentRecord, ModelRecord, PartRecord, SignatureRecord
from understudyd.store.safetensors_file import read_header
from understudyd.store.store import Store, check_name
from understudyd.store.writer import Draft, Writer

if TYPE_CHECKING:
    from understudyd.store.pretrained import LoadedPipeline
    from understudyd.store.signature import Component

DType = Literal["keep", "fp16", "bf16", "fp32"]

Progress = Callable[[str, int, int], None]
"""`progress(phase, done, total)`: phases "check", "load", "write <component>" (bytes), "publish" (steps)."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_UNCOPIED_SUFFIXES = PICKLE_SUFFIXES | {
    ".safetensors",
    ".onnx",
    ".pb",
    ".msgpack",
    ".h5",
    ".gguf",
    ".md",
    ".png",
}


def no_progress(phase: str, done: int, total: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True, kw_only=True)
class IngestOptions:
    """How a source is read. `dtype` is the dtype to serve in, "keep" that of the files; `variant` picks
    files such as `*.fp16.safetensors`; `ignore_pickle` leaves pickles unread instead of refusing them;
    `replace` lets a model of the same name and other content go.
    """

    dtype: DType = "keep"
    variant: str | None = None
    ignore_pickle: bool = False
    replace: bool = False


def ingest(
    store: Store,
    name: str,
    source: str | Path,
    *,
    dtype: DType = "keep",
    variant: str | None = None,
    ignore_pickle: bool = False,
    replace: bool = False,
    progress: Progress = no_progress,
) -> ModelRecord:
    """Add `source` to the store as `name` and return its record.

    The served model will equal `DiffusionPipeline.from_pretrained(source, dtype={component: dtype, ...})`,
    bit for bit, with each component's dtype the one asked for, or with "keep" the one most bytes of its
    files are in. The same content under the same name adds nothing. Raises `StoreError`; then the store
    is as it was.
    """
    options = IngestOptions(dtype=dtype, variant=variant, ignore_pickle=ignore_pickle, replace=replace)
    return ingest_many(store, [(name, source)], options, progress=progress)[0]


def ingest_many(
    store: Store,
    models: Iterable[tuple[str, str | Path]],
    options: IngestOptions = IngestOptions(),
    *,
    progress: Progress = no_progress,
) -> list[ModelRecord]:
    """Add `(name, source)` pairs under one writer lock, one torch import. Stops at the first that fails."""
    with store.writing() as writer:
        return [_Ingest(writer, name, source, options, progress).run() for name, source in models]


def open_source(source: str | Path) -> Path:
    """The diffusers folder behind a source: the one place that tells the kinds of sources apart."""
    path = Path(source)
    if (path / "model_index.json").is_file():
        return path
    if path.is_file():
        raise StoreError(
            StoreErrorCode.UNSUPPORTED_SOURCE,
            f"{source} is a single file; these are not supported yet, give the folder that diffusers' "
            "save_pretrained writes",
        )
    if path.is_dir():
        raise StoreError(
            StoreErrorCode.UNSUPPORTED_SOURCE,
            f"{source} has no model_index.json: it is no diffusers pipeline folder",
        )
    if isinstance(source, str) and _HUB_ID.fullmatch(source):
        raise StoreError(
            StoreErrorCode.UNSUPPORTED_SOURCE,
            f"{source} is no folder here; if it is a hub id, these are not supported yet: download it first",
        )
    raise StoreError(StoreErrorCode.NOT_FOUND, f"there is no {source}; give a diffusers model folder")


@dataclass
class _Ingest:
    """One model on its way into the store."""

    writer: Writer
    name: str
    source: str | Path
    options: IngestOptions
    progress: Progress
    signatures: dict[str, SignatureRecord] = field(default_factory=dict)
    blobs: dict[str, Path] = field(default_factory=dict)

    def run(self) -> ModelRecord:
        options = self.options
        self.progress("check", 0, 0)
        check_name(self.name)
        plan = check_source(
            open_source(self.source), variant=options.variant, ignore_pickle=options.ignore_pickle
        )
        self.progress("check", plan.weights_bytes, plan.weights_bytes)
        loaded = self._load(plan)
        workspace = self.writer.workspace()
        try:
            draft = self._draft(plan, loaded, workspace)
            del loaded
            return self._publish(draft)
        finally:
            shutil.rmtree(workspace)

    def _load(self, plan: SourcePlan) -> "LoadedPipeline":
        from understudyd.store.pretrained import load_pipeline  # imports torch, for seconds

        done, total = 0, plan.weights_bytes
        self.progress("load", done, total)

        def on_part(part: SourcePart) -> None:
            nonlocal done
            done += part.weights_bytes
            self.progress("load", done, total)

        return load_pipeline(plan, self.options.dtype, on_part)

    def _draft(self, plan: SourcePlan, loaded: "LoadedPipeline", workspace: Path) -> Draft:
        from understudyd.store.signature import Component

        folder = workspace / "model"
        with translated_write_errors(f"cannot write {self.name}"):
            components = tuple(
                self._component(Component(name, module), name, workspace)
                for name, module in loaded.components.items()
            )
            contents = _copy_small_files(plan, folder)
        record = ModelRecord(
            name=self.name,
            pipeline_class=loaded.pipeline_class,
            components=components,
            parts=tuple(
                PartRecord(name=name, library=library, class_name=class_name, content=contents[name])
                for name, (library, class_name) in loaded.parts.items()
            ),
            absent=loaded.absent,
            init_kwargs=json.loads(json.dumps(loaded.init_kwargs)),
            dtype=self.options.dtype,
            source=str(self.source),
            added_at_unix_s=time.time(),
        )
        return Draft(record, tuple(self.signatures.values()), self.blobs, folder)

    def _component(self, component: "Component", name: str, workspace: Path) -> ComponentRecord:
        phase, total = f"write {name}", component.layout.size_bytes
        path = workspace / f"{name}.safetensors"
        self.progress(phase, 0, total)
        blob = write_blob(
            path,
            component.layout,
            lambda span: component.read(span.name),
            lambda done: self.progress(phase, done, total),
        )
        _read_back(path, component, blob)
        self.signatures[component.signature.id] = component.signature
        self.blobs[blob.sha256] = path
        return ComponentRecord(name=name, signature=component.signature.id, blob=blob)

    def _publish(self, draft: Draft) -> ModelRecord:
        done, total = 0, len(draft.blobs) + len(draft.signatures) + 1
        self.progress("publish", 0, total)

        def on_step() -> None:
            nonlocal done
            done += 1
            self.progress("publish", done, total)

        record = self.writer.publish(draft, replace=self.options.replace, on_step=on_step)
        if done < total:  # some of it was there already
            self.progress("publish", total, total)
        return record


def _read_back(path: Path, component: "Component", blob: BlobRecord) -> None:
    """The strict reader must find in the file what the signature says is in it."""
    header = read_header(path)
    expected = (component.layout.tensors, blob.data_start_bytes, blob.size_bytes)
    if (header.tensors, header.data_start_bytes, header.data_size_bytes) != expected:
        raise StoreError(
            StoreErrorCode.INTERNAL, f"{path.name} reads back differently; the disk may be failing"
        )


def _copy_small_files(plan: SourcePlan, folder: Path) -> dict[str, str]:
    """Copy model_index.json and what is no weight file of each part; part name -> sha256 over the files."""
    folder.mkdir()
    shutil.copyfile(plan.folder / "model_index.json", folder / "model_index.json")
    return {part.name: _copy_part(part, folder / part.name) for part in plan.parts}


def _copy_part(part: SourcePart, folder: Path) -> str:
    folder.mkdir()
    content = hashlib.sha256()
    for source in sorted(path for path in part.folder.rglob("*") if _is_small_file(path, part)):
        name = source.relative_to(part.folder)
        data = source.read_bytes()
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        content.update(f"{len(str(name))} {name} {len(data)} ".encode() + data)
    return content.hexdigest()


def _is_small_file(path: Path, part: SourcePart) -> bool:
    if part.weights:
        return path == part.folder / "config.json"
    hidden = any(piece.startswith(".") for piece in path.relative_to(part.folder).parts)
    return path.is_file() and path.suffix.lower() not in _UNCOPIED_SUFFIXES and not hidden


def run_cli(argv: Sequence[str]) -> int:
    """Ingest as a command; see `understudyd.store.ingest_cli`. Returns the exit code: 0, 1 or 2 (usage)."""
    from understudyd.store.ingest_cli import run

    return run(argv)


if __name__ == "__main__":
    sys.exit(run_cli(sys.argv[1:]))

"""Turning a source into a model of the store.

`python -m understudyd.store.ingest --store S --name N --source P` runs in a process of its own: it checks
the source, loads it on the CPU with the libraries' own `from_pretrained`, writes what that made as blobs
into the store's workspace, and publishes all of it at once. What is refused leaves nothing behind.

torch is imported only once the source has passed the guard.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from understudyd.pipelines.installed import GROUP
from understudyd.store.blob_writer import write_blob
from understudyd.store.custom import CustomPlan, check_custom
from understudyd.store.custom import copy_small_files as copy_custom_files
from understudyd.store.errors import StoreError, StoreErrorCode, translated_write_errors
from understudyd.store.guard import SourcePart, SourcePlan, check_source
from understudyd.store.records import BlobRecord, ComponentRecord, ModelRecord, PartRecord, SignatureRecord
from understudyd.store.safetensors_file import read_header
from understudyd.store.sources.checkpoint import Checkpoint
from understudyd.store.sources.folder import copy_small_files
from understudyd.store.sources.frame import build_like_frame, check_config, choose_like, stored_folder
from understudyd.store.sources.opening import CheckpointSource, FolderSource, open_source
from understudyd.store.store import Store, check_name
from understudyd.store.writer import Draft, Writer

if TYPE_CHECKING:
    from understudyd.store.pretrained import LoadedPipeline
    from understudyd.store.signature import Component

DType = Literal["keep", "fp16", "bf16", "fp32"]

Progress = Callable[[str, int, int], None]
"""`progress(phase, done, total)`: phases "check", "download", "load", "write <component>" (all in bytes),
"publish" (steps)."""


def no_progress(phase: str, done: int, total: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True, kw_only=True)
class IngestOptions:
    """How a source is read. `dtype` is the dtype to serve in, "keep" that of the files; `variant` picks
    files such as `*.fp16.safetensors`; `ignore_pickle` leaves pickles unread instead of refusing them;
    `replace` lets a model of the same name and other content go. `revision` is a branch, tag or commit of a
    hub id or a cache entry. A single-file checkpoint needs the rest of a model: from the first model of the
    store named in `like` that it fits, or from the diffusers folder `config`. `pipeline` names an installed
    class of the entry-point group `understudy.pipelines`: the source is then a folder as `store.custom` says.
    """

    dtype: DType = "keep"
    variant: str | None = None
    ignore_pickle: bool = False
    replace: bool = False
    revision: str | None = None
    like: tuple[str, ...] = ()
    config: Path | None = None
    pipeline: str | None = None


def ingest(
    store: Store,
    name: str,
    source: str | Path,
    *,
    dtype: DType = "keep",
    variant: str | None = None,
    ignore_pickle: bool = False,
    replace: bool = False,
    revision: str | None = None,
    like: str | None = None,
    config: Path | None = None,
    pipeline: str | None = None,
    progress: Progress = no_progress,
) -> ModelRecord:
    """Add `source` to the store as `name` and return its record; see `IngestOptions` for the arguments.

    The served model will equal `DiffusionPipeline.from_pretrained(source, dtype={component: dtype, ...})`,
    bit for bit, with each component's dtype the one asked for, or with "keep" the one most bytes of its
    files are in. A single-file checkpoint: see `sources.single_file`. The same content under the same name
    adds nothing. Raises `StoreError`; then the store is as it was.
    """
    options = IngestOptions(
        dtype=dtype,
        variant=variant,
        ignore_pickle=ignore_pickle,
        replace=replace,
        revision=revision,
        like=() if like is None else (like,),
        config=config,
        pipeline=pipeline,
    )
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
        return [ingest_one(store, writer, name, source, options, progress) for name, source in models]


def ingest_one(
    store: Store,
    writer: Writer,
    name: str,
    source: str | Path,
    options: IngestOptions,
    progress: Progress = no_progress,
    other_name: Callable[[ModelRecord], str | None] = lambda existing: None,
) -> ModelRecord:
    """Add one model under a lock that is held.

    When there is a model of this name with other content, `other_name` is given its record and may answer
    with the next name to try. Raises `StoreError`.
    """
    return _Ingest(store, writer, name, source, options, progress, other_name).run()


@dataclass
class _Ingest:
    """One model on its way into the store."""

    store: Store
    writer: Writer
    name: str
    source: str | Path
    options: IngestOptions
    progress: Progress
    other_name: Callable[[ModelRecord], str | None]
    signatures: dict[str, SignatureRecord] = field(default_factory=dict)
    blobs: dict[str, Path] = field(default_factory=dict)

    def run(self) -> ModelRecord:
        options = self.options
        self.progress("check", 0, 0)
        check_name(self.name)
        if options.pipeline is not None:
            return self._add_custom(options.pipeline)
        opened = open_source(
            self.source,
            revision=options.revision,
            variant=options.variant,
            on_bytes=lambda done, total: self.progress("download", done, total),
        )
        workspace = self.writer.workspace()
        try:
            plan, loaded = self._read(opened, workspace)
            draft = self._draft(plan, loaded, opened.origin, workspace)
            del loaded
            return self._publish(draft)
        finally:
            shutil.rmtree(workspace)

    def _read(
        self, opened: FolderSource | CheckpointSource, workspace: Path
    ) -> "tuple[SourcePlan, LoadedPipeline]":
        options = self.options
        match opened:
            case FolderSource(folder=folder, is_picked=is_picked):
                ignore_pickle = options.ignore_pickle or is_picked
                plan = check_source(folder, variant=options.variant, ignore_pickle=ignore_pickle)
                self._checked(plan.weights_bytes)
                return plan, self._load(plan)
            case CheckpointSource(checkpoint=checkpoint):
                frame = self._frame(checkpoint, workspace / "frame")
                plan = check_source(frame, ignore_pickle=options.ignore_pickle)
                self._checked(checkpoint.size_bytes)
                return plan, self._load_checkpoint(checkpoint, plan)

    def _checked(self, size_bytes: int) -> None:
        self.progress("check", size_bytes, size_bytes)

    def _frame(self, checkpoint: Checkpoint, folder: Path) -> Path:
        """The diffusers folder that has what a checkpoint lacks; made at `folder` if it is a model's."""
        if self.options.config is not None:
            return check_config(checkpoint, self.options.config)
        store = self.store
        like = choose_like(checkpoint, self.options.like, lambda name: stored_folder(store, name))
        with translated_write_errors(f"cannot read {like}"):
            build_like_frame(store, like, checkpoint, folder)
        return folder

    def _load_checkpoint(self, checkpoint: Checkpoint, plan: SourcePlan) -> "LoadedPipeline":
        from understudyd.store.sources.single_file import load_checkpoint  # imports torch, for seconds

        self.progress("load", 0, checkpoint.size_bytes)
        loaded = load_checkpoint(checkpoint, plan, self.options.dtype)
        self.progress("load", checkpoint.size_bytes, checkpoint.size_bytes)
        return loaded

    def _load(self, plan: SourcePlan) -> "LoadedPipeline":
        from understudyd.store.pretrained import load_pipeline  # imports torch, for seconds

        done, total = 0, plan.weights_bytes
        self.progress("load", done, total)

        def on_part(part: SourcePart) -> None:
            nonlocal done
            done += part.weights_bytes
            self.progress("load", done, total)

        return load_pipeline(plan, self.options.dtype, on_part)

    def _draft(self, plan: SourcePlan, loaded: "LoadedPipeline", origin: str, workspace: Path) -> Draft:
        from understudyd.store.signature import Component

        folder = workspace / "model"
        with translated_write_errors(f"cannot write {self.name}"):
            components = tuple(
                self._component(Component(name, module), name, workspace)
                for name, module in loaded.components.items()
            )
            contents = copy_small_files(plan, folder)
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
            source=origin,
            added_at_unix_s=time.time(),
        )
        return Draft(record, tuple(self.signatures.values()), self.blobs, folder)

    def _add_custom(self, pipeline: str) -> ModelRecord:
        options = self.options
        if options.variant or options.revision or options.like or options.config:
            raise StoreError(
                StoreErrorCode.UNSUPPORTED_SOURCE,
                "variant, revision, like and config are for diffusers models; leave them out with a pipeline",
            )
        plan = check_custom(Path(self.source), pipeline, ignore_pickle=options.ignore_pickle)
        self._checked(plan.weights_bytes)
        workspace = self.writer.workspace()
        try:
            return self._publish(self._custom_draft(plan, workspace))
        finally:
            shutil.rmtree(workspace)

    def _custom_draft(self, plan: CustomPlan, workspace: Path) -> Draft:
        """One component is in memory at a time."""
        from understudyd.store.custom_components import CustomComponents  # imports torch and the class

        done, total = 0, plan.weights_bytes
        self.progress("load", done, total)
        components: list[ComponentRecord] = []
        with translated_write_errors(f"cannot write {self.name}"):
            for name, component, size_bytes in CustomComponents(plan, self.options.dtype):
                done += size_bytes
                self.progress("load", done, total)
                components.append(self._component(component, name, workspace))
            content = copy_custom_files(plan, workspace / "model")
        record = ModelRecord(
            name=self.name,
            pipeline_class=plan.pipeline.name,
            pipeline_library=GROUP,
            components=tuple(components),
            parts=(PartRecord(name="files", library=GROUP, class_name=plan.pipeline.name, content=content),),
            init_kwargs=plan.config,
            dtype=self.options.dtype,
            source=str(self.source),
            added_at_unix_s=time.time(),
        )
        return Draft(record, tuple(self.signatures.values()), self.blobs, workspace / "model")

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

        while True:
            try:
                record = self.writer.publish(draft, replace=self.options.replace, on_step=on_step)
                break
            except StoreError as error:
                draft = self._renamed(draft, error)
        if done < total:  # some of it was there already
            self.progress("publish", total, total)
        return record

    def _renamed(self, draft: Draft, error: StoreError) -> Draft:
        """The same draft under the next name, if the name is all that was wrong with it."""
        existing = self.writer.find(draft.record.name) if error.code is StoreErrorCode.EXISTS else None
        name = self.other_name(existing) if existing is not None else None
        if name is None:
            raise error
        return replace(draft, record=msgspec.structs.replace(draft.record, name=check_name(name)))


def _read_back(path: Path, component: "Component", blob: BlobRecord) -> None:
    """The strict reader must find in the file what the signature says is in it."""
    header = read_header(path)
    expected = (component.layout.tensors, blob.data_start_bytes, blob.size_bytes)
    if (header.tensors, header.data_start_bytes, header.data_size_bytes) != expected:
        raise StoreError(
            StoreErrorCode.INTERNAL, f"{path.name} reads back differently; the disk may be failing"
        )


def run_cli(argv: Sequence[str]) -> int:
    """Ingest as a command; see `understudyd.store.ingest_cli`. Returns the exit code: 0, 1 or 2 (usage)."""
    from understudyd.store.ingest_cli import run

    return run(argv)


if __name__ == "__main__":
    sys.exit(run_cli(sys.argv[1:]))

"""Turning LoRA files into adapters of a store.

Each file is told by its keys (`plain`), read by diffusers' own loader against a base without weights
(`conversion`), written as a blob like any model's, and published at once. What is refused leaves nothing
behind. One refused file does not stop the others of a folder.
"""

import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from understudy.admin import ScanResult
from understudyd.store.adapters.facts import read_facts
from understudyd.store.adapters.files import AdapterFile
from understudyd.store.adapters.plain import read_plain_header
from understudyd.store.adapters.records import (
    AdapterRecord,
    BaseRecord,
    TargetRecord,
    content_id,
    misfit,
    target_misfit,
)
from understudyd.store.blob_writer import write_blob
from understudyd.store.errors import StoreError, StoreErrorCode, translated_write_errors
from understudyd.store.records import BlobRecord, TensorRecord
from understudyd.store.safetensors_file import Header, TensorSpan, plan_blob
from understudyd.store.store import Store, check_name
from understudyd.store.writer import AdapterDraft, Writer

if TYPE_CHECKING:
    from understudyd.store.adapters.bases import Base
    from understudyd.store.adapters.conversion import ConvertedTarget

_LISTED = 3

Progress = Callable[[str, int, int], None]
"""`progress(name, done, total)`: bytes of all files together."""


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """How LoRAs are added. `base` is the model of the store they are for; without it every model is tried.

    The models of `more_stores`, which are only read, count as well.

    `replace` lets an adapter of the same name and other content go; `name_prefix` is put before the names
    that are made from paths.
    """

    base: str | None = None
    replace: bool = False
    name_prefix: str = ""
    more_stores: tuple[Store, ...] = ()


def add_adapter(store: Store, file: AdapterFile, options: AdapterOptions = AdapterOptions()) -> AdapterRecord:
    """Add one LoRA under its name and return its record. The same content under the same name adds nothing.

    Raises `StoreError`; then the store is as it was.
    """
    with store.writing() as writer:
        return _Addition(store, writer, options).add(file)


def add_adapters(
    store: Store,
    files: Sequence[AdapterFile],
    options: AdapterOptions = AdapterOptions(),
    *,
    progress: Progress = lambda name, done, total: None,
    on_result: Callable[[ScanResult], None] = lambda result: None,
) -> list[ScanResult]:
    """Add many under one writer lock; `on_result` is told of each as soon as it is settled.

    Raises `StoreError` when the store or the base cannot be used; what is wrong with one file is in its
    result.
    """
    results = []
    total = sum(file.size_bytes for file in files)
    done = 0
    with store.writing() as writer:
        addition = _Addition(store, writer, options)
        addition.find_bases()
        for file in files:
            progress(file.name, done, total)
            results.append(addition.settle(file))
            on_result(results[-1])
            done += file.size_bytes
            progress(file.name, done, total)
    return results


@dataclass
class _Addition:
    """LoRAs on their way into the store, one after the other."""

    store: Store
    writer: Writer
    options: AdapterOptions
    _bases: "list[Base]" = field(default_factory=list)

    def find_bases(self) -> "list[Base]":
        """What is tried for every file. Raises `StoreError` when there is nothing."""
        from understudyd.store.adapters.bases import find_bases  # imports torch, for seconds

        if not self._bases:
            self._bases = find_bases((self.store, *self.options.more_stores), self.options.base)
        return self._bases

    def settle(self, file: AdapterFile) -> ScanResult:
        """Add one and say how that went."""
        name = (self.options.name_prefix + file.name)[:128]
        before = self.writer.find_adapter(name)
        try:
            record = self.add(AdapterFile(file.path, name, file.origin, file.size_bytes))
        except StoreError as error:
            return ScanResult(
                outcome="refused", path=str(file.path), name=name, why=error.message, code=error.code.value
            )
        return ScanResult(
            outcome="added" if before is None else "unchanged" if before == record else "replaced",
            path=str(file.path),
            name=record.name,
            size_bytes=record.blob.size_bytes,
        )

    def add(self, file: AdapterFile) -> AdapterRecord:
        check_name(file.name)
        header = read_plain_header(file.path)
        workspace = self.writer.workspace()
        try:
            with translated_write_errors(f"cannot add {file.name}"):
                draft = self._draft(file, header, workspace)
            return self.writer.publish_adapter(draft, replace=self.options.replace)
        finally:
            shutil.rmtree(workspace)

    def _draft(self, file: AdapterFile, header: Header, workspace: Path) -> AdapterDraft:
        base, converted = self._convert(file, header, workspace)
        path = workspace / "adapter.safetensors"
        targets, blob = write_targets(path, converted)
        fitting = [base, *(other for other in self._others(base) if not _lacks(other, targets))]
        models = [name for fit in fitting for name in fit.models]
        record = AdapterRecord(
            name=file.name,
            family=base.family.__name__,
            bases=_base_records(fitting, targets),
            base_model=self.options.base or (models[0] if len(models) == 1 else ""),
            targets=targets,
            blob=blob,
            content=content_id(targets, blob),
            facts=read_facts(file.path, header.metadata),
            source=file.origin,
            source_sha256=_sha256(file.path),
            added_at_unix_s=time.time(),
        )
        assert misfit(record, base.signatures) is None  # it was converted for this very base
        folder = workspace / "adapter"
        folder.mkdir()
        return AdapterDraft(record, path, folder)

    def _convert(
        self, file: AdapterFile, header: Header, workspace: Path
    ) -> "tuple[Base, list[ConvertedTarget]]":
        """The LoRA as the first base that it fits takes it. Raises `StoreError` with why none does."""
        from understudyd.store.adapters.conversion import convert  # imports torch, for seconds
        from understudyd.store.adapters.normalising import normalised

        reasons = []
        for base in self.find_bases():
            try:
                return base, convert(normalised(file.path, header, base, workspace), base)
            except StoreError as error:
                if error.code is not StoreErrorCode.ADAPTER_MISFIT:
                    raise
                reasons.append(f"{base.models[0]}: {error.message}")
        shown = "; ".join(reasons[:_LISTED]) + ("; ..." if len(reasons) > _LISTED else "")
        is_open = self.options.base is None
        what = "fits no model of the store" if is_open else "does not fit"
        raise StoreError(
            StoreErrorCode.ADAPTER_MISFIT,
            f"{file.path.name} {what} ({shown}); add the base model it was made for"
            + ("" if is_open else ", or name that (--base)"),
        )

    def _others(self, base: "Base") -> "list[Base]":
        return [other for other in self.find_bases() if other is not base and other.family is base.family]


def _lacks(base: "Base", targets: tuple[TargetRecord, ...]) -> bool:
    return target_misfit(targets, base.signatures) is not None


def _base_records(bases: "Sequence[Base]", targets: tuple[TargetRecord, ...]) -> tuple[BaseRecord, ...]:
    changed = {target.component for target in targets}
    found = (record for base in bases for record in base.records if record.component in changed)
    return tuple(dict.fromkeys(found))


def write_targets(
    path: Path, converted: "Sequence[ConvertedTarget]"
) -> tuple[tuple[TargetRecord, ...], BlobRecord]:
    """Write the blob: A and B of each target in turn, as the file had them. Raises `OSError`."""
    from understudyd.store.signature import bytes_of, dtype_name

    tensors = {
        f"{target.component}.{target.module_path}.{end}": factor
        for target in converted
        for end, factor in (("lora_A.weight", target.down), ("lora_B.weight", target.up))
    }
    layout = plan_blob((name, dtype_name(t.dtype), tuple(t.shape)) for name, t in tensors.items())
    blob = write_blob(path, layout, lambda span: bytes_of(tensors[span.name]))
    spans = {span.name: _tensor_record(span) for span in layout.tensors}
    targets = tuple(
        TargetRecord(
            component=target.component,
            path=f"{target.module_path}.weight",
            kind=target.kind,
            shape=target.shape,
            rank=target.rank,
            alpha=target.alpha,
            alpha_dtype=target.alpha_dtype,
            is_rank_stabilised=target.is_rank_stabilised,
            down=spans[f"{target.component}.{target.module_path}.lora_A.weight"],
            up=spans[f"{target.component}.{target.module_path}.lora_B.weight"],
        )
        for target in converted
    )
    return targets, blob


def _tensor_record(span: TensorSpan) -> TensorRecord:
    return TensorRecord(
        path=span.name,
        kind="parameter",
        dtype=span.dtype,
        shape=span.shape,
        offset=span.begin,
        size_bytes=span.size_bytes,
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Adding every model of a folder tree in one process: one writer lock, one import of torch.

One bad model does not stop the others. Each result is told as it comes, so that a daemon can serve what is
there while the rest is read.
"""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import msgspec

from understudy.admin import ScanResult
from understudyd.store.errors import StoreError, StoreErrorCode
from understudyd.store.ingest import IngestOptions, Progress, ingest_one, no_progress
from understudyd.store.records import ModelRecord
from understudyd.store.sources.checkpoint import read_checkpoint
from understudyd.store.sources.frame import check_config, choose_like
from understudyd.store.sources.hub_cache import is_cache_entry, repository_id
from understudyd.store.sources.scanning import Candidate, PassedOver, model_name, numbered, scan
from understudyd.store.store import Store
from understudyd.store.writer import Writer


def ingest_tree(
    store: Store,
    root: Path,
    options: IngestOptions,
    *,
    name_prefix: str = "",
    progress: Progress = no_progress,
    on_result: Callable[[ScanResult], None] = lambda result: None,
) -> list[ScanResult]:
    """Add every model below `root`; `on_result` is told of each find as soon as it is settled.

    Names are made from paths and are the same the next time. Phases of `progress` are "<name>: <phase>",
    with bytes of all models together. Raises `StoreError` when the tree or the store cannot be used; what is
    wrong with one model is in its result.
    """
    results: list[ScanResult] = []

    def settle(result: ScanResult) -> None:
        results.append(result)
        on_result(result)

    finds = scan(root)
    for find in finds:
        if isinstance(find, PassedOver):
            settle(_passed_over(find))
    candidates = [find for find in finds if isinstance(find, Candidate)]
    bytes_total = sum(candidate.size_bytes for candidate in candidates)
    bytes_done = 0
    with store.writing() as writer:
        records = store.models()
        for candidate in candidates:
            tell = _share(progress, candidate, bytes_done, bytes_total)
            settle(_Addition(store, writer, candidate, options, name_prefix, records).run(tell))
            bytes_done += candidate.size_bytes
            progress(candidate.name, bytes_done, bytes_total)
    return results


def plan_tree(
    store: Store | None, root: Path, options: IngestOptions, *, name_prefix: str = ""
) -> list[ScanResult]:
    """What `ingest_tree` would try, without reading weights: nothing is written.

    "added" then means that nothing speaks against it yet; "unchanged", or with `replace` "replaced", that an
    earlier scan made a model of it, which would be compared. `store` is None when there is none yet.
    """
    results = []
    records = {} if store is None else store.models()
    planned = {} if store is None else {name: store.model_folder(name) for name in records}
    for find in scan(root):
        if isinstance(find, PassedOver):
            results.append(_passed_over(find))
            continue
        known = _known(records, find, name_prefix)
        name = known.name if known is not None else _free(model_name(find.name, name_prefix), planned)
        result = ScanResult(
            outcome="added" if known is None else "replaced" if options.replace else "unchanged",
            path=str(find.path),
            name=name,
            size_bytes=find.size_bytes,
        )
        try:
            if find.is_checkpoint:
                _check_fit(find.path, options, planned)
            else:
                planned[name] = find.path
        except StoreError as error:
            result = msgspec.structs.replace(
                result, outcome="refused", why=error.message, code=error.code.value
            )
        results.append(result)
    return results


@dataclass
class _Addition:
    """One candidate on its way into the store. `records` are its models, kept up to date."""

    store: Store
    writer: Writer
    candidate: Candidate
    options: IngestOptions
    name_prefix: str
    records: dict[str, ModelRecord]
    number: int = 1

    def run(self, progress: Progress) -> ScanResult:
        candidate = self.candidate
        known = _known(self.records, candidate, self.name_prefix)
        name = known.name if known is not None else self._name()
        # A name that another source has is never replaced: the model gets a number instead.
        options = replace(self.options, replace=self.options.replace and known is not None)
        try:
            record = ingest_one(
                self.store, self.writer, name, str(candidate.path), options, progress, self._next_name
            )
        except StoreError as error:
            return ScanResult(
                outcome="refused",
                path=str(candidate.path),
                name=name,
                why=error.message,
                code=error.code.value,
            )
        before = self.records.get(record.name)
        self.records[record.name] = record
        return ScanResult(
            outcome="added" if before is None else "unchanged" if before == record else "replaced",
            path=str(candidate.path),
            name=record.name,
            size_bytes=record.size_bytes,
        )

    def _name(self) -> str:
        return numbered(model_name(self.candidate.name, self.name_prefix), self.number)

    def _next_name(self, existing: ModelRecord) -> str | None:
        """The next name; none when the model that is in the way is an older state of this one."""
        if _is_of(existing, self.candidate):
            return None
        self.number += 1
        return self._name()


def _known(records: Mapping[str, ModelRecord], candidate: Candidate, prefix: str) -> ModelRecord | None:
    """The model that was made of this path before; when a prefix is asked for, under a name that has it."""
    base = model_name(candidate.name, prefix)
    for record in records.values():
        if _is_of(record, candidate) and (not prefix or _is_numbered(record.name, base)):
            return record
    return None


def _is_numbered(name: str, base: str) -> bool:
    """Whether a scan may have made `name` of `base`."""
    digits = name.rpartition("-")[2]
    return name == base or (digits.isdecimal() and name == numbered(base, int(digits)))


def _is_of(record: ModelRecord, candidate: Candidate) -> bool:
    if is_cache_entry(candidate.path):
        return record.source.partition("@")[0] == repository_id(candidate.path)
    return record.source == str(candidate.path)


def _free(name: str, taken: Container[str]) -> str:
    number = 1
    while numbered(name, number) in taken:
        number += 1
    return numbered(name, number)


def _check_fit(path: Path, options: IngestOptions, folders: Mapping[str, Path]) -> None:
    """Refuse a checkpoint for which nothing has the rest, as ingest would; `folders` are those of models."""

    def folder_of(name: str) -> Path:
        if name not in folders:
            raise StoreError(StoreErrorCode.NOT_FOUND, f"there is no model {name!r:.80} to be like")
        return folders[name]

    checkpoint = read_checkpoint(path)
    if options.config is not None:
        check_config(checkpoint, options.config)
    else:
        choose_like(checkpoint, options.like, folder_of)


def _passed_over(find: PassedOver) -> ScanResult:
    outcome: Literal["refused", "skipped"] = "refused" if find.is_refused else "skipped"
    return ScanResult(outcome=outcome, path=str(find.path), why=find.why, code=find.code.value)


def _share(progress: Progress, candidate: Candidate, before: int, total: int) -> Progress:
    """One model's progress as its share of the whole: writing takes most of the time."""
    written = 0
    component_done: dict[str, int] = {}

    def tell(phase: str, done: int, _: int) -> None:
        nonlocal written
        if phase.startswith("write "):
            component_done[phase] = done
            written = min(candidate.size_bytes, sum(component_done.values()))
        progress(f"{candidate.name}: {phase}", before + written, total)

    return tell

"""Removing a model while serving, and what an operator should hear about it."""

from collections.abc import Mapping
from typing import Any

from understudy.admin import AdminError
from understudyd.shell.adapter_book import AdapterBook, AdapterRefused
from understudyd.shell.keeper import Keeper
from understudyd.store.errors import StoreError, StoreErrorCode
from understudyd.store.records import ModelRecord


async def remove(keeper: Keeper, name: str) -> dict[str, Any]:
    """Remove a model that is served; the command's document. Raises `AdminError`."""
    gone = keeper.served.records[name]
    before = _unaskable(keeper.adapters.book)
    try:
        freed_bytes = await keeper.remove(name)
        await keeper.settings.forget(name)
    except StoreError as error:
        if error.code is StoreErrorCode.READ_ONLY:
            raise AdminError(error.code.value, error.message) from error
        raise AdminError(error.code.value, f"{name!r} is served no more, but: {error}") from error
    document: dict[str, Any] = {"name": name, "freed_bytes": freed_bytes}
    if not freed_bytes:
        document["kept"] = _why_kept(gone, keeper.served.records)
    after = _unaskable(keeper.adapters.book)
    if lost := sorted(after.keys() - before.keys()):
        document["warning"] = "; ".join(after[name] for name in lost)
    return document


def _unaskable(book: AdapterBook) -> dict[str, str]:
    """Adapters that cannot be asked for by their name alone, and why."""
    refused = {}
    for name, found in book.found.items():
        try:
            book.base_of(found)
        except AdapterRefused as error:
            refused[name] = str(error)
    return refused


def _why_kept(gone: ModelRecord, records: Mapping[str, ModelRecord]) -> str:
    """Why nothing on the disk is free now that the model is gone."""
    left = {component.blob.sha256 for component in gone.components}
    sharing = []
    for record in records.values():
        theirs = {component.blob.sha256 for component in record.components}
        if left & theirs:
            sharing.append(record.name)
            left -= theirs
    if not left:
        return f"other models have its weights: {', '.join(sorted(sharing))}"
    return "its files go when no request, no other daemon and no damaged model may need them"

"""Adding many models or adapters while serving: one process reads, each is served as soon as it is there."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from understudy.admin import AddLora, Note, Scan, ScanResult
from understudyd.shell.admin import Notify
from understudyd.shell.ingesting import ingest
from understudyd.shell.keeper import Keeper, ReplaceFailed
from understudyd.store.errors import StoreError, StoreErrorCode


async def scan(keeper: Keeper, command: Scan, notify: Notify) -> list[ScanResult]:
    """Ingest `command.folder` and serve what came of it; all results, those of `notify`'s notes.

    Raises `IngestFailed` when the tree cannot be read or the process died; what was added until then is
    served.
    """
    results, document = await _serve_what_comes(keeper, command, notify, _serve)
    if command.dry_run:
        return msgspec.convert(document["results"], list[ScanResult])
    return results


async def add_loras(keeper: Keeper, command: AddLora, notify: Notify) -> list[ScanResult]:
    """The same for the LoRAs of `command.source`."""
    results, _ = await _serve_what_comes(keeper, command, notify, _serve_lora)
    return results


async def _serve_what_comes(
    keeper: Keeper,
    command: Scan | AddLora,
    notify: Notify,
    serve: Callable[[Keeper, ScanResult], Awaitable[ScanResult]],
) -> tuple[list[ScanResult], Any]:
    """All results by path, and the process's own document."""
    results: list[ScanResult] = []
    serving: set[asyncio.Task[None]] = set()

    async def settle(result: ScanResult) -> None:
        served = await serve(keeper, result)
        results.append(served)
        notify(Note(phase=served.outcome, result=served))

    def on_note(note: Note) -> None:
        if note.result is None:
            notify(note)
        else:
            task = asyncio.create_task(settle(note.result))
            serving.add(task)

    try:
        async with keeper.lock:  # one writer at a time
            read_only = [store.path for store in keeper.stores.read_only]
            document = await ingest(keeper.stores.own.path, command, on_note, read_only)
    finally:
        await asyncio.gather(*serving)
    return sorted(results, key=lambda result: result.path), document


async def _serve(keeper: Keeper, result: ScanResult) -> ScanResult:
    """Serve a model that is in the store now; the result, or why it is there but not served."""
    is_served = result.outcome == "unchanged" and result.name in keeper.served.records
    if result.outcome in ("refused", "skipped") or is_served:
        return result
    try:
        if keeper.is_leaving(result.name):
            raise StoreError(StoreErrorCode.EXISTS, f"{result.name} is being removed; scan again later")
        await keeper.refresh(result.name)
    except (StoreError, ReplaceFailed) as error:
        code = error.code.value if isinstance(error, StoreError) else "replace_failed"
        return msgspec.structs.replace(result, outcome="refused", why=str(error), code=code)
    return result


async def _serve_lora(keeper: Keeper, result: ScanResult) -> ScanResult:
    """`_serve` for an adapter."""
    is_served = result.outcome == "unchanged" and result.name in keeper.adapters.book.found
    if result.outcome in ("refused", "skipped") or is_served:
        return result
    try:
        await keeper.adapters.refresh(result.name)
    except StoreError as error:
        return msgspec.structs.replace(result, outcome="refused", why=error.message, code=error.code.value)
    return result

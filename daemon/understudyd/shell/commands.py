"""What each admin command does and the document it answers with (plain JSON, stable keys)."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any, Protocol, assert_never

from understudy import __version__
from understudy import admin as proto
from understudy.admin import AdminError
from understudyd.core import events as ev
from understudyd.core import snapshot
from understudyd.core.entities import Model
from understudyd.core.refusals import larger_than_arena, refusal_of
from understudyd.names import how_to_list, unknown_model
from understudyd.shell.adapter_book import AdapterRefused
from understudyd.shell.admin import Notify
from understudyd.shell.explaining import SHOWN_DECISIONS, describe
from understudyd.shell.ingesting import IngestFailed, ingest
from understudyd.shell.keeper import ReplaceFailed
from understudyd.shell.lora_commands import LoraCommands
from understudyd.shell.lora_views import LoraViews, blob_tier
from understudyd.shell.operations import Operations, Service
from understudyd.shell.removing import remove
from understudyd.shell.runtime import Runtime
from understudyd.shell.scanning import scan
from understudyd.shell.supervisor import LoaderPool
from understudyd.shell.timeline import Timeline
from understudyd.store.errors import StoreError


class Lifecycle(Service, Protocol):
    """The daemon's own state."""

    device: str
    daemon_id: str
    started_at_s: float

    @property
    def missing(self) -> dict[str, str]:
        """Models of `[startup]` that were not ready when the daemon was, and why."""

    def request_shutdown(self, drain_s: float) -> None:
        """Stop serving and exit."""


class Commands:
    """Carries out admin commands; `execute` is what `AdminServer` calls."""

    def __init__(
        self,
        runtime: Runtime,
        pool: LoaderPool,
        timeline: Timeline,
        daemon: Lifecycle,
        clock: Callable[[], float],
    ) -> None:
        self._runtime = runtime
        self._machine = runtime.machine
        self._pool = pool
        self._timeline = timeline
        self._daemon = daemon
        self._clock = clock
        views = LoraViews(runtime.keeper.adapters, runtime.machine, runtime.tally)
        self._loras = LoraCommands(runtime.keeper, views, clock)
        self._operations = Operations(runtime, daemon)

    async def execute(self, command: proto.Command, notify: Notify) -> Any:
        """The command's result document. Raises `AdminError`."""
        match command:
            case proto.Status():
                return self._status()
            case proto.Models():
                return [
                    self._model_row(v) for v in snapshot.models(self._machine) if not self._is_derived(v.name)
                ]
            case proto.Loras():
                return self._loras.listing()
            case proto.AddLora():
                return await self._loras.add(command, notify)
            case proto.RemoveLora(name=name):
                return await self._loras.remove(name)
            case proto.Show(arena=True):
                return self._arena()
            case proto.Show(name=name):
                return self._show(name)
            case proto.Queue():
                return [self._request_row(v) for v in snapshot.requests(self._machine, self._clock())]
            case proto.Decisions(last=last):
                return self._decisions(last)
            case proto.Loaders():
                return self._loaders()
            case proto.Trace(seconds=seconds, start=start):
                return self._timeline.page(seconds, start)
            case proto.Add():
                return await self._add(command, notify)
            case proto.Scan():
                return await self._scan(command, notify)
            case proto.Rescan():
                return await self._rescan()
            case proto.Remove(name=name):
                self._known(name)
                return await remove(self._runtime.keeper, name)
            case proto.Load(name=name, wait=wait):
                return await self._load(name, wait)
            case proto.Evict(name=name):
                return self._evict(name)
            case proto.Pin(name=name):
                return self._pin(name, pinned=True)
            case proto.Unpin(name=name):
                return self._pin(name, pinned=False)
            case proto.Set(name=name, max_batch=max_batch):
                return await self._set(name, max_batch)
            case proto.Drain() | proto.Resume() | proto.Reload() | proto.DropCache() | proto.LogLevel():
                return await self._operations.execute(command)
            case proto.CancelRequest(id=request_id):
                if request_id not in self._runtime.pending:
                    raise AdminError("not_found", f"no open request {request_id!r}; `queue` lists them")
                self._runtime.handle(ev.RequestCancelled(request_id))
                return {"id": request_id}
            case proto.Shutdown(drain_s=drain_s):
                self._daemon.request_shutdown(drain_s)
                return {"draining": len(self._runtime.pending)}
            case _:
                assert_never(command)

    # -- reading ------------------------------------------------------------------------------------

    def _status(self) -> dict[str, Any]:
        machine, runtime = self._machine, self._runtime
        models = [m for m in machine.residency.models.values() if not m.info.is_derived]
        tally = runtime.tally
        return {
            "daemon": self._daemon.daemon_id,
            "version": __version__,
            "pid": os.getpid(),
            "state": self._daemon.state,
            "uptime_s": round(self._clock() - self._daemon.started_at_s, 1),
            "device": self._daemon.device,
            "store": str(runtime.keeper.stores.own.path),
            "models": len(models),
            "models_resident": sum(m.is_resident for m in models),
            "loras": len(runtime.keeper.adapters.book.found),
            "combinations": len(machine.residency.models) - len(models),
            "combinations_resident": sum(
                m.is_resident for m in machine.residency.models.values() if m.info.is_derived
            ),
            "requests_waiting": len(machine.queue),
            "request_running": self._running(),
            "max_batch": {m.name: m.max_batch for m in models if m.max_batch > 1},
            "requests_done": tally.done,
            "requests_failed": sum(tally.failed.values()),
            "failures": dict(tally.failed),
            "arena": dataclasses.asdict(snapshot.arena(machine)),
            "host_pool": dataclasses.asdict(snapshot.host_pool(machine)),
            "hand_over": self._pool.hand_over.kind,
            "hand_over_reason": self._pool.hand_over.reason,
            "loaders": self._loaders(),
            "compiled": self._operations.compiled(),
            "last_error": tally.last_error,
            "last_errors": [
                {"s_ago": round(self._clock() - f.at_s, 1), "code": f.code, "message": f.message}
                for f in tally.last_errors
            ],
            "tiers_on_receipt": dict(tally.tiers_on_receipt),
            "not_loaded_at_start_up": self._daemon.missing,
            "visible_switch_ms": tally.visible_switch_ms(),
        }

    def _loaders(self) -> list[dict[str, Any]]:
        rows = []
        for status in self._pool.status():
            row = dataclasses.asdict(status)
            row["id"] = row.pop("loader_id")
            rows.append(row)
        return rows

    def _running(self) -> dict[str, Any] | None:
        for request_id, request in self._machine.running.items():
            pending = self._runtime.pending.get(request_id)
            step, steps = (pending.step, pending.steps) if pending is not None else (0, 0)
            batch = len(self._machine.running)
            return {"id": request_id, "model": request.model, "step": step, "steps": steps, "batch": batch}
        return None

    def _model_row(self, view: snapshot.ModelView) -> dict[str, Any]:
        tally = self._runtime.tally
        used_at_s = tally.last_used_at_s.get(view.name)
        record = self._runtime.records.get(view.name)
        return {
            "name": view.name,
            "pipeline": record.pipeline_class if record is not None else "",
            "size_bytes": view.size_bytes,
            "tier": view.tier.value,
            "pinned": view.pinned,
            "requests": tally.by_name[view.name],
            "last_used_s_ago": None if used_at_s is None else round(self._clock() - used_at_s, 1),
        }

    def _is_derived(self, name: str) -> bool:
        return self._machine.residency.models[name].info.is_derived

    def _show(self, name: str) -> dict[str, Any]:
        if name not in self._runtime.records and (document := self._loras.show(name)) is not None:
            return document | {"decisions": self._told(SHOWN_DECISIONS, document["name"])}
        self._known(name)
        view = snapshot.model(self._machine, name)
        edition = self._runtime.keeper.served.current(name)
        record = edition.record
        blobs = self._machine.residency.blobs
        components = [
            {
                "name": c.name,
                "signature": c.signature,
                "blob": c.blob.sha256,
                "size_bytes": c.blob.size_bytes,
                "tier": blob_tier(self._machine, c.blob.sha256).value,
                "host_copy": blobs[c.blob.sha256].has_copy,
                "shared_by": sorted(blobs[c.blob.sha256].models),
                "history": blobs[c.blob.sha256].life.story(),
            }
            for c in record.components
        ]
        more = {
            "parts": view.parts,
            "tasks": self._runtime.tasks(name),
            "waiting": view.waiting,
            "leases": view.leases,
            "max_batch": view.max_batch,
            "can_batch": view.can_batch,
            "chance_next": round(view.chance, 4),
            "dtype": record.dtype,
            "source": record.source,
            "store": str(edition.home.path),
            "shadowed": [str(path) for path in edition.shadowed],
            "components": components,
            "decisions": self._told(SHOWN_DECISIONS, name),
        }
        return self._model_row(view) | more

    def _decisions(self, last: int) -> list[dict[str, Any]]:
        if self._machine.decisions is None:
            raise AdminError("off", "no decisions are kept; set decisions = 1000 in [policy] and restart")
        return self._told(last, None)

    def _told(self, last: int, name: str | None) -> list[dict[str, Any]]:
        kept, now_s = self._machine.decisions, self._clock()
        label = self._runtime.keeper.label
        return [] if kept is None else [describe(made, label, now_s) for made in kept.last(last, name)]

    def _arena(self) -> dict[str, Any]:
        machine = self._machine
        return {
            "size_bytes": machine.residency.arena.size_bytes,
            "extents": [dataclasses.asdict(v) for v in snapshot.extents(machine)],
            "tensors_outside": self._runtime.strays(),
            "host_pool": {
                "size_bytes": snapshot.host_pool(machine).size_bytes,
                "extents": [dataclasses.asdict(v) for v in snapshot.pool_extents(machine)],
            },
        }

    def _request_row(self, view: snapshot.RequestView) -> dict[str, Any]:
        pending = self._runtime.pending.get(view.id)
        row = dataclasses.asdict(view)
        row["tier"] = view.tier.value
        row["waited_s"] = round(view.waited_s, 3)
        row["starts_in_s"] = round(view.starts_in_s, 3)
        row["step"], row["steps"] = (pending.step, pending.steps) if pending is not None else (0, 0)
        return row

    # -- changing -----------------------------------------------------------------------------------

    async def _add(self, command: proto.Add, notify: Notify) -> dict[str, Any]:
        keeper = self._runtime.keeper
        if keeper.is_leaving(command.name):
            raise AdminError("exists", f"{command.name!r} is being removed; try again when it is gone")
        if command.name in self._runtime.records and not command.replace:
            raise AdminError(
                "exists", f"{command.name!r} exists; replace it (--replace), or choose another name"
            )
        try:
            async with keeper.lock:  # one writer at a time
                await ingest(keeper.stores.own.path, command, notify)
            record = await keeper.refresh(command.name)
        except IngestFailed as error:
            raise AdminError(error.code, str(error)) from error
        except StoreError as error:
            raise AdminError(error.code.value, error.message) from error
        except ReplaceFailed as error:
            message = f"the old {command.name!r} is served on, until the daemon ends: {error}"
            raise AdminError("replace_failed", message) from error
        document = {"name": record.name, "pipeline": record.pipeline_class, "size_bytes": record.size_bytes}
        model = self._machine.residency.models.get(record.name)
        warning = None if model is None else larger_than_arena(self._machine.residency, model)
        return document if warning is None else document | {"warning": f"added, but {warning} to use it"}

    async def _scan(self, command: proto.Scan, notify: Notify) -> dict[str, Any]:
        try:
            results = await scan(self._runtime.keeper, command, notify)
            return {"results": results, "dry_run": command.dry_run}
        except IngestFailed as error:
            raise AdminError(error.code, str(error)) from error

    async def _rescan(self) -> dict[str, Any]:
        return dataclasses.asdict(await self._runtime.keeper.rescan())

    async def _load(self, name: str, wait: bool) -> dict[str, Any]:
        name, model = self._meant(name)
        self._check_servable(model)
        models = self._machine.residency.models
        self._runtime.handle(ev.LoadWanted(name))
        if wait:
            await self._runtime.until(lambda: name not in self._machine.wanted)
            if name not in models or not models[name].is_ready:
                self._check_servable(models.get(name, model))
                raise AdminError("load_failed", f"{name!r} could not be loaded; `show {name}` says why")
        return {"name": name, "tier": models[name].tier.value}

    def _evict(self, name: str) -> dict[str, Any]:
        name, _ = self._meant(name)
        if name in self._machine.residency.pinned:
            raise AdminError("pinned", f"{name!r} is pinned; unpin it first")
        before = self._machine.residency.arena.free_bytes
        self._runtime.handle(ev.EvictWanted(name))
        model = self._machine.residency.models[name]
        if model.leases:
            raise AdminError("in_use", f"{name!r} is on stage or next; try again when it is not")
        freed = max(0, self._machine.residency.arena.free_bytes - before)
        return {"name": name, "freed_bytes": freed, "tier": model.tier.value}

    def _pin(self, name: str, *, pinned: bool) -> dict[str, Any]:
        name, model = self._meant(name)
        if pinned:
            self._check_servable(model)
        self._runtime.handle(ev.PinChanged(name, pinned))
        return {"name": name, "pinned": pinned, "tier": model.tier.value}

    async def _set(self, name: str, max_batch: int) -> dict[str, Any]:
        model = self._known(name)
        try:
            await self._runtime.keeper.set_max_batch(name, max_batch)
        except OSError as error:
            raise AdminError(
                "io_error", f"it cannot be kept: {error.strerror}; nothing has changed"
            ) from error
        document = {"name": name, "max_batch": max_batch}
        if max_batch == 1 or model.can_batch:
            return document
        return document | {"warning": "its pipeline serves one request a call: each goes on running alone"}

    def _check_servable(self, model: Model) -> None:
        """Raises `AdminError` with what keeps the model from running here."""
        refusal = refusal_of(self._machine.residency, model)
        if refusal is not None:
            raise AdminError(refusal[0].value, refusal[1])

    def _meant(self, name: str) -> tuple[str, Model]:
        """A model, or one with adapters, which the core knows from now on. Raises `AdminError`."""
        try:
            name = self._runtime.keeper.adapters.wish(name).model
        except AdapterRefused as error:
            raise AdminError(error.code, str(error)) from error
        model = self._machine.residency.models.get(name)
        return (name, model) if model is not None and model.info.is_derived else (name, self._known(name))

    def _known(self, name: str) -> Model:
        """A model without adapters. Raises `AdminError`."""
        model = self._machine.residency.models.get(name)
        if model is None or model.retiring or model.info.is_derived:
            if name in self._runtime.keeper.adapters.book.found:
                raise AdminError("unknown_model", f"{name!r} is a LoRA; `remove-lora` removes it")
            names = self._runtime.keeper.names()
            message = unknown_model(name, names, how_to_list(names, "understudyctl models"))
            raise AdminError("unknown_model", message)
        return model

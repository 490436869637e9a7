"""What waits lacks nothing that could be loaded or folded now: the ledger's look at the lookahead."""

from __future__ import annotations

from typing import TYPE_CHECKING

from understudyd.core.entities import Blob
from understudyd.core.machine import Machine
from understudyd.core.states import BlobState
from understudyd.core.windows import cheapest_window

if TYPE_CHECKING:
    from core_ledger import Ledger


def check_no_idle_hands(ledger: Ledger, now_s: float) -> None:
    """The first model that waits for weights lacks nothing that a loader, or the stage, could bring now."""
    if ledger.moves:
        return  # who was ready before the move is not now, but will be again
    machine = ledger.machine
    if machine.is_unsettled:
        assert machine.next_deadline_s(now_s) == now_s
        return  # the rest follows at the next event
    models, policy = machine.residency.models, machine.policy
    stage_is_busy = bool(ledger.running or ledger.deck)
    expected = policy.expected_order(machine.queue, machine.demand, machine.on_stage)
    lacking = [n for n in expected if not models[n].is_ready]
    if not policy.settings.lookahead and stage_is_busy:
        return
    to_load = policy.to_load(machine.demand, stage_is_busy)
    assert to_load == lacking[: max(1, policy.settings.lookahead)]
    timely = machine.timely
    known = [name for name in timely.names if name in to_load]
    for name in known + [name for name in to_load if name not in known]:
        needed = [blob for blob in models[name].needed() if not _awaits_sources(blob)]
        states = {blob.state for blob in needed}
        if BlobState.FETCHING in states:
            break  # there was no room for it, so that it goes to the host pool; the rest comes after
        if BlobState.ABSENT in states:
            for blob in needed:
                if blob.state is BlobState.ABSENT and blob.retry_at_s <= now_s:
                    if not (timely.is_early(models[name], now_s) and _needs_eviction(machine, name, blob)):
                        _cannot_be_begun(ledger, name, blob)
                    else:
                        assert _is_behind_others(machine, name), f"{name} is put off for nobody"
                    break
            break
        if timely.stage_awaits_load and BlobState.LOADING in states:
            break


def _needs_eviction(machine: Machine, name: str, absent: Blob) -> bool:
    """It and what else the model lacks need more than the largest gap."""
    beside = [b for b in machine.residency.models[name].blobs if b.state is BlobState.ABSENT]
    arena = machine.residency.arena
    sizes = [arena.rounded(blob.info.size_bytes) for blob in {absent, *beside}]
    return sum(sizes) > arena.largest_gap_bytes


def _is_behind_others(machine: Machine, name: str) -> bool:
    """Somebody who can run is ahead of it in the fair order."""
    own = machine.queue.head_of(name)
    ready = [r for r in machine.queue.waiting() if machine.residency.models[r.model].is_ready]
    return own is not None and any(
        (-r.info.priority, r.tag, r.seq) < (-own.info.priority, own.tag, own.seq) for r in ready
    )


def _awaits_sources(blob: Blob) -> bool:
    """An overlay that lacks something it is to be made of."""
    return blob.state is BlobState.ABSENT and any(s.state is not BlobState.RESIDENT for s in blob.sources)


def _cannot_be_begun(ledger: Ledger, name: str, absent: Blob) -> None:
    machine = ledger.machine
    has_room = _has_room(machine, name, absent)
    if absent.is_overlay:
        fold = ledger.folds.under_way
        assert fold is not None or not has_room, f"{absent.key} could be folded"
        is_needless = fold is not None and not _is_needed(machine, fold.overlay)
        assert not is_needless or ledger.folds.is_told_to_stop, f"{absent.key} waits for a needless fold"
        return
    is_idle = next(machine.residency.idle_loaders(), None) is not None
    assert not (is_idle and has_room), f"{absent.key} could be loaded"
    only_fetches = [load for load in ledger.loads.values() if load.offset is None]
    mine = {blob.key for blob in machine.residency.models[name].needed()}
    hinders = not is_idle and has_room and any(load.blob not in mine for load in only_fetches)
    assert not hinders or ledger.told_to_stop & ledger.loads.keys(), f"{absent.key} waits for fetches"


def _has_room(machine: Machine, name: str, absent: Blob) -> bool:
    residency, size = machine.residency, absent.info.size_bytes
    if residency.arena.largest_gap_bytes >= residency.arena.rounded(size):
        return True
    prices = machine.policy.candidates(residency, machine.demand, name, machine.on_stage)
    kept = machine.timely.loaded_before(name)
    candidates = [found for found in prices if found[1].blob not in kept]
    return cheapest_window(residency.arena, size, candidates) is not None


def _is_needed(machine: Machine, key: str) -> bool:
    blob = machine.residency.blobs[key]
    return machine.demand.awaits(blob) or machine.residency.is_pinned(blob)

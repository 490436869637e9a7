"""Independent books about the host pool: which bytes of it are whose, told by events and actions alone."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from understudyd.core import actions as ac
from understudyd.core import events as ev
from understudyd.core.machine import Machine

PAGE = 4096


def _rounded(size_bytes: int) -> int:
    return -(-max(1, size_bytes) // PAGE) * PAGE


@dataclass(eq=False)
class Copy:
    """Bytes of the host pool that nobody else may write to, in the ledger's opinion."""

    start: int
    end: int
    blob: str
    kind: str  # filling, ready, quarantined
    free_at_s: float | None = None
    readers: int = 0
    proved: bool = True


@dataclass
class PoolLedger:
    """Copies are dropped without an action: the machine may lack ready ones that nobody reads."""

    machine: Machine
    pool_bytes: int
    copies: list[Copy] = field(default_factory=list)
    used_by: dict[int, Copy] = field(default_factory=dict)
    lost: dict[int, list[Copy]] = field(default_factory=dict)

    def found(self, event: ev.CopiesFound, sizes: Mapping[str, int]) -> None:
        """What another daemon left: known blobs of the right size, each once, over nobody else's bytes."""
        for kept in event.copies:
            end = kept.offset + _rounded(kept.size_bytes)
            is_true = sizes.get(kept.blob) == kept.size_bytes and kept.offset % PAGE == 0
            is_inside = kept.offset >= 0 and end <= self.pool_bytes
            clash = any(c.blob == kept.blob or (c.start < end and kept.offset < c.end) for c in self.copies)
            if is_true and is_inside and not clash:
                self.copies.append(Copy(kept.offset, end, kept.blob, "ready", proved=False))

    def dropped(self) -> None:
        """An operator has all copies forgotten that nobody reads."""
        self.copies = [copy for copy in self.copies if copy.kind != "ready" or copy.readers]

    def start(self, load: ac.StartLoad) -> None:
        """A load reads a copy that is ready, or fills bytes that are nobody's."""
        if load.pool_offset is None:
            assert not load.from_pool and load.offset is not None, "a load from nowhere, or to nowhere"
            return
        assert load.from_pool or not load.must_verify
        end = load.pool_offset + _rounded(load.size_bytes)
        assert 0 <= load.pool_offset < end <= self.pool_bytes
        if load.from_pool:
            copy = next(c for c in self.copies if (c.start, c.blob) == (load.pool_offset, load.blob))
            assert copy.kind == "ready", f"{load} reads bytes that are {copy.kind}"
            assert load.must_verify is not copy.proved, f"{load}: nobody, or somebody, looked at {copy}"
            copy.readers += 1
        else:
            self.settle()
            clash = [c for c in self.copies if load.pool_offset < c.end and c.start < end]
            assert not clash, f"{load} over {clash}"
            assert all(c.blob != load.blob or c.kind == "quarantined" for c in self.copies), "copied twice"
            copy = Copy(load.pool_offset, end, load.blob, "filling")
            self.copies.append(copy)
        self.used_by[load.load_id] = copy

    def finished(self, load: ac.StartLoad) -> None:
        copy = self._ended(load)
        if copy is None:
            return
        copy.proved = True
        if copy.kind == "filling":
            copy.kind = "ready"

    def ended_empty(self, load: ac.StartLoad) -> None:
        copy = self._ended(load)
        if copy is not None and copy.kind == "filling":
            self.copies.remove(copy)

    def loader_lost(self, loader_id: int, load: ac.StartLoad) -> None:
        copy = self._ended(load)
        if copy is not None and copy.kind == "filling":
            copy.kind = "quarantined"
            self.lost.setdefault(loader_id, []).append(copy)

    def loader_reaped(self, loader_id: int, free_at_s: float) -> None:
        for copy in self.lost.pop(loader_id, []):
            copy.free_at_s = free_at_s

    def pass_time(self, now_s: float) -> None:
        self.copies = [c for c in self.copies if c.free_at_s is None or c.free_at_s > now_s]

    def settle(self) -> None:
        """Forget ready copies that the machine has dropped; in all else it must believe the same."""
        theirs = {(e.offset, e.size_bytes, e.blob) for e in self.machine.residency.copies.pool}
        dropped = [c for c in self.copies if (c.start, c.end - c.start, c.blob) not in theirs]
        for copy in dropped:
            assert copy.kind == "ready" and not copy.readers, f"{copy} was dropped"
            self.copies.remove(copy)

    def same_as_machine(self) -> None:
        self.settle()
        theirs = {(e.offset, e.size_bytes, e.blob) for e in self.machine.residency.copies.pool}
        assert theirs == {(c.start, c.end - c.start, c.blob) for c in self.copies}

    def _ended(self, load: ac.StartLoad) -> Copy | None:
        copy = self.used_by.pop(load.load_id, None)
        if copy is not None and load.from_pool:
            copy.readers -= 1
        return copy

"""Bytes on their way: loads under way share the disk and the bus.

A load from disk into the arena uses both, one to the host pool only the disk, one from the host pool only the
bus. Who is slowed down by the disk leaves his part of the bus to the others.
"""

from dataclasses import dataclass

from understudyd.simulate.profiles import Profile


@dataclass(slots=True)
class _Flow:
    """A load under way."""

    load_id: int
    left_bytes: float
    on_disk: bool
    on_bus: bool
    bytes_per_s: float = 0.0


class Traffic:
    """At most one flow a loader. Times are the caller's clock and never go back."""

    def __init__(self, profile: Profile) -> None:
        self._disk = profile.disk_bytes_per_s.value
        self._bus = profile.bus_bytes_per_s.value
        self._loader = profile.loader_bytes_per_s.value
        self._flows: list[_Flow] = []
        self._at_s = 0.0
        self._is_paused = False
        self.next_end_s = float("inf")

    def start(self, load_id: int, size_bytes: int, *, on_disk: bool, on_bus: bool, now_s: float) -> None:
        """A load's first byte moves now."""
        self._advance(now_s)
        self._flows.append(_Flow(load_id, size_bytes, on_disk, on_bus))
        self._share()

    def cancel(self, load_id: int, now_s: float) -> bool:
        """Stop a load; False when all its bytes have arrived."""
        self._advance(now_s)
        flow = next((flow for flow in self._flows if flow.load_id == load_id), None)
        if flow is None:
            return False
        self._flows.remove(flow)
        self._share()
        return True

    def pause(self, is_paused: bool, now_s: float) -> None:
        """Let every load rest, or go on."""
        self._advance(now_s)
        self._is_paused = is_paused
        self._share()

    def pop_ended(self) -> int:
        """The load that ends at `next_end_s`."""
        self._advance(self.next_end_s)
        ended = min(self._flows, key=lambda flow: flow.left_bytes / flow.bytes_per_s)
        self._flows.remove(ended)
        self._share()
        return ended.load_id

    def _advance(self, now_s: float) -> None:
        passed_s = now_s - self._at_s
        for flow in self._flows:
            flow.left_bytes = max(0.0, flow.left_bytes - flow.bytes_per_s * passed_s)
        self._at_s = now_s

    def _share(self) -> None:
        """Everybody the same, and nobody more than he can use."""
        readers = sum(flow.on_disk for flow in self._flows)
        passing = sum(flow.on_disk and flow.on_bus for flow in self._flows)
        copying = sum(not flow.on_disk for flow in self._flows)
        read = min(self._loader, self._disk / readers) if readers else 0.0
        passed = min(read, self._bus / (passing + copying)) if passing else 0.0
        copied = min(self._loader, (self._bus - passing * passed) / copying) if copying else 0.0
        next_s = float("inf")
        for flow in self._flows:
            flow.bytes_per_s = copied if not flow.on_disk else passed if flow.on_bus else read
            if self._is_paused:
                flow.bytes_per_s = 0.0
            else:
                next_s = min(next_s, flow.left_bytes / flow.bytes_per_s)
        self.next_end_s = self._at_s + next_s

"""What most systems do today, to compare with: first come first served, load on demand, evict.

A model of its own, not the core machine: whole models, one after another, nothing ahead of time. It is
generous to them: components load at once at the full rate, host memory holds as many models as it can from
the start, and images are encoded off the stage. Adapters are fused into a resident model's own weights.
"""

from collections.abc import Iterable

from understudyd.recorded import TraceRequest
from understudyd.simulate.meter import Meter
from understudyd.simulate.profiles import Profile
from understudyd.simulate.references import Valuing


class _Tier:
    """Room for so many models; evicts the one with the lowest chance."""

    def __init__(self, room: int, valuing: Valuing) -> None:
        self._room = room
        self._valuing = valuing
        self._names: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def add(self, name: str) -> None:
        """The model is here from now on, if there is any room at all."""
        if not self._room or name in self._names:
            return
        if len(self._names) >= self._room:
            self._names.remove(min(self._names, key=lambda known: (self._valuing.chance(known), known)))
        self._names.add(name)


def serve(
    requests: Iterable[TraceRequest],
    profile: Profile,
    valuing: Valuing,
    *,
    resident: int,
    in_host: int,
    models: Iterable[str],
) -> Meter:
    """Serve all requests with room for `resident` models in the arena and `in_host` in host memory."""
    meter = Meter()
    arena, host = _Tier(max(1, resident), valuing), _Tier(in_host, valuing)
    for _, name in zip(range(in_host), models):
        host.add(name)
    prepared: set[str] = set()
    fused: dict[str, str] = {}
    free_at_s, on_stage = 0.0, ("", "")
    for request in requests:
        name, at_s = request.model, request.arrival_s
        meter.arrived(at_s)  # in order of service: whoever comes meanwhile changes nothing that is measured
        valuing.saw(name, client=request.client, now_s=at_s)
        start_s = max(free_at_s, at_s)
        if name not in arena:
            start_s += _load_s(profile, is_in_host=name in host)
            arena.add(name)
            host.add(name)
            fused.pop(name, None)
        if request.loras != fused.get(name, "") and profile.loras is not None:
            start_s += profile.loras.change_s.value
            fused[name] = request.loras
        if name not in prepared:
            start_s += profile.prepare_s.value
            prepared.add(name)
        is_switch = (name, request.loras) != on_stage
        start_s += profile.bind_s.value if is_switch else 0.0
        meter.started(at_s, is_switch, start_s)
        run_s = profile.run_s(request)
        free_at_s, on_stage = start_s + run_s, (name, request.loras)
        meter.ended(run_s, free_at_s)
    return meter


def _load_s(profile: Profile, *, is_in_host: bool) -> float:
    rate = profile.bus_bytes_per_s.value
    if not is_in_host:
        rate = min(rate, profile.disk_bytes_per_s.value)
    return profile.load_s.value + profile.own_bytes / rate

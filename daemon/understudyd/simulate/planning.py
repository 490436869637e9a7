"""How much memory a trace needs: one row a size, from the smallest arena that can work to the largest."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import msgspec

from understudyd.simulate.meter import Meter
from understudyd.simulate.references import Recency
from understudyd.simulate.report import Scenario, foresight, play, serve_on_demand

_SIZES = 8


class Felt(msgspec.Struct, frozen=True):
    """What one policy makes of one size."""

    idle_percent: float
    wait_p50_s: float
    wait_p95_s: float
    wait_p99_s: float
    visible_switch_p50_ms: float
    visible_switch_p95_ms: float
    utilisation_percent: float


class Row(msgspec.Struct, frozen=True):
    """One size of the arena. `on_demand` loads on demand with LRU, `foresight` on demand as Belady would."""

    arena_bytes: int
    resident: int
    understudy: Felt
    on_demand: Felt
    foresight: Felt


class Plan(msgspec.Struct, frozen=True):
    """All rows by size; `enough_bytes` is the smallest that meets the target, None when none does."""

    target_idle_percent: float
    rows: tuple[Row, ...]
    enough_bytes: int | None
    on_demand_enough_bytes: int | None


def sizes(scenario: Scenario, arena_up_to_bytes: int) -> list[int]:
    """Models to have room for, in equal ratios: from two, so that one can load while another runs."""
    most = replace(scenario, arena_bytes=arena_up_to_bytes).resident
    least = min(2, most)
    steps = range(_SIZES)
    return sorted({round(least * (most / max(1, least)) ** (i / (_SIZES - 1))) for i in steps} - {0})


def sweep(scenario: Scenario, residents: Sequence[int]) -> Iterator[Row]:
    """Rows as they are found, smallest first."""
    for resident in residents:
        size_bytes = scenario.profile.bytes_of(resident)
        sized = replace(scenario, arena_bytes=size_bytes)
        yield Row(
            arena_bytes=size_bytes,
            resident=resident,
            understudy=_felt(play(sized).meter),
            on_demand=_felt(serve_on_demand(sized, Recency())),
            foresight=_felt(serve_on_demand(sized, foresight(sized))),
        )


def conclude(rows: Sequence[Row], target_idle_percent: float) -> Plan:
    """The rows and what they mean: from which size on the target is met."""
    return Plan(
        target_idle_percent,
        tuple(rows),
        _enough(rows, [row.understudy.idle_percent <= target_idle_percent for row in rows]),
        _enough(rows, [row.on_demand.idle_percent <= target_idle_percent for row in rows]),
    )


def _enough(rows: Sequence[Row], is_met: Sequence[bool]) -> int | None:
    """The smallest size from which on every one will do: a lucky one in between proves nothing."""
    enough = None
    for row, met in zip(reversed(rows), reversed(is_met)):
        if not met:
            break
        enough = row.arena_bytes
    return enough


def _felt(meter: Meter) -> Felt:
    return Felt(
        idle_percent=round(meter.idle_percent, 3),
        wait_p50_s=round(meter.wait_s.at(0.50), 3),
        wait_p95_s=round(meter.wait_s.at(0.95), 3),
        wait_p99_s=round(meter.wait_s.at(0.99), 3),
        visible_switch_p50_ms=round(meter.switch_s.at(0.50) * 1e3, 3),
        visible_switch_p95_ms=round(meter.switch_s.at(0.95) * 1e3, 3),
        utilisation_percent=round(meter.utilisation_percent, 2),
    )

"""One simulation from start to end, and what it found, in words and as JSON."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import msgspec

from understudyd.core.machine import Machine
from understudyd.core.policy import PolicySettings
from understudyd.recorded import TraceRequest, derived_name, loras_of
from understudyd.simulate import on_demand, slots
from understudyd.simulate.meter import Meter, Quantiles
from understudyd.simulate.profiles import Profile
from understudyd.simulate.references import (
    Foresight,
    Frequency,
    Recency,
    Valuing,
    on_demand_settings,
    overlays_for_free,
    plug_in,
)
from understudyd.simulate.trace import Survey, read
from understudyd.simulate.world import START_BEFORE_S, Watch, World

UNLIMITED = 1 << 40
"""Nobody is refused because too many wait."""

PolicyName = Literal["understudy", "lru", "lfu", "fifo-on-demand", "belady", "fold-on-demand", "all-resident"]
"""The daemon's policy; the daemon with another forecast; or what serves in order and loads on demand.

Two bounds for what is done about adapters: the daemon in order of arrival, with nothing made ahead of time,
and the daemon with every overlay there.
"""


@dataclass(frozen=True, slots=True)
class Scenario:
    """What to simulate. Times of the trace are divided by `compress`; sizes are bytes.

    `slots` is for the comparison of misses, 0 leaves it out.
    """

    survey: Survey
    profile: Profile
    arena_bytes: int
    pool_bytes: int
    slots: int
    compress: float = 1.0
    loaders: int = 2
    policy: PolicyName = "understudy"
    settings: PolicySettings = field(default_factory=PolicySettings)
    max_waiting: int = UNLIMITED
    max_batch: int = 1

    @property
    def resident(self) -> int:
        """Whole models that the arena has room for."""
        return min(len(self.survey.models), self._room(self.arena_bytes))

    @property
    def in_host(self) -> int:
        """Whole models that the host pool has room for."""
        return min(len(self.survey.models), self._room(self.pool_bytes))

    def _room(self, size_bytes: int) -> int:
        one = self.profile.bytes_of(1)
        own = self.profile.bytes_of(2) - one
        if size_bytes < one:
            return 0
        return 1 + (size_bytes - one) // own if own else len(self.survey.models)

    def requests(self) -> Iterator[TraceRequest]:
        """The trace from its first request on, compressed."""
        first_s, compress = self.survey.first_s, self.compress
        for request in read(self.survey.path):
            yield msgspec.structs.replace(request, arrival_s=(request.arrival_s - first_s) / compress)


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a simulation found; misses are of `slots.compare`, the rest of the queue.

    `runs` counts runs on the stage: fewer than requests where `max_batch` lets several share one.
    `decision_us_*` are microseconds of CPU time of one `Machine.handle`; null without a machine, misses
    without slots.
    """

    policy: str
    profile: str
    compress: float
    requests: int
    served: int
    failed: int
    models: int
    resident: int
    in_host: int
    arena_bytes: int
    host_pool_bytes: int
    max_batch: int = 1
    runs: int | None = None
    slots: int | None = None
    miss_percent: float | None = None
    lru_miss_percent: float | None = None
    belady_miss_percent: float | None = None
    way_from_lru_to_belady_percent: float | None = None
    idle_while_waiting_percent: float
    idle_while_waiting_percent_lru_on_demand: float
    wait_p50_s: float
    wait_p95_s: float
    wait_p99_s: float
    wait_p50_s_lru_on_demand: float
    wait_p95_s_lru_on_demand: float
    wait_p99_s_lru_on_demand: float
    visible_switch_p50_ms: float
    visible_switch_p95_ms: float
    switches: int
    stage_utilisation_percent: float
    requests_per_s: float = 0.0
    adapters: int = 0
    combinations: int = 0
    folds: int | None = None
    loads: int | None = None
    loaded_bytes: int | None = None
    events: int | None = None
    decision_us_p50: float | None = None
    decision_us_p99: float | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """A report and the distributions behind it, of the policy and of loading on demand with LRU."""

    report: Report
    meter: Meter
    baseline: Meter


def simulate(scenario: Scenario, *, watch: Watch | None = None) -> Result:
    """Play the scenario. `watch` sees every action of the machine."""
    baseline = serve_on_demand(scenario, Recency())
    world = None if scenario.policy == "fifo-on-demand" else play(scenario, watch=watch)
    meter = baseline if world is None else world.meter
    return Result(_report(scenario, meter, baseline, world), meter, baseline)


def play(scenario: Scenario, *, watch: Watch | None = None) -> World:
    """Only the machine's part of a simulation."""
    scenario = _bounded(scenario)
    machine = Machine(
        scenario.arena_bytes,
        pool_bytes=scenario.pool_bytes,
        policy=scenario.settings,
        max_waiting=scenario.max_waiting,
    )
    if (valuing := _valuing(scenario)) is not None:
        plug_in(machine, valuing)
    world = World(
        machine, scenario.profile, loaders=scenario.loaders, max_batch=scenario.max_batch, watch=watch
    )
    world.add_models(scenario.survey.models)
    world.settle(START_BEFORE_S)
    world.decision_us = Quantiles(least=0.01)  # filling the pool decides nothing that anybody waits for
    world.play(scenario.requests())
    return world


def _bounded(scenario: Scenario) -> Scenario:
    match scenario.policy:
        case "fold-on-demand":
            return replace(scenario, settings=on_demand_settings(scenario.settings))
        case "all-resident":
            profile = overlays_for_free(scenario.profile)
            room_bytes = profile.overlays_bytes(scenario.survey.combinations, scenario.survey.adapters)
            arena_bytes = scenario.arena_bytes + room_bytes
            return replace(scenario, profile=profile, arena_bytes=arena_bytes)
        case _:
            return scenario


def serve_on_demand(scenario: Scenario, valuing: Valuing) -> Meter:
    """What loading on demand, in order of arrival, makes of the scenario."""
    return on_demand.serve(
        scenario.requests(),
        scenario.profile,
        valuing,
        resident=scenario.resident,
        in_host=scenario.in_host,
        models=scenario.survey.models,
    )


def foresight(scenario: Scenario, *, of_combinations: bool = False) -> Foresight:
    """The future of the scenario's trace: of models, or of models with their adapters; 8 bytes a request."""
    requests = read(scenario.survey.path)
    if of_combinations:
        return Foresight(slots.next_uses(derived_name(r.model, loras_of(r.loras)) for r in requests))
    return Foresight(slots.next_uses(r.model for r in requests))


def _valuing(scenario: Scenario) -> Valuing | None:
    match scenario.policy:
        case "lru":
            return Recency()
        case "lfu":
            return Frequency()
        case "belady":
            return foresight(scenario, of_combinations=True)
        case _:
            return None


def _compare(scenario: Scenario) -> slots.Misses:
    """The comparison goes by the trace's own clock: how the load is compressed does not matter to it."""
    following = slots.next_uses(request.model for request in read(scenario.survey.path))
    forecast: Valuing | None = None
    match scenario.policy:
        case "lru" | "fifo-on-demand":
            forecast = Recency()
        case "lfu":
            forecast = Frequency()
        case "belady":
            forecast = Foresight(following)
    return slots.compare(replace(scenario, compress=1.0).requests(), following, scenario.slots, forecast)


def _report(scenario: Scenario, meter: Meter, baseline: Meter, world: World | None) -> Report:
    report = Report(
        policy=scenario.policy,
        profile=scenario.profile.name,
        compress=round(scenario.compress, 4),
        requests=scenario.survey.requests,
        served=meter.served,
        failed=meter.failed,
        models=len(scenario.survey.models),
        resident=scenario.resident,
        in_host=scenario.in_host,
        arena_bytes=scenario.arena_bytes,
        host_pool_bytes=scenario.pool_bytes,
        max_batch=scenario.max_batch,
        adapters=scenario.survey.adapters,
        combinations=scenario.survey.combinations,
        idle_while_waiting_percent=round(meter.idle_percent, 3),
        idle_while_waiting_percent_lru_on_demand=round(baseline.idle_percent, 3),
        wait_p50_s=round(meter.wait_s.at(0.50), 3),
        wait_p95_s=round(meter.wait_s.at(0.95), 3),
        wait_p99_s=round(meter.wait_s.at(0.99), 3),
        wait_p50_s_lru_on_demand=round(baseline.wait_s.at(0.50), 3),
        wait_p95_s_lru_on_demand=round(baseline.wait_s.at(0.95), 3),
        wait_p99_s_lru_on_demand=round(baseline.wait_s.at(0.99), 3),
        visible_switch_p50_ms=round(meter.switch_s.at(0.50) * 1e3, 3),
        visible_switch_p95_ms=round(meter.switch_s.at(0.95) * 1e3, 3),
        switches=meter.switches,
        requests_per_s=round(meter.served_per_s, 4),
        stage_utilisation_percent=round(meter.utilisation_percent, 2),
    )
    if scenario.slots:
        report = _with_misses(report, _compare(scenario))
    return report if world is None else _with_decisions(report, world)


def _with_misses(report: Report, misses: slots.Misses) -> Report:
    return msgspec.structs.replace(
        report,
        slots=misses.slots,
        miss_percent=round(misses.forecast_percent, 2),
        lru_miss_percent=round(misses.lru_percent, 2),
        belady_miss_percent=round(misses.belady_percent, 2),
        way_from_lru_to_belady_percent=round(misses.way_percent, 1),
    )


def _with_decisions(report: Report, world: World) -> Report:
    return msgspec.structs.replace(
        report,
        runs=world.runs,
        folds=world.folds,
        loads=world.loads,
        loaded_bytes=world.loaded_bytes,
        events=world.events,
        decision_us_p50=round(world.decision_us.at(0.50), 1),
        decision_us_p99=round(world.decision_us.at(0.99), 1),
    )

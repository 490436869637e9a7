"""The daemon in Prometheus' terms. Nothing is counted here: counters and snapshots are read at each scrape.

Reading belongs to the event loop's thread and takes about a millisecond; turning it into text is a thread's.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from understudy import __version__
from understudyd.core import snapshot
from understudyd.core.machine import Machine
from understudyd.shell.client_book import Counters
from understudyd.shell.loading import LoaderState, LoaderStatus
from understudyd.shell.meter import Histogram, LoadMeter, Meter
from understudyd.shell.threads import in_daemon_thread
from understudyd.stage.compile_report import CompileReport

_ARENA_STATES = ("ready", "leased", "filling", "moving", "quarantined", "free")
_POOL_STATES = ("ready", "in_use", "filling", "quarantined", "free")


class Served(Protocol):
    """The front end, as far as it is counted."""

    counters: Counters

    @property
    def clients(self) -> int:
        """Clients that were heard of lately."""

    @property
    def unsent(self) -> int:
        """Messages that wait for their clients to read."""


class Loaders(Protocol):
    """The loader pool, as far as it is counted."""

    @property
    def meter(self) -> LoadMeter:
        """What was loaded so far."""

    def status(self) -> list[LoaderStatus]:
        """One entry a slot."""


class DaemonReader:
    """Reads machine, meters, loaders and front end. `state` is the daemon's own, as `status` says it."""

    def __init__(
        self,
        machine: Machine,
        meter: Meter,
        loaders: Loaders,
        served: Served,
        state: Callable[[], str],
        device: str,
        compiled: Callable[[], CompileReport | None] = lambda: None,
    ) -> None:
        self._machine = machine
        self._meter = meter
        self._loaders = loaders
        self._served = served
        self._state = state
        self._compiled = compiled
        self._build = {"version": __version__, "device": device}

    def read(self) -> list[Metric]:
        """Everything, as it is between two events."""
        return [
            *self._daemon(),
            *self._requests(),
            *self._memory(),
            *self._loads(),
            *self._compiling(),
            *self._forecast(),
        ]

    def _daemon(self) -> Iterator[Metric]:
        build = GaugeMetricFamily(
            "understudy_build_info", "What runs here; always 1.", labels=list(self._build)
        )
        build.add_metric(list(self._build.values()), 1)
        yield build
        is_ready = self._state() == "ready" and self._machine.is_open
        yield GaugeMetricFamily("understudy_ready", "1 while requests are taken.", value=is_ready)
        clients = self._served.clients
        yield GaugeMetricFamily("understudy_clients", "Clients that were heard of lately.", value=clients)
        unsent = self._served.unsent
        yield GaugeMetricFamily("understudy_unsent_messages", "Messages that wait to be read.", value=unsent)
        counters = self._served.counters
        kinds = {kind: getattr(counters, kind) for kind in ("received", "refused", "unreadable")}
        yield _counter("understudy_messages", "Messages from clients, by what became of them.", "kind", kinds)

    def _requests(self) -> Iterator[Metric]:
        machine, meter = self._machine, self._meter
        waiting, running = len(machine.queue), len(machine.running)
        yield GaugeMetricFamily("understudy_requests_waiting", "Requests in the queue.", value=waiting)
        yield GaugeMetricFamily("understudy_requests_running", "Requests on stage.", value=running)
        requests = CounterMetricFamily(
            "understudy_requests",
            'Answered requests, by model and outcome: "finished", or the error\'s code.',
            labels=["model", "outcome"],
        )
        for (model, outcome), count in meter.requests.items():
            requests.add_metric([model, outcome], count)
        yield requests
        yield _counter(
            "understudy_run_seconds", "Seconds on stage of finished requests.", "model", meter.run_s
        )
        yield _counter(
            "understudy_requests_by_tier",
            "Finished requests, by where their model was when they came.",
            "tier",
            meter.by_tier,
        )
        for name, text, histogram in (
            ("wait", "From receipt to the first operation on stage.", meter.wait),
            ("run", "On stage.", meter.run),
            ("duration", "From receipt until the images are encoded.", meter.total),
        ):
            yield _histogram(f"understudy_request_{name}_seconds", f"{text} Finished requests.", histogram)
        yield _histograms(
            "understudy_visible_switch_seconds",
            "How long the stage did nothing while a request waited that needed other weights, by tier.",
            "tier",
            meter.switches,
        )
        yield _counter("understudy_folds", "LoRA overlays folded, by outcome.", "outcome", meter.folds)
        yield _histogram("understudy_fold_seconds", "Folds that finished.", meter.fold)

    def _memory(self) -> Iterator[Metric]:
        arena, pool = snapshot.arena(self._machine), snapshot.host_pool(self._machine)
        states = ("ready", "leased", "filling", "moving", "quarantined", "free")
        by_state = {state: getattr(arena, f"{state}_bytes") for state in states}
        yield _gauge(
            "understudy_arena_bytes", "The arena, by what its bytes are used for.", "state", by_state
        )
        gap = arena.largest_gap_bytes
        yield GaugeMetricFamily("understudy_arena_largest_gap_bytes", "The largest free piece.", value=gap)
        by_state = {state: getattr(pool, f"{state}_bytes") for state in _POOL_STATES}
        yield _gauge("understudy_host_pool_bytes", "The host pool, the same way.", "state", by_state)
        evictions = {"arena": arena.evictions, "host": pool.evictions}
        yield _counter("understudy_evictions", "Blobs evicted.", "memory", evictions)
        tiers = dict.fromkeys(("disk", "host", "loading", "resident"), 0)
        for model in self._machine.residency.models.values():
            if not model.info.is_derived:
                tiers[model.tier.value] += 1
        yield _gauge("understudy_models", "Models, by where they are.", "tier", tiers)

    def _loads(self) -> Iterator[Metric]:
        meter, slots = self._loaders.meter, self._loaders.status()
        yield _histograms("understudy_load_seconds", "Loads that finished.", "route", meter.seconds)
        yield _counter("understudy_load_bytes", "Bytes that were loaded.", "route", meter.size_bytes)
        yield _counter("understudy_loads", "Loads, by how they ended.", "outcome", meter.endings)
        states = dict.fromkeys((state.value for state in LoaderState), 0)
        for slot in slots:
            states[slot.state.value] += 1
        yield _gauge("understudy_loaders", "Loaders, by what they do.", "state", states)
        restarts = {str(slot.slot): slot.restarts for slot in slots}
        yield _counter("understudy_loader_restarts", "Loaders that were replaced.", "slot", restarts)

    def _compiling(self) -> Iterator[Metric]:
        report = self._compiled() or CompileReport()
        for name, text, value in (
            ("compiled_graphs", "Graphs that torch.compile made for the stage.", report.graphs),
            ("compile_seconds", "What that took, beside the stage.", report.compile_s),
            ("recompiles", "Graphs made for calls that nothing compiled before fitted.", report.recompiles),
        ):
            yield CounterMetricFamily(f"understudy_stage_{name}", text, value=value)
        pending, failed = report.pending, len(report.failures)
        yield GaugeMetricFamily("understudy_stage_compiling", "Compilations that wait or run.", value=pending)
        text = "Component classes that are served uncompiled because that failed."
        yield GaugeMetricFamily("understudy_stage_uncompiled", text, value=failed)

    def _forecast(self) -> Iterator[Metric]:
        residency = self._machine.residency
        used, wasted = residency.guesses_used, residency.guesses_wasted
        yield _counter(
            "understudy_forecast_loads",
            "Blobs loaded only because the forecast expected them, by whether something used them.",
            "outcome",
            {"used": used, "wasted": wasted},
        )
        ratio = used / (used + wasted) if used + wasted else float("nan")
        yield GaugeMetricFamily("understudy_forecast_hit_ratio", "The used share of these.", value=ratio)


class ScrapeStuck(Exception):
    """The scrape before still hangs: a collector, the GPU's driver most likely, does not answer."""


class Metrics:
    """Scrapes, one after the other. `read` is called on the event loop; other collectors of the registry are
    asked on a thread, one at most, however long that takes.
    """

    def __init__(self, registry: CollectorRegistry, read: Callable[[], list[Metric]]) -> None:
        self._registry = registry
        self._read = read
        self._families = _Families()
        self._one_at_a_time = asyncio.Lock()
        self._encoding: asyncio.Task[bytes] | None = None
        registry.register(self._families)

    async def scrape(self, accept: str) -> tuple[bytes, str]:
        """Text and content type, in the format that the header `accept` asks for. Raises `ScrapeStuck`."""
        encode: Callable[[CollectorRegistry], bytes] = generate_latest
        content_type = CONTENT_TYPE_PLAIN_0_0_4
        if "application/openmetrics-text" in accept:
            encode, content_type = openmetrics.generate_latest, openmetrics.CONTENT_TYPE_LATEST
        async with self._one_at_a_time:
            if self._encoding is not None and not self._encoding.done():
                raise ScrapeStuck("the scrape before has not ended; is the GPU's driver well?")
            self._families.read = self._read()
            self._encoding = asyncio.create_task(in_daemon_thread(encode, self._registry))
            return await asyncio.shield(self._encoding), content_type


class _Families(Collector):
    """What was read last."""

    def __init__(self) -> None:
        self.read: list[Metric] = []

    def collect(self) -> Iterable[Metric]:
        return self.read


def _counter(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _gauge(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _histogram(name: str, text: str, histogram: Histogram) -> Metric:
    return HistogramMetricFamily(name, text, buckets=histogram.buckets(), sum_value=histogram.sum)


def _histograms(name: str, text: str, label: str, histograms: Mapping[str, Histogram]) -> Metric:
    family = HistogramMetricFamily(name, text, labels=[label])
    for key, histogram in histograms.items():
        family.add_metric([key], histogram.buckets(), histogram.sum)
    return family

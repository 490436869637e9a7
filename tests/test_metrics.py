"""Metrics without a daemon: what is counted, labels that stay few, the text, NVML."""

import asyncio
import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from metrics_kit import Scrape
from understudy.wire import Timings
from understudyd.core import events as ev
from understudyd.core.machine import Machine
from understudyd.core.types import ErrorCode
from understudyd.shell import gpu_metrics
from understudyd.shell.client_book import Counters
from understudyd.shell.gpu_metrics import GpuCollector, open_nvml
from understudyd.shell.meter import OTHER, Histogram, LoadMeter, Meter, ModelLabels
from understudyd.shell.metrics import DaemonReader, Metrics, ScrapeStuck

TIMINGS = Timings(queued_s=0.2, switch_s=0.1, run_s=2.0, encode_s=0.05, total_s=2.35, gap_s=0.0015)


# -- counting --------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 100)))
def test_a_histogram_counts_what_is_at_most_each_bound(values: list[float]) -> None:
    histogram = Histogram((0.1, 1.0, 10.0))
    for value in values:
        histogram.add(value)
    expected = [(str(b), float(sum(v <= b for v in values))) for b in (0.1, 1.0, 10.0)]
    assert histogram.buckets() == [*expected, ("+Inf", float(len(values)))]
    assert histogram.sum == pytest.approx(sum(values))


@given(st.lists(st.integers(0, 30)), st.integers(0, 5))
def test_labels_are_few_and_those_of_the_most_asked_for(asked: list[int], most: int) -> None:
    labels, counts = ModelLabels(most), Counter[str]()
    for number in asked:
        name = f"m{number}"
        counts[name] += 1
        assert labels.label(name) in (name, OTHER)
        assert len(labels.named) <= most
        least = min((counts[named] for named in labels.named), default=0)
        if len(labels.named) == most > 0:
            assert counts[name] < 2 * least or name in labels.named


def test_places_change_hands_seldom() -> None:
    labels = ModelLabels(1)
    assert [labels.label(name) for name in "aabab"] == ["a", "a", OTHER, "a", OTHER]
    assert [labels.label("b") for _ in range(4)] == [OTHER, OTHER, OTHER, "b"], "asked for twice as often"
    assert labels.label("a") == OTHER and labels.displaced == ["a"]


def test_series_end_with_their_place_and_none_goes_down() -> None:
    meter = Meter(most_models=2)
    before: Counter[tuple[str, str]] = Counter()
    for i in range(400):
        model = f"m{i % 7 if i < 200 else i % 3 + 10}"
        if i % 5:
            meter.finished(model, "disk", TIMINGS, switched=False)
        else:
            meter.failed(model, "internal")
        for key, count in before.items():
            assert key not in meter.requests or meter.requests[key] >= count
        before = Counter(meter.requests)
        assert len({label for label, _ in meter.requests}) <= 3
        assert meter.run_s.keys() <= {label for label, _ in meter.requests}
    for _ in range(3):
        meter.failed(None, "unknown_model")
    assert meter.requests[OTHER, "unknown_model"] == 3
    meter.forget("m10")
    assert "m10" not in {label for label, _ in meter.requests}


# -- everything, as text ---------------------------------------------------------------------------


def reader(meter: Meter, loads: LoadMeter, state: str = "ready") -> DaemonReader:
    loaders = SimpleNamespace(meter=loads, status=list)
    served = SimpleNamespace(counters=Counters(received=5), clients=2, unsent=1)
    return DaemonReader(Machine(1 << 20), meter, cast(Any, loaders), cast(Any, served), lambda: state, "cpu")


async def scraped(reader: DaemonReader, accept: str = "") -> tuple[bytes, str]:
    return await Metrics(CollectorRegistry(auto_describe=False), reader.read).scrape(accept)


def busy_meters() -> tuple[Meter, LoadMeter]:
    meter, loads = Meter(), LoadMeter()
    meter.finished('sd"15\\\n', "disk", TIMINGS, switched=True)
    meter.failed("sd", "out_of_memory")
    meter.folded(ev.FoldFinished("o", 1), 0.25)
    meter.folded(ev.FoldFailed("o", 1, ErrorCode.INTERNAL, ""), 0.5)
    loads.ended("disk > host > arena", 1000, 0.5, "")
    loads.ended("disk > arena", 1000, 0.5, "lost")
    return meter, loads


def test_what_a_scrape_says() -> None:
    text, content_type = asyncio.run(scraped(reader(*busy_meters())))
    assert content_type.startswith("text/plain; version=0.0.4")
    found = Scrape(text.decode())
    value = found.value
    assert value("understudy_requests_total", model='sd"15\\\n', outcome="finished") == 1
    assert value("understudy_requests_total", model="sd", outcome="out_of_memory") == 1
    assert value("understudy_request_wait_seconds_sum") == pytest.approx(0.3)
    assert value("understudy_request_wait_seconds_bucket", le="0.25") == 0
    assert value("understudy_request_wait_seconds_bucket", le="0.5") == 1
    assert value("understudy_visible_switch_seconds_bucket", tier="disk", le="0.002") == 1
    assert value("understudy_visible_switch_seconds_bucket", tier="disk", le="0.001") == 0
    assert value("understudy_load_bytes_total", route="disk_to_host_to_arena") == 1000
    assert value("understudy_load_seconds_sum", route="disk_to_host_to_arena") == 0.5
    assert value("understudy_loads_total", outcome="lost") == 1
    assert value("understudy_folds_total", outcome="finished") == 1 == value("understudy_fold_seconds_count")
    assert value("understudy_arena_bytes", state="free") == 1 << 20 == found.sum("understudy_arena_bytes")
    assert value("understudy_ready") == 1 and value("understudy_clients") == 2
    assert math.isnan(value("understudy_forecast_hit_ratio"))
    assert value("understudy_build_info", version="0.1.0", device="cpu") == 1


def test_openmetrics_for_those_who_want_it() -> None:
    accept = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3"
    text, content_type = asyncio.run(scraped(reader(*busy_meters()), accept))
    assert content_type.startswith("application/openmetrics-text")
    assert {family.name for family in openmetrics(text.decode())} >= {"understudy_requests"}


def test_a_collector_that_hangs_takes_one_thread_and_no_more() -> None:
    is_asked, may_go_on = threading.Event(), threading.Event()

    class Hanging(Collector):
        def collect(self) -> Iterator[Metric]:
            is_asked.set()
            may_go_on.wait(60)
            yield from ()

    async def scenario() -> None:
        registry = CollectorRegistry(auto_describe=False)
        metrics = Metrics(registry, reader(*busy_meters()).read)
        hanging = Hanging()
        registry.register(hanging)
        is_asked.clear()
        first = asyncio.create_task(metrics.scrape(""))
        await asyncio.to_thread(is_asked.wait, 60)
        first.cancel()  # the door lost its patience
        await asyncio.gather(first, return_exceptions=True)
        for _ in range(3):
            with pytest.raises(ScrapeStuck):
                await metrics.scrape("")
        may_go_on.set()
        async with asyncio.timeout(60):
            while True:
                try:
                    assert await metrics.scrape("")
                    return
                except ScrapeStuck:
                    await asyncio.sleep(0)

    asyncio.run(scenario())


def test_reading_takes_little_of_the_event_loop() -> None:
    meter, loads = busy_meters()
    for i in range(200):
        meter.finished(f"m{i}", "disk", TIMINGS, switched=True)
    reads = reader(meter, loads)
    times = []
    for _ in range(10):
        began_s = time.thread_time()
        reads.read()
        times.append(time.thread_time() - began_s)
    assert min(times) < 0.005


# -- NVML ------------------------------------------------------------------------------------------


class FakeNvml:
    """As much of pynvml as is used; `trouble` makes every question fail."""

    class NVMLError(Exception):
        pass

    def __init__(self, trouble: str = "") -> None:
        self.trouble = trouble
        self.handles: list[str] = []

    def _checked(self, value: Any) -> Any:
        if self.trouble:
            raise self.NVMLError(self.trouble)
        return value

    def nvmlInit(self) -> None:
        self._checked(None)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.handles.append(uuid)
        return self._checked("handle")

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        assert handle == "handle"
        return self._checked(SimpleNamespace(used=3 << 30, free=77 << 30, total=80 << 30))

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        return self._checked(SimpleNamespace(gpu=93, memory=41))


def gpu_scrape(nvml: FakeNvml, times: int = 1) -> Scrape:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(GpuCollector(nvml, "GPU-1"))
    for _ in range(times):
        text = generate_latest(registry).decode()
    return Scrape(text)


def test_the_gpu_as_nvml_sees_it() -> None:
    nvml = FakeNvml()
    found = gpu_scrape(nvml, times=3)
    assert found.value("understudy_gpu_memory_bytes", gpu="GPU-1", state="used") == 3 << 30
    assert found.value("understudy_gpu_memory_bytes", gpu="GPU-1", state="free") == 77 << 30
    assert found.value("understudy_gpu_utilisation_ratio", gpu="GPU-1") == 0.93
    assert found.value("understudy_gpu_memory_utilisation_ratio", gpu="GPU-1") == 0.41
    assert nvml.handles == ["GPU-1"], "asked for once"


def test_nvml_in_trouble_costs_only_its_own_series() -> None:
    nvml = FakeNvml("GPU is lost")
    assert gpu_scrape(nvml, times=2).samples == [] and len(nvml.handles) == 2
    nvml.trouble = ""
    assert gpu_scrape(nvml).samples


def test_nvml_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", cast(Any, FakeNvml()))
    assert open_nvml() is not None
    monkeypatch.setitem(sys.modules, "pynvml", cast(Any, FakeNvml("no driver")))
    assert open_nvml() is None

    def absent(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(gpu_metrics.importlib, "import_module", absent)
    assert open_nvml() is None


def test_families_are_valid_for_the_plain_parser() -> None:
    text, _ = asyncio.run(scraped(reader(*busy_meters())))
    for family in text_string_to_metric_families(text.decode()):
        assert family.documentation and family.type in ("gauge", "counter", "histogram"), family.name

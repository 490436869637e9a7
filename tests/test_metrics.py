"""Metrics and probes without a daemon: what is counted, labels that stay few, NVML, the door."""

import asyncio
import math
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from http import HTTPStatus
from pathlib import Path
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
from understudyd.shell.endpoints import EndpointError, tcp_address
from understudyd.shell.gpu_metrics import GpuCollector, open_nvml
from understudyd.shell.health import Health
from understudyd.shell.http_door import MAX_HEAD_BYTES, Answer, HttpDoor
from understudyd.shell.meter import OTHER, Histogram, LoadMeter, Meter, ModelLabels
from understudyd.shell.metrics import DaemonReader, Metrics, ScrapeStuck
from understudyd.shell.observatory import Observatory
from understudyd.shell.runtime import Runtime
from understudyd.shell.socket_access import SocketAccess

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


# -- health ----------------------------------------------------------------------------------------


def health(state: str, *, is_open: bool = True, busy: bool = False, idle_s: float = 0.0) -> Health:
    machine = SimpleNamespace(running={"r": 1} if busy else {}, on_deck=(), is_open=is_open)
    runtime = cast(Runtime, SimpleNamespace(machine=machine, stage_moved_at_s=100.0 - idle_s))
    return Health(runtime, lambda: state, lambda: 60.0, clock=lambda: 100.0)


def test_who_is_alive_and_who_takes_requests() -> None:
    assert health("ready").illness() == health("ready").unreadiness() == ""
    assert health("ready", idle_s=1e6).illness() == "", "with nothing to do nothing moves"
    stuck = health("ready", busy=True, idle_s=61.0)
    assert "61 s" in stuck.illness() and "61 s" in stuck.unreadiness()
    assert health("ready", busy=True, idle_s=59.0).illness() == ""
    assert health("starting").unreadiness().startswith("starting") and not health("starting").illness()
    assert health("ready", is_open=False).unreadiness().startswith("draining")
    assert health("stopping").unreadiness().startswith("stopping")


# -- the door --------------------------------------------------------------------------------------


class Door:
    """A door on a Unix socket, and peers with manners or without."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.asked: list[tuple[str, str]] = []
        self.door = HttpDoor(self._answer, patience_s=0.3, max_connections=4)

    async def _answer(self, path: str, accept: str) -> Answer:
        self.asked.append((path, accept))
        if path == "/broken":
            raise RuntimeError("defect")
        return Answer.text(HTTPStatus.OK, "x" * (5_000_000 if path == "/large" else 3))

    async def ask(self, request: bytes) -> bytes:
        reader, writer = await asyncio.open_unix_connection(str(self.path))
        try:
            writer.write(request)
            return await asyncio.wait_for(reader.read(), 30)
        except ConnectionError:
            return b""
        finally:
            writer.close()


def with_door(path: Path, scenario: Callable[[Door], Awaitable[None]]) -> Door:
    door = Door(path)

    async def play() -> None:
        server = await asyncio.start_unix_server(door.door.connected, str(path), limit=MAX_HEAD_BYTES)
        try:
            await scenario(door)
        finally:
            server.close()
            await door.door.close()

    asyncio.run(play())
    return door


GOOD = b"GET /metrics?x=1 HTTP/1.1\r\nHost: x\r\nACCEPT: text/plain\r\n\r\n"


def test_one_request_a_connection(tmp_path: Path) -> None:
    async def scenario(door: Door) -> None:
        said = await door.ask(GOOD)
        assert said.startswith(b"HTTP/1.1 200 OK\r\n") and said.endswith(b"\r\n\r\nxxx\n")
        assert b"Content-Length: 4\r\n" in said and b"Connection: close\r\n" in said
        head = await door.ask(GOOD.replace(b"GET", b"HEAD"))
        assert b"Content-Length: 4\r\n" in head and head.endswith(b"\r\n\r\n")
        assert (await door.ask(GOOD * 3)).count(b"HTTP/1.1 200") == 1

    door = with_door(tmp_path / "s", scenario)
    assert door.asked[0] == ("/metrics", "text/plain")


BAD = [
    (b"POST /metrics HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", b"405"),
    (b"GET /metrics\r\n\r\n", b"400"),
    (b"GET http://evil/ HTTP/1.1\r\n\r\n", b"400"),
    (b"GET /metrics HTTP/9.9\r\n\r\n", b"400"),
    (b"\x16\x03\x01\x02\x00\x01\x00\xff\xff\r\n\r\n", b"400"),
    (b"\r\n\r\n", b"400"),
    (b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 10_000 + b"\r\n", b"431"),
    (b"A" * 1_000_000, b"431"),
    (b"GET /broken HTTP/1.1\r\n\r\n", b"500"),
    (b"GET /\r\nEvil: \xff\xfe HTTP/1.1\r\n\r\n", b"400"),
]


@pytest.mark.parametrize(("request_", "status"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_requests_are_answered_and_forgotten(request_: bytes, status: bytes, tmp_path: Path) -> None:
    async def scenario(door: Door) -> None:
        assert (await door.ask(request_))[:12] == b"HTTP/1.1 " + status
        assert (await door.ask(GOOD)).endswith(b"xxx\n")

    with_door(tmp_path / "s", scenario)


@given(st.binary(max_size=300))
def test_garbage_does_no_harm(garbage: bytes) -> None:
    import tempfile

    async def scenario(door: Door) -> None:
        said = await door.ask(garbage + b"\r\n\r\n")
        assert not said or said.startswith(b"HTTP/1.1 ")
        assert (await door.ask(GOOD)).endswith(b"xxx\n")

    with tempfile.TemporaryDirectory() as folder:
        with_door(Path(folder) / "s", scenario)


def test_the_slow_and_the_many_are_shown_out(tmp_path: Path) -> None:
    async def scenario(door: Door) -> None:
        slow = [await asyncio.open_unix_connection(str(door.path)) for _ in range(4)]
        for _, writer in slow:
            writer.write(b"GET /met")
        await asyncio.sleep(0)
        async with asyncio.timeout(30):
            while len(door.door._tasks) < 4:
                await asyncio.sleep(0.001)
        assert await door.ask(GOOD) == b"", "there is no room for a fifth"
        for reader, writer in slow:
            assert await asyncio.wait_for(reader.read(), 30) == b""
            writer.close()
        assert (await door.ask(GOOD)).endswith(b"xxx\n")

    assert with_door(tmp_path / "s", scenario).asked == [("/metrics", "text/plain")]


def test_one_that_never_reads_is_let_go(tmp_path: Path) -> None:
    async def scenario(door: Door) -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.setblocking(False)
            sock.connect(str(door.path))
            sock.send(b"GET /large HTTP/1.1\r\n\r\n")
            async with asyncio.timeout(30):
                while not door.asked or door.door._tasks:
                    await asyncio.sleep(0.01)
        assert (await door.ask(GOOD)).endswith(b"xxx\n")

    with_door(tmp_path / "s", scenario)


# -- where it may listen ---------------------------------------------------------------------------


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:0", "tcp://[::1]:9464", "tcp://localhost:9464"])
def test_this_machine_alone(endpoint: str) -> None:
    host, port = tcp_address(endpoint)
    assert f"tcp://{host}:{port}" == endpoint


@pytest.mark.parametrize("endpoint", ["tcp://0.0.0.0:9464", "tcp://192.168.1.5:1", "tcp://[::]:1"])
def test_others_must_be_allowed(endpoint: str) -> None:
    with pytest.raises(EndpointError, match="allow_remote = true"):
        tcp_address(endpoint)
    assert tcp_address(endpoint, allow_remote=True)


@pytest.mark.parametrize(
    "endpoint", ["9464", "ipc:///x", "tcp://127.0.0.1", "tcp://:1", "tcp://127.0.0.1:99999"]
)
def test_what_is_no_endpoint(endpoint: str) -> None:
    with pytest.raises(EndpointError, match="write it like"):
        tcp_address(endpoint, allow_remote=True)


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_port_that_is_taken(taken: int, tmp_path: Path) -> None:
    async def start() -> None:
        metrics = Metrics(CollectorRegistry(), list)
        path, endpoints = tmp_path / "s", [f"tcp://127.0.0.1:{taken}"]
        observatory = Observatory(metrics, health("ready"), path, endpoints, SocketAccess())
        try:
            await observatory.start()
        finally:
            await observatory.stop()

    with pytest.raises(EndpointError, match="another port"):
        asyncio.run(start())
    assert not (tmp_path / "s").exists()


def test_families_are_valid_for_the_plain_parser() -> None:
    text, _ = asyncio.run(scraped(reader(*busy_meters())))
    for family in text_string_to_metric_families(text.decode()):
        assert family.documentation and family.type in ("gauge", "counter", "histogram"), family.name

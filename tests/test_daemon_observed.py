"""A real daemon as its operators see it: metrics and probes, through a drain too, timeline, timings."""

import asyncio
import http.client
import itertools
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import understudy
from daemon_kit import DaemonProcess, running_daemon
from family_kit import Family
from metrics_kit import Response, Scrape, UnixConnection, get
from test_trace import check_format
from understudy import admin
from understudy.ctl import main as ctl
from understudy.errors import UnderstudyError
from understudy.trace import fetch

OPTIONS: dict[str, Any] = {"steps": 2, "width": 32, "height": 32}
MOST_MODELS = 2


@pytest.fixture(scope="module")
def daemon(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    more: dict[str, Any] = {
        "stage": {"warm_up": False},
        "policy": {"prefetch": False},
        "metrics": {"endpoints": ["tcp://127.0.0.1:0"], "most_models": MOST_MODELS},
    }
    with running_daemon(family.store, tmp_path_factory.mktemp("run"), arena="24MiB", **more) as daemon:
        yield daemon


def ask(daemon: DaemonProcess, path: str) -> Response:
    return get(UnixConnection(daemon.runtime_dir / "metrics.sock"), path)


def scrape(daemon: DaemonProcess) -> Scrape:
    response = ask(daemon, "/metrics")
    assert response.status == 200
    return Scrape(response.text)


def check_timings(result: understudy.Result, elapsed_s: float) -> None:
    timings = result.timings
    parts = (timings.queued_s, timings.switch_s, timings.run_s, timings.encode_s)
    assert sum(parts) == timings.total_s, "to the last bit"
    assert min(parts) >= 0 and timings.total_s <= elapsed_s
    assert timings.bind_s <= timings.switch_s + timings.queued_s


def test_known_traffic(daemon: DaemonProcess) -> None:
    before = scrape(daemon)
    with understudy.Client(endpoint=daemon.endpoint) as client:
        for model in ("sd-a", "sd-a", "sd-b", "sd-a"):
            began_s = time.monotonic()
            result = client.generate(model, "x", seed=1, **OPTIONS)
            check_timings(result, time.monotonic() - began_s)
        for model in ("no-such-model", "sd-a" * 30):
            with pytest.raises(UnderstudyError):
                client.generate(model, "x", **OPTIONS)
        with pytest.raises(UnderstudyError):
            client.generate("sd-b", "x", scheduler="NoSuchScheduler", **OPTIONS)
        after = scrape(daemon)
        assert after.value("understudy_clients") == 1

    def grown(name: str, **labels: str) -> float:
        return after.value(name, **labels) - before.value(name, **labels)

    requests = "understudy_requests_total"
    assert grown(requests, model="sd-a", outcome="finished") == 3
    assert grown(requests, model="sd-b", outcome="finished") == 1
    assert grown(requests, model="other", outcome="unknown_model") == 2
    assert grown(requests, model="sd-b", outcome="bad_request") == 1
    for histogram in ("wait", "run", "duration"):
        assert grown(f"understudy_request_{histogram}_seconds_count") == 4
        assert grown(f"understudy_request_{histogram}_seconds_sum") > 0
    parts = sum(after.value(f"understudy_request_{part}_seconds_sum") for part in ("wait", "run"))
    assert parts <= after.value("understudy_request_duration_seconds_sum")
    assert after.sum("understudy_run_seconds_total") == pytest.approx(
        after.value("understudy_request_run_seconds_sum")
    )
    assert grown("understudy_requests_by_tier_total", tier="disk") >= 2
    assert grown("understudy_visible_switch_seconds_count", tier="disk") >= 2
    loads = after.value("understudy_loads_total", outcome="finished")
    assert loads == after.value("understudy_load_seconds_count", route="disk_to_arena") > 0
    status = daemon.ask(admin.Status())
    assert after.value("understudy_load_bytes_total", route="disk_to_arena") == sum(
        slot["bytes_total"] for slot in status["loaders"]
    )
    arena = status["arena"]
    assert after.sum("understudy_arena_bytes") == arena["size_bytes"]
    assert after.value("understudy_evictions_total", memory="arena") == arena["evictions"]
    assert after.sum("understudy_models") == status["models"]
    assert after.sum("understudy_loaders") == len(status["loaders"])
    assert after.value("process_resident_memory_bytes") > 1e7
    assert after.value("understudy_requests_waiting") == after.value("understudy_requests_running") == 0


def test_labels_stay_few(daemon: DaemonProcess) -> None:
    with understudy.Client(endpoint=daemon.endpoint) as client:
        names = [entry.name for entry in client.models()]
        assert len(names) > MOST_MODELS
        for name in ("sd-a", "sd-b", *names):
            client.submit(name, "x", **OPTIONS).cancel()
        for number in range(20):
            with pytest.raises(UnderstudyError):
                client.generate(f"made-up-{number}", "x", **OPTIONS)
    found = scrape(daemon)
    assert found.labels("understudy_requests_total", "model") <= {"sd-a", "sd-b", "other"}
    assert len(found.samples) < 400


def test_over_tcp_and_for_openmetrics(daemon: DaemonProcess) -> None:
    endpoint = daemon.wait_for_log("metrics on tcp://").rpartition("//")[2].strip()
    host, _, port = endpoint.rpartition(":")
    plain = get(http.client.HTTPConnection(host, int(port), timeout=30), "/metrics")
    assert plain.status == 200 and "understudy_ready 1.0" in plain.text
    accept = "application/openmetrics-text;version=1.0.0"
    other = get(http.client.HTTPConnection(host, int(port), timeout=30), "/metrics", accept=accept)
    assert other.text.endswith("# EOF\n") and other.content_type.startswith("application/openmetrics-text")
    assert get(http.client.HTTPConnection(host, int(port), timeout=30), "/").status == 404
    assert get(http.client.HTTPConnection(host, int(port), timeout=30), "/metrics", "POST").status == 405


def test_ready_until_it_drains_and_alive_all_the_while(daemon: DaemonProcess) -> None:
    assert (ask(daemon, "/healthz").status, ask(daemon, "/readyz").text) == (200, "ok\n")
    with understudy.Client(endpoint=daemon.endpoint) as client:
        long = client.submit("sd-a", "x", **OPTIONS | {"steps": 300, "progress": True})
        events = iter(long)
        while not isinstance(next(events), understudy.Progress):
            pass
        waiting = client.submit("sd-b", "x", **OPTIONS)
        next(iter(waiting))  # accepted
        found = scrape(daemon)
        assert found.value("understudy_requests_running") == 1
        assert found.value("understudy_requests_waiting") <= 1
        daemon.ask(admin.Drain())
        told = ask(daemon, "/readyz")
        assert told.status == 503 and told.text == "draining: no requests are taken\n"
        assert scrape(daemon).value("understudy_ready") == 0
        assert ask(daemon, "/healthz").status == 200
        long.cancel()
        waiting.result()
        daemon.ask(admin.Resume())
        assert ask(daemon, "/readyz").status == 200


def test_hostile_peers_do_no_harm(daemon: DaemonProcess) -> None:
    """A client is served while the door is full of those who send nothing, rubbish, or without end."""
    path = str(daemon.runtime_dir / "metrics.sock")
    peers = []
    try:
        for number in range(48):
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(0.2)
            peers.append(sock)
            try:
                sock.connect(path)
                sock.sendall((b"", b"GET /met", b"\x00" * 100_000, b"GET / HTTP/1.1\r\n")[number % 4])
            except OSError:
                pass  # shown out
        with understudy.Client(endpoint=daemon.endpoint) as client:
            check_timings(client.generate("sd-a", "x", seed=2, **OPTIONS), 60.0)
    finally:
        for sock in peers:
            sock.close()
    deadline_s = time.monotonic() + 30
    while time.monotonic() < deadline_s:
        try:
            assert ask(daemon, "/healthz").status == 200
            break
        except (ConnectionError, http.client.HTTPException):
            continue  # the hall is not empty yet
    assert scrape(daemon).value("understudy_ready") == 1


def test_the_timeline_of_it_all(daemon: DaemonProcess, tmp_path: Path) -> None:
    with understudy.Client(endpoint=daemon.endpoint) as client:
        for model in ("sd-a", "sd-b"):
            client.generate(model, "x", seed=3, **OPTIONS)
    spans = fetch(daemon.ask, 3600).spans
    lanes = {span.lane for span in spans}
    assert lanes >= {
        "start-up", "stage", "bind", "switch", "prepare", "views", "encode", "requests", "queue", "loader 0",
    }  # fmt: skip
    loads = [span for span in spans if span.lane.startswith("loader") and not span.outcome]
    assert loads and all(span.size_bytes > 0 and span.route == "disk > arena" for span in loads)
    runs = [span for span in spans if span.lane == "stage" and not span.outcome]
    assert all(before.end_s <= after.start_s for before, after in itertools.pairwise(runs))
    assert len(runs[-1].steps_s) == 2 and runs[-1].start_s < runs[-1].steps_s[0] <= runs[-1].end_s
    whole = {span.request: span for span in spans if span.lane == "requests"}
    for run in runs[-2:]:
        assert whole[run.request].start_s < run.start_s < run.end_s < whole[run.request].end_s
    outcomes = {span.outcome for span in whole.values()}
    assert outcomes >= {"", "unknown_model", "bad_request"} and "cancelled" in outcomes
    assert [s.value for s in spans if s.lane == "queue"][-1] == 0

    out, plot = tmp_path / "t.json", tmp_path / "t.png"
    command = ["--socket", str(daemon.admin_socket), "trace", "--seconds", "3600", "-o", str(out)]
    told = CliRunner().invoke(ctl, [*command, "--plot", str(plot)])
    assert told.exit_code == 0, told.output
    check_format(json.loads(out.read_bytes()))
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_shared_runs_cancels_and_retries_add_up(family: Family, own_store: Path, tmp_path: Path) -> None:
    """Three requests share a run and one of them is cancelled; the others' timings still add up."""

    async def together(endpoint: str) -> list[tuple[understudy.Result, float]]:
        began_s = time.monotonic()
        async with understudy.AsyncClient(endpoint=endpoint) as client:
            first = await client.submit("sd-b", "x", **OPTIONS | {"steps": 60})
            handles = [await client.submit("sd-a", "x", seed=seed, **OPTIONS) for seed in range(4)]
            handles[1].cancel()
            await first.result()
            answers = await asyncio.gather(*(each.result() for each in handles), return_exceptions=True)
        elapsed_s = time.monotonic() - began_s
        assert isinstance(answers[1], understudy.Cancelled)
        return [(answer, elapsed_s) for answer in answers if isinstance(answer, understudy.Result)]

    with running_daemon(own_store, tmp_path / "run", stage={"warm_up": False}) as daemon:
        daemon.ask(admin.Set(name="sd-a", max_batch=4))
        results = asyncio.run(together(daemon.endpoint))
        assert len(results) == 3
        for result, elapsed_s in results:
            check_timings(result, elapsed_s)
        assert sum(result.switched for result, _ in results) == 1, "one switch is told once"
        found = scrape(daemon)
        assert found.value("understudy_requests_total", model="sd-a", outcome="cancelled") == 1
        assert found.value("understudy_request_duration_seconds_count") == 4


def test_not_ready_before_it_is(own_store: Path, tmp_path: Path) -> None:
    with running_daemon(own_store, tmp_path / "run", wait=False) as daemon:
        daemon.wait_for_log("importing torch")
        told = ask(daemon, "/readyz")
        assert told.status == 503 and told.text.startswith("starting")
        assert ask(daemon, "/healthz").status == 200
        assert scrape(daemon).value("understudy_ready") == 0
        daemon.wait_for_log("ready after")
        assert ask(daemon, "/readyz").status == 200


def test_without_metrics_there_is_no_door(own_store: Path, tmp_path: Path) -> None:
    with running_daemon(
        own_store, tmp_path / "run", stage={"warm_up": False}, metrics={"enabled": False}
    ) as daemon:
        assert not (daemon.runtime_dir / "metrics.sock").exists()

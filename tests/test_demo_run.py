"""The daemon that demo and benchmark start, and one small run of each through it."""

import io
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from understudy import admin
from understudy.trace import fetch
from understudy_demo.serving import DaemonFailed, DaemonSettings, rate_for, running_daemon, short_runtime_dir
from understudyd import config as configuration


def settings(folder: Path) -> DaemonSettings:
    return DaemonSettings(
        store=folder / "store",
        runtime_dir=folder / "run",
        arena_bytes=8 << 20,
        rate_limit_bytes_per_s=50_000_000,
        lookahead=0,
        order="fcfs",
        prefetch=False,
    )


def test_the_configuration_says_what_the_settings_say(tmp_path: Path) -> None:
    path = tmp_path / "understudyd.toml"
    path.write_text(settings(tmp_path / 'a "quoted" folder').toml())
    config = configuration.load(path, {})
    assert config.store.path == tmp_path / 'a "quoted" folder' / "store"
    assert (config.device.kind, config.device.arena) == ("cpu", 8 << 20)
    assert (config.loader.count, config.loader.rate_limit) == (2, 50_000_000)
    assert (config.policy.lookahead, config.policy.order, config.policy.prefetch) == (0, "fcfs", False)


def test_the_rate_allows_for_an_idle_loaders_burst() -> None:
    assert rate_for(4_000_000, 0.08) == 40_000_000


def test_a_long_folder_gets_a_short_runtime_dir(tmp_path: Path) -> None:
    short = Path("/tmp/understudy-test-run")
    assert short_runtime_dir(short) == short
    moved = short_runtime_dir(tmp_path / ("x" * 90) / "run")
    assert len(str(moved)) < 80 and moved.is_dir()
    moved.rmdir()


def test_a_daemon_that_cannot_start_is_reported_with_its_log(tmp_path: Path) -> None:
    bad = DaemonSettings(store=tmp_path / "s", runtime_dir=tmp_path / "run", arena_bytes=-5)
    wanted = pytest.raises(DaemonFailed, match=r"ended with status 1\n(.|\n)*device.arena")
    with wanted, running_daemon(bad, tmp_path, start_timeout_s=30):
        pytest.fail("it must not become ready")


@pytest.mark.parametrize(
    ("arguments", "missing"), [(["run"], "torch"), (["run"], "matplotlib"), (["make", "family"], "torch")]
)
def test_what_is_not_installed_is_told_with_what_installs_it(
    tmp_path: Path, arguments: list[str], missing: str
) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None; "
        f"from understudy_demo.main import main; main({arguments})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"Error: {missing} is not installed" in done.stderr and "'.[daemon,demo]'" in done.stderr


STARTER = """
import sys
from pathlib import Path
from understudy_demo.serving import DaemonSettings, running_daemon
from understudyd.store.store import Store
folder = Path(sys.argv[1])
Store.open(folder / "store", writable=True)
settings = DaemonSettings(store=folder / "store", runtime_dir=folder / "run", arena_bytes=1 << 20)
with running_daemon(settings, folder):
    print("up", flush=True)
    sys.stdin.read()
"""


def test_a_daemon_goes_with_whoever_started_it(tmp_path: Path) -> None:
    """Also when that is killed, so that no cleaning up is done."""
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert starter.stdout is not None and starter.stdout.readline() == b"up\n"
        pid = admin.call(tmp_path / "run/admin.sock", admin.Status())["pid"]
        daemon = psutil.Process(pid)
    finally:
        starter.kill()
        starter.communicate()
    assert not psutil.wait_procs([daemon], timeout=10)[1]


@pytest.mark.timeout(300)
def test_the_demo_from_end_to_end(tmp_path: Path) -> None:
    """Every image equals `from_pretrained`'s, the pictures are there, nothing is left running."""
    from understudy_demo.run import Demo, Plan

    told = io.StringIO()
    console = Console(file=told, width=100)
    status = Demo(Plan(out=tmp_path / "out", models=4, requests=10, clients=2), console).play()
    assert status == 0, told.getvalue()
    found = re.search(
        r"(\d+) of (\d+) images show what was asked for by the model that was asked", told.getvalue()
    )
    assert found is not None and int(found[1]) >= int(found[2]) / 2
    assert {"timeline.png", "contact-sheet.png"} <= {path.name for path in (tmp_path / "out").iterdir()}
    with pytest.raises(admin.AdminError, match="is it running"):
        admin.call(tmp_path / "out/run/admin.sock", admin.Status())


@pytest.mark.timeout(300)
def test_the_benchmark_from_end_to_end(tmp_path: Path) -> None:
    from benchmarks.serve import OURS, perform, set_scene
    from benchmarks.serve import settings as daemon_settings
    from benchmarks.serve_scene import Plan

    plan = Plan(models=5, resident=2, requests=16, clients=2, outstanding=2, rounds=2)
    scene = set_scene(plan, tmp_path)
    chosen = daemon_settings(plan, scene, tmp_path)[OURS]
    run = perform(plan, scene, {OURS: chosen}, tmp_path)[OURS]
    assert (run.completed, run.lost, run.wrong) == (16, 0, 0)
    assert run.figures.requests == 16, "every image has its span on stage"
    assert run.figures.models == len({request.model for request in scene.requests})


@pytest.mark.timeout(300)
def test_a_silent_daemon_ends_in_lost_requests_not_in_a_hang(tmp_path: Path) -> None:
    from benchmarks.kit import running_daemon as started
    from benchmarks.serve import OURS, send_from_processes, set_scene, sum_up
    from benchmarks.serve import settings as daemon_settings
    from benchmarks.serve_scene import Plan

    plan = Plan(models=4, resident=4, requests=400, clients=1, outstanding=1, rounds=1)
    scene = set_scene(plan, tmp_path)
    with started(daemon_settings(plan, scene, tmp_path)[OURS], tmp_path / "ours") as daemon:
        answers = send_from_processes(plan, scene.requests, daemon, tmp_path / "ours", limit_s=2.0)
        spans = fetch(daemon.ask, 60.0).spans
    assert 0 < len(answers) < 400, "what had come back by then is kept"
    run = sum_up(scene.requests, scene.references, [answers], [answers], spans)
    assert run.lost == 400 - len(answers) and run.wrong == 0

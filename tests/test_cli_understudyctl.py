"""`understudyctl` against a scripted admin socket."""

import json
import resource
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from click.testing import CliRunner, Result

from understudy import admin
from understudy.ctl import main

MIB = 1024 * 1024
LOADERS = [
    {"id": 4, "slot": 0, "pid": 11, "state": "ready", "load": "sdxl/unet", "route": "disk > host",
     "bytes_done": 3 * MIB, "size_bytes": 4 * MIB, "loads_done": 7, "bytes_total": 70 * MIB,
     "rate_bytes_per_s": 2.0 * MIB, "restarts": 1},
    {"id": 2, "slot": 1, "pid": 12, "state": "starting"},
]  # fmt: skip
STATUS = {
    "daemon": "d-77", "version": "0.1.0", "pid": 4242, "state": "ready", "uptime_s": 7500.0, "device": "cpu",
    "store": "/var/lib/understudy/store",
    "models": 24, "models_resident": 6, "requests_waiting": 3, "requests_done": 1200, "requests_failed": 2,
    "request_running": {"id": "r9", "model": "sd15-red", "step": 3, "steps": 20},
    "arena": {"size_bytes": 100 * MIB, "ready_bytes": 40 * MIB, "leased_bytes": 10 * MIB,
              "filling_bytes": 25 * MIB, "quarantined_bytes": 0, "free_bytes": 25 * MIB},
    "host_pool": {"size_bytes": 64 * MIB, "ready_bytes": 32 * MIB, "in_use_bytes": 16 * MIB,
                  "filling_bytes": 0, "quarantined_bytes": 0, "free_bytes": 16 * MIB, "copies": 3},
    "hand_over": "threads", "hand_over_reason": "it cannot be exported",
    "loaders": LOADERS, "last_error": "blob 12 is corrupt",
    "visible_switch_ms": {"p50": 0.8, "p99": 2.25, "count": 99},
}  # fmt: skip
MODELS = [
    {"name": "sd15-[red]", "pipeline": "StableDiffusionPipeline", "size_bytes": 2048 * MIB, "tier": "bound",
     "pinned": True, "requests": 12, "last_used_s_ago": 3.0},
    {"name": "sdxl", "pipeline": "XL", "size_bytes": 5, "tier": "disk", "pinned": False, "requests": 0,
     "last_used_s_ago": None},
]  # fmt: skip
ARENA = {
    "size_bytes": 512,
    "extents": [
        {"offset": 256, "size_bytes": 128, "state": "leased", "blob": "b" * 64, "models": ["a", "b"],
         "leases": 2},
        {"offset": 0, "size_bytes": 128, "state": "filling", "blob": "c" * 64, "models": ["c"], "leases": 0},
    ],
}  # fmt: skip
ANSWERS: dict[str, Any] = {
    "status": STATUS,
    "models": MODELS,
    "queue": [
        {"id": "r9", "client": "c#1", "model": "sd15-red", "state": "running", "waited_s": 0.25,
         "priority": 5, "tier": "bound", "step": 3, "steps": 20},
        {"id": "r10", "client": "c#1", "model": "sdxl", "state": "waiting", "waited_s": 61.0, "priority": 0,
         "tier": "loading", "step": None, "steps": None},
    ],
    "loaders": LOADERS,
}  # fmt: skip


class FakeDaemon:
    """An admin socket that answers from a table and remembers what it was asked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.asked: list[admin.Command] = []
        self.answers: dict[str, Any] = dict(ANSWERS)
        self.notes: list[admin.Note] = []
        self.error: admin.Error | None = None
        daemon = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                command = admin.decode_command(self.rfile.readline())
                daemon.asked.append(command)
                for note in daemon.notes:
                    self.wfile.write(admin.encode_line(note))
                name = command.__struct_config__.tag
                line = daemon.error or admin.Done(
                    result=daemon.answers.get(str(name), {"name": "m", "ok": True})
                )
                self.wfile.write(admin.encode_line(line))

        self.server = socketserver.UnixStreamServer(str(path), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})

    def run(self, *arguments: str) -> Result:
        return CliRunner().invoke(main, ["--socket", str(self.path), *arguments])


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    daemon = FakeDaemon(tmp_path / "admin.sock")
    daemon.thread.start()
    yield daemon
    daemon.server.shutdown()
    daemon.server.server_close()
    daemon.thread.join(10)


def test_status(daemon: FakeDaemon) -> None:
    text = daemon.run("status").stdout
    for fact in ("ready", "up 2 h 5 min", "24, 6 resident", "3 waiting, 1200 done, 2 failed", "pid 4242"):
        assert fact in text
    assert "sd15-red, step 3/20 (r9)" in text
    (row,) = [line for line in text.splitlines() if line.startswith("visible switch ")]
    assert "p50 0.80 ms, p99 2.25 ms over 99" in row
    assert any(line.split() == ["store", "/var/lib/understudy/store"] for line in text.splitlines())
    assert "blob 12 is corrupt" in text
    assert "75 % of 4.0 MiB" in text and "2.0 MiB/s" in text
    bar = next(line for line in text.splitlines() if "█" in line and "▓" in line and "leased" not in line)
    cells = [bar.count(glyph) for glyph in "█▓▒·"]
    assert sum(cells) == 64 and cells == [6, 26, 16, 16]
    host = text.splitlines().index(next(line for line in text.splitlines() if line.startswith("host")))
    assert [text.splitlines()[host].count(glyph) for glyph in "█▓·"] == [16, 32, 16]
    assert "in use 16.0 MiB" in text.splitlines()[host + 1] and "of 64.0 MiB" in text.splitlines()[host + 1]
    assert "by threads: it cannot be exported" in text and "disk > host" in text


def test_status_without_a_host_pool(daemon: FakeDaemon) -> None:
    daemon.answers["status"] = STATUS | {"host_pool": {"size_bytes": 0}, "hand_over": "processes"}
    text = daemon.run("status").stdout
    assert "no host pool" in text and "by threads" not in text


def test_models_and_names_are_shown_as_they_are(daemon: FakeDaemon) -> None:
    lines = daemon.run("models").stdout.splitlines()
    red = next(line for line in lines if "sd15" in line)
    assert red.split()[0] == "sd15-[red]" and "2.0 GiB" in red and "pinned" in red and "3.0 s ago" in red
    assert "never" in next(line for line in lines if "sdxl" in line)


def test_show_a_model(daemon: FakeDaemon) -> None:
    part = {
        "name": "unet",
        "signature": "s" * 64,
        "blob": "b" * 64,
        "size_bytes": MIB,
        "tier": "host",
        "host_copy": True,
        "shared_by": 3,
    }
    daemon.answers["show"] = MODELS[0] | {"components": [part]}
    text = daemon.run("show", "sd15-[red]").stdout
    assert "sd15-[red]" in text and "unet" in text and "1.0 MiB" in text and "host" in text
    assert daemon.asked == [admin.Show(name="sd15-[red]")]


def test_the_map_of_the_arena_is_to_scale(daemon: FakeDaemon) -> None:
    daemon.answers["show"] = ARENA
    lines = daemon.run("show", "--arena").stdout.splitlines()
    assert [line[0] for line in lines[:8]] == ["▒", "▒", "·", "·", "█", "█", "·", "·"]
    assert all(line == line[0] * 64 for line in lines[:8])
    assert "leased 128 B" in lines[9] and "free 256 B" in lines[9]
    assert any("a, b" in line for line in lines)
    assert daemon.asked == [admin.Show(arena=True)]
    assert "host pool" not in "".join(lines)


def test_the_map_of_the_host_pool_follows(daemon: FakeDaemon) -> None:
    held = [
        {"offset": 0, "size_bytes": 32, "state": "ready", "blob": "d" * 64, "models": ["far"], "leases": 0}
    ]
    daemon.answers["show"] = ARENA | {"host_pool": {"size_bytes": 64, "extents": held}}
    lines = daemon.run("show", "--arena").stdout.splitlines()
    below = lines[lines.index("host pool") + 1 :]
    assert [line[0] for line in below[:8]] == ["▓"] * 4 + ["·"] * 4
    assert "ready 32 B" in below[9] and "of 64 B" in below[9]
    assert any("far" in line for line in below)


def test_queue(daemon: FakeDaemon) -> None:
    lines = daemon.run("queue").stdout.splitlines()
    assert "3/20" in lines[2] and "running" in lines[2] and "bound" in lines[2]
    assert "1 min 1 s" in lines[3]
    daemon.answers["queue"] = []
    assert "no requests" in daemon.run("queue").stdout


@pytest.mark.parametrize("command", ["status", "models", "queue", "loaders"])
def test_json_is_the_document(daemon: FakeDaemon, command: str) -> None:
    result = daemon.run(command, "-o", "json")
    assert result.exit_code == 0 and json.loads(result.stdout) == ANSWERS[command]


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        ("status", {}),
        ("status", {"arena": {}, "loaders": None, "visible_switch_ms": {}, "request_running": {}}),
        ("models", [{}]),
        ("models", [{"requests": 1}]),
        ("show m", {}),
        ("show m", {"components": [{}]}),
        ("show --arena", {}),
        ("show --arena", {"arena": {"size_bytes": 10, "extents": [{}, {"state": "new", "size_bytes": 3}]}}),
        ("queue", [{}]),
        ("loaders", [{}]),
        ("loaders", []),
        ("load m", None),
        ("pin m", {}),
        ("evict m", {"freed_bytes": 1024, "shared": ["a"], "took_s": 0.5}),
    ],
)
def test_missing_keys_are_no_crash(daemon: FakeDaemon, arguments: str, answer: Any) -> None:
    daemon.answers[arguments.split()[0]] = answer
    result = daemon.run(*arguments.split())
    assert result.exit_code == 0, result.output
    assert result.stdout.strip()


def test_commands_say_what_was_meant(daemon: FakeDaemon, tmp_path: Path) -> None:
    daemon.notes = [admin.Note(phase="copying", done=5, total=10), admin.Note(phase="hashing")]
    for line in (
        f"add name {tmp_path} --dtype fp16 --variant fp16 --ignore-pickle",
        "remove m",
        "load m --no-wait",
        "evict m",
        "pin m",
        "unpin m",
        "set m --max-batch 4",
        "cancel r9",
        "shutdown --drain 3",
    ):
        result = daemon.run(*line.split())
        assert result.exit_code == 0, result.output
    assert daemon.asked == [
        admin.Add(name="name", source=str(tmp_path), dtype="fp16", variant="fp16", ignore_pickle=True),
        admin.Remove(name="m"),
        admin.Load(name="m", wait=False),
        admin.Evict(name="m"),
        admin.Pin(name="m"),
        admin.Unpin(name="m"),
        admin.Set(name="m", max_batch=4),
        admin.CancelRequest(id="r9"),
        admin.Shutdown(drain_s=3.0),
    ]


def test_every_command_of_the_protocol_can_be_typed() -> None:
    spoken = {command.__struct_config__.tag for command in get_args(admin.Command)}
    assert spoken - {"scan"} == set(main.commands) - {"config", "top"}, "a scan is typed as `add --scan`"


def test_a_rescan_tells_what_it_found(daemon: FakeDaemon) -> None:
    daemon.answers["rescan"] = {"added": [], "replaced": [], "removed": [], "rejected": {}, "damaged": {}}
    quiet = daemon.run("rescan")
    assert (quiet.exit_code, quiet.stdout) == (0, "nothing has changed\n")
    daemon.answers["rescan"] = {
        "added": ["new", "newer"], "replaced": ["swapped"], "removed": ["gone"],
        "rejected": {"odd": "no such class"}, "damaged": {"torn": "a blob is short"},
        "away": {"/mnt/nas": "timed out"},
    }  # fmt: skip
    told = daemon.run("rescan")
    assert told.exit_code == 1
    rows = [line.split() for line in told.stdout.splitlines()]
    for row in (
        "new added", "newer added", "swapped replaced", "gone removed", "odd rejected no such class",
        "torn damaged a blob is short", "/mnt/nas away timed out",
        "2 added, 1 replaced, 1 removed, 1 rejected, 1 damaged, 1 away",
    ):  # fmt: skip
        assert row.split() in rows
    assert json.loads(daemon.run("rescan", "-o", "json").stdout) == daemon.answers["rescan"]
    assert daemon.asked == [admin.Rescan()] * 3


def test_a_refusal_is_one_line_and_exit_code_1(daemon: FakeDaemon) -> None:
    daemon.error = admin.Error(code="unknown_model", message="no model 'm'; see `understudyctl models`")
    result = daemon.run("evict", "m")
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr == "understudyctl: error [unknown_model]: no model 'm'; see `understudyctl models`\n"


def test_no_daemon_is_exit_code_5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNDERSTUDY_RUNTIME_DIR", str(tmp_path))
    result = CliRunner().invoke(main, ["status"])
    assert result.exit_code == 5
    assert f"{tmp_path}/admin.sock" in result.stderr and "is it running?" in result.stderr
    assert result.stderr.startswith("understudyctl: error [unreachable]: ")


@pytest.mark.parametrize(
    "arguments", ["show", "show m --arena", "dance", "status -o xml", "trace --seconds 0"]
)
def test_usage_is_exit_code_2(daemon: FakeDaemon, arguments: str) -> None:
    assert daemon.run(*arguments.split()).exit_code == 2
    assert daemon.asked == []


@pytest.mark.parametrize(("returned", "exit_code"), [(0, 0), (1, 1), (2, 2), (3, 1), (-9, 1)])
def test_config_check_asks_the_daemons_package(
    monkeypatch: pytest.MonkeyPatch, returned: int, exit_code: int
) -> None:
    asked: list[list[str]] = []

    def runs(command: list[str], check: bool) -> Any:
        asked.append(command)
        return subprocess.CompletedProcess(command, returned)

    monkeypatch.setattr("understudy.ctl.subprocess.run", runs)
    assert CliRunner().invoke(main, ["config", "check", "/etc/u.toml"]).exit_code == exit_code
    assert asked == [[sys.executable, "-m", "understudyd.config", "check", "/etc/u.toml"]]
    monkeypatch.setattr("understudy.ctl.find_spec", lambda name: None)
    missing = CliRunner().invoke(main, ["config", "check"])
    assert missing.exit_code == 1 and "error [missing_package]: " in missing.stderr


def test_help_answers_at_once_and_loads_nothing_heavy() -> None:
    def help_cpu_s() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "understudy.ctl", "--help"]
        done = subprocess.run(command, capture_output=True, timeout=30, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert b"Operate an Understudy daemon" in done.stdout
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # It waits for nothing, so this is its wall time on an idle machine, whatever else runs on this one.
    assert min(help_cpu_s() for _ in range(3)) < 0.2
    code = (
        "import sys, understudy.ctl; "
        "heavy = {'rich', 'zmq', 'torch', 'asyncio', 'msgspec'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


DECISIONS = [
    {"decision": "Loading", "ago_s": 9.0, "models": ["a", "b", "c", "d"], "blob": "1" * 64, "name": "a vae",
     "size_bytes": 2 * MIB, "is_from_host": True, "is_to_host": False, "why": "awaited", "waiting": 2,
     "chance": 0.25},
    {"decision": "Loading", "ago_s": 8.0, "models": ["e"], "blob": "2" * 64, "name": "e unet",
     "size_bytes": MIB, "is_from_host": False, "is_to_host": True, "why": "likely", "waiting": 0,
     "chance": 0.031},
    {"decision": "Evicted", "ago_s": 7.0, "models": ["f"], "room_for": "a vae", "why": "", "price": 0.004,
     "victims": [{"blob": "3" * 64, "name": "f unet", "models": ["f"], "size_bytes": 3 * MIB, "price": 0.004,
                  "chance": 0.02, "waiting": 1, "has_copy": True}]},
    {"decision": "FoundNoRoom", "ago_s": 6.0, "models": ["g"], "blob": "4" * 64, "name": "g unet",
     "size_bytes": 4 * MIB, "free_bytes": 2 * MIB, "largest_gap_bytes": MIB},
    {"decision": "Stopped", "ago_s": 5.0, "models": ["h"], "blob": "5" * 64, "name": "h [unet]",
     "is_to_host": False, "waiting": 0},
    {"decision": "Refused", "ago_s": 4.0, "models": ["i"], "request": "r4", "client": "ann",
     "code": "queue_full", "message": "1000 requests are waiting already", "waited_s": None},
    {"decision": "Chosen", "ago_s": 3.0, "models": ["a"], "request": "r5", "client": "bob", "priority": 2,
     "waited_s": 1.5, "skips": 1, "was_on_stage": True, "overtook": 3, "longest_wait_s": 12.0,
     "most_skips": 4, "max_wait_s": 30.0, "max_skips": 64},
    {"decision": "FromALaterVersion", "ago_s": 2.0, "models": []},
]  # fmt: skip


def test_decisions_are_sentences(daemon: FakeDaemon) -> None:
    daemon.answers["decisions"] = DECISIONS
    result = daemon.run("decisions", "--last", "8")
    assert result.exit_code == 0 and daemon.asked == [admin.Decisions(last=8)]
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[:-1] == [
        "9.0 s ago loads a vae, 2.0 MiB from the host pool: "
        "2 requests wait for a, b, c and 1 more, chance 25 %",
        "8.0 s ago loads e unet, 1.0 MiB from disk to the host pool: "
        "e may be asked for next, and there is room, chance 3.1 %",
        "7.0 s ago evicts f unet (3.0 MiB, chance 2 %, 1 request waits but later, stays in the host pool, "
        "price 0.004): the cheapest room for a vae, price 0.004",
        "6.0 s ago finds no room for g unet, 4.0 MiB: 2.0 MiB are free, 1.0 MiB in one piece, "
        "and the rest is in use or needed sooner",
        "5.0 s ago stops loading h [unet]: nobody waits for it",
        "4.0 s ago refuses i to ann (r4): queue_full, 1000 requests are waiting already",
        "3.0 s ago a goes on stage for bob (r5): waited 1.5 s, priority 2, was overtaken once, "
        "its weights are there already; overtakes 3 before it: "
        "one waits 12.0 s since its turn came (bound 30.0 s), one was overtaken 4 times (bound 64)",
    ]
    assert "FromALaterVersion" in lines[-1]
    assert json.loads(daemon.run("decisions", "-o", "json").stdout) == DECISIONS
    daemon.answers["decisions"] = []
    assert "no decisions yet" in daemon.run("decisions").stdout


def test_show_ends_with_the_decisions_about_the_model(daemon: FakeDaemon) -> None:
    daemon.answers["show"] = MODELS[0] | {"components": [], "decisions": DECISIONS[:1]}
    assert "2 requests wait for a" in daemon.run("show", "sd15-[red]").stdout.splitlines()[-1]
    document = json.loads(daemon.run("show", "sd15-[red]", "-o", "json").stdout)
    assert document["decisions"] == DECISIONS[:1]

"""The request log: whole lines in order of arrival, whatever becomes of the file."""

import asyncio
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from simulate_kit import profile
from understudy.wire import Adapter, Generate, Timings
from understudyd.main import main
from understudyd.shell.adapter_keeper import Wish
from understudyd.shell.request_log import RequestLog
from understudyd.simulate import profiles, trace

Loras = tuple[tuple[str, float], ...]
TOOK = Timings(queued_s=1.0, switch_s=0.25, run_s=3.0, encode_s=0.5, total_s=4.75)
UNIX_S = 1e9


def play(
    path: Path, work: Callable[[RequestLog], None], *, most_bytes: int = 10**6, most_held: int = 10
) -> None:
    """One life of a log, 1000 s after UNIX_S."""

    async def life() -> None:
        log = RequestLog(path, most_bytes, lambda: 1000.0, lambda: UNIX_S + 1000.0, most_held)
        work(log)
        await log.close()

    asyncio.run(life())


def finish(
    log: RequestLog, request_id: str, at_s: float, *, model: str = "m", steps: int = 20, loras: Loras = ()
) -> None:
    request = Generate(id=request_id, model="x", seed=1, images=2, priority=3)
    wish = Wish("what the core calls it", model, tuple(Adapter(*lora) for lora in loras))
    log.finished(request_id, "ab12#7", request, wish, steps, at_s, TOOK)


def ask(log: RequestLog, *ids_at: tuple[str, float]) -> None:
    """Requests that come and are finished at once."""
    for request_id, at_s in ids_at:
        log.received(request_id)
        finish(log, request_id, at_s)


def arrivals(path: Path) -> list[float]:
    return [request.arrival_s - UNIX_S for request in trace.read(path)]


def test_a_line_says_what_the_simulator_asks(tmp_path: Path) -> None:
    play(tmp_path / "log", lambda log: ask(log, ("r1", 2.5)))
    assert json.loads((tmp_path / "log").read_text()) == {
        "arrival_s": UNIX_S + 2.5, "model": "m", "client": "ab12", "loras": "", "task": "", "images": 2,
        "steps": 20, "duration_s": 3.75, "priority": 3,
    }  # fmt: skip


def test_adapters_are_named_with_their_scales(tmp_path: Path) -> None:
    def work(log: RequestLog) -> None:
        for request_id, loras in (("r1", (("pixel-art", 0.8), ("wrong", 1.0))), ("r2", (("a", -0.1),))):
            log.received(request_id)
            finish(log, request_id, 1.0, loras=loras)

    play(tmp_path / "log", work)
    assert [r.loras for r in trace.read(tmp_path / "log")] == ["pixel-art@0.8+wrong", "a@-0.1"]


def test_lines_are_in_order_of_arrival_and_only_of_what_was_finished(tmp_path: Path) -> None:
    def work(log: RequestLog) -> None:
        for i in range(6):
            log.received(f"r{i}")
        for i in (3, 1, 0, 5):
            finish(log, f"r{i}", float(i))
        log.failed("r2")
        log.failed("never seen")

    play(tmp_path / "log", work)
    assert arrivals(tmp_path / "log") == [0.0, 1.0, 3.0, 5.0]


def test_who_waits_for_ever_holds_up_nobody(tmp_path: Path) -> None:
    def work(log: RequestLog) -> None:
        log.received("stuck")
        for i in range(10):
            ask(log, (f"r{i}", float(i)))
        finish(log, "stuck", -1.0)

    play(tmp_path / "log", work)
    assert arrivals(tmp_path / "log") == [float(i) for i in range(10)]


def test_a_full_file_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for life in range(6):
        play(path, lambda log, life=life: ask(log, (f"r{life}", float(life))), most_bytes=300)  # type: ignore[misc]
    assert arrivals(path) == [4.0, 5.0] and arrivals(tmp_path / "log.1") == [2.0, 3.0]
    assert sorted(os.listdir(tmp_path)) == ["log", "log.1"]


def test_half_a_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "log"
    play(path, lambda log: ask(log, ("r1", 1.0), ("r2", 2.0)))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 5)
    play(path, lambda log: ask(log, ("r3", 3.0)))
    assert arrivals(path) == [1.0, 3.0]


def test_a_log_from_the_future_is_set_aside(tmp_path: Path) -> None:
    """A clock was put right: the simulator would not read what goes back in time."""
    path = tmp_path / "log"
    play(path, lambda log: ask(log, ("r1", 5000.0)))
    play(path, lambda log: ask(log, ("r2", 1.0)))
    assert arrivals(path) == [1.0] and arrivals(tmp_path / "log.1") == [5000.0]


def test_a_file_that_cannot_be_written_costs_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        play(tmp_path / "gone" / "log", lambda log: ask(log, *((f"r{i}", float(i)) for i in range(5))))
    assert sum("cannot be written" in line for line in caplog.messages) == 1


def test_the_simulator_plays_it(tmp_path: Path) -> None:
    path, costs = tmp_path / "log", tmp_path / "costs.toml"
    costs.write_text(profiles.to_toml(profile()))

    def work(log: RequestLog) -> None:
        for i in range(30):
            log.received(f"r{i}")
            finish(log, f"r{i}", float(i), model=f"m{i % 7}", steps=2)

    play(path, work)
    arguments = ["simulate", str(path), "--profile", str(costs), "--models-resident", "3", "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["requests"], found["served"], found["models"]) == (30, 30, 7)

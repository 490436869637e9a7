"""The forecast's file: written by one rename, read at start, ignored with a warning when it is damaged."""

import asyncio
import json
import logging
from pathlib import Path

import pytest

from core_ledger import PAGE
from understudyd.core import events as ev
from understudyd.core.machine import Machine
from understudyd.core.types import BlobInfo, ModelInfo, RequestInfo
from understudyd.shell.forecast_file import NAME, ForecastFile


class Life:
    """A machine that knows two models, and its forecast's file. `unix_s` is when it began."""

    def __init__(self, folder: Path, unix_s: float = 1e9, period_s: float = 1e6) -> None:
        self.unix_s, self.clock_s = unix_s, 100.0
        self.machine = Machine(100 * PAGE)
        for name in ("a", "b"):
            self.machine.handle(ev.ModelAdded(ModelInfo(name, (BlobInfo(f"blob of {name}", PAGE),))), 0.0)
        self.file = ForecastFile(
            folder, self.machine, lambda: self.clock_s, lambda: self.unix_s + self.clock_s, period_s
        )

    def ask(self, *names: str) -> None:
        for name in names:
            self.clock_s += 1.0
            request = RequestInfo(f"r{self.clock_s}", "somebody", name)
            self.machine.handle(ev.RequestReceived(request), self.clock_s)

    def chance(self, name: str) -> float:
        return self.machine.forecast.chance(name)


def test_the_next_life_knows_what_this_one_learned(tmp_path: Path) -> None:
    async def play() -> None:
        before, after = Life(tmp_path), Life(tmp_path, unix_s=1e9 + 3600.0)
        await before.file.read()
        before.file.start()
        before.ask("a", "a", "b", "a")
        await before.file.close()
        await after.file.read()
        for name in ("a", "b", "blob of a"):
            assert after.chance(name) == pytest.approx(before.chance(name), abs=1e-4)
        assert after.machine.forecast.last_request_s == pytest.approx(104.0 - 3600.0)
        assert [path.name for path in tmp_path.iterdir()] == [NAME]

    asyncio.run(play())


def test_it_is_written_every_now_and_then_and_only_if_there_is_news(tmp_path: Path) -> None:
    async def play() -> None:
        life = Life(tmp_path, period_s=0.001)
        life.file.start()
        life.ask("a")
        while not (tmp_path / NAME).exists():
            await asyncio.sleep(0.001)
        (tmp_path / NAME).unlink()
        await life.file.close()
        assert not (tmp_path / NAME).exists()

    asyncio.run(play())


def test_a_daemon_that_never_read_it_does_not_write_it(tmp_path: Path) -> None:
    async def play() -> None:
        (tmp_path / NAME).write_text("the good one")
        life = Life(tmp_path)
        life.ask("a")
        await life.file.close()
        assert (tmp_path / NAME).read_text() == "the good one"

    asyncio.run(play())


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\xff\x00", b"[" * 100_000, b"{}", b'{"last_request_unix_s": -1, "forecast": {}}',
        b'{"last_request_unix_s": 5, "forecast": {"version": 99}}', b"x" * (17 * 2**20),
    ],
)  # fmt: skip
def test_a_damaged_file_is_ignored_with_a_warning(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async def play() -> None:
        (tmp_path / NAME).write_bytes(content)
        life = Life(tmp_path)
        with caplog.at_level(logging.WARNING):
            await life.file.read()
        assert "ignored" in caplog.text and NAME in caplog.text
        assert life.machine.forecast.requests == 0
        life.file.start()
        life.ask("a")
        await life.file.close()
        assert json.loads((tmp_path / NAME).read_bytes())["forecast"]["requests"] == 1

    asyncio.run(play())


def test_a_folder_that_cannot_be_written_to_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def play() -> None:
        life = Life(tmp_path / "gone")
        await life.file.read()
        assert not caplog.text, "the first start of all"
        life.file.start()
        life.ask("a")
        await life.file.close()
        assert "cannot be kept" in caplog.text

    asyncio.run(play())

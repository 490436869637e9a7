"""Three requests in one run, through the real daemon; what an operator sets outlives it."""

import asyncio
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import understudy
from daemon_kit import DaemonProcess, running_daemon
from family_kit import distance, pixels
from understudy import admin
from understudy.ctl import main as ctl

CLOSE = 1
STEPS = 40
SMALL = {"width": 32, "height": 32, "guidance": 5.0, "steps": STEPS}
PROMPTS = {1: "a red circle", 2: "a blue house", 3: "a tree by night"}


async def block(client: understudy.AsyncClient) -> list[understudy.AsyncHandle]:
    """One that runs, and one that is on deck, until they are cancelled."""
    handles = [await client.submit("sd-c", "x", steps=450, width=64, height=64) for _ in range(2)]
    async for event in handles[0].events():
        if isinstance(event, understudy.Progress):
            return handles
    raise AssertionError("it ended")


async def until_on_deck(daemon: DaemonProcess, count: int) -> None:
    async with asyncio.timeout(30):
        while True:
            rows = await asyncio.to_thread(daemon.ask, admin.Queue())
            if sum(row["state"] == "on_deck" for row in rows) == count:
                return


async def three_at_once(daemon: DaemonProcess) -> dict[int, understudy.Result]:
    """The second one is cancelled while they run; the others' results."""
    results: dict[int, understudy.Result] = {}

    async def follow(seed: int, handle: understudy.AsyncHandle) -> None:
        async for event in handle.events():
            if seed == 2 and isinstance(event, understudy.Progress) and event.step >= 2:
                handle.cancel()
            elif isinstance(event, understudy.Result):
                results[seed] = event

    async with understudy.AsyncClient(endpoint=daemon.endpoint) as client:
        running, on_deck = await block(client)
        handles = {seed: await client.submit("sd-a", p, seed=seed, **SMALL) for seed, p in PROMPTS.items()}
        running.cancel()
        await until_on_deck(daemon, 3)
        on_deck.cancel()
        ended = await asyncio.gather(*(follow(*item) for item in handles.items()), return_exceptions=True)
    assert [type(error) for error in ended] == [type(None), understudy.Cancelled, type(None)]
    return results


def test_three_requests_share_a_run_and_one_is_cancelled(own_store: Path, tmp_path: Path) -> None:
    with running_daemon(own_store, tmp_path / "first", stage={"warm_up": False}) as daemon:
        told = CliRunner().invoke(
            ctl, ["--socket", str(daemon.admin_socket), "set", "sd-a", "--max-batch", "4", "-o", "json"]
        )
        assert json.loads(told.output) == {"name": "sd-a", "max_batch": 4}
        with pytest.raises(admin.AdminError, match="sd-z"):
            daemon.ask(admin.Set(name="sd-z", max_batch=2))
    settings = {"stage": {"warm_up": False}, "policy": {"decisions": 100}}
    with running_daemon(own_store, tmp_path / "second", **settings) as daemon:
        assert daemon.ask(admin.Status())["max_batch"] == {"sd-a": 4}
        shown = daemon.ask(admin.Show(name="sd-a"))
        assert shown["max_batch"] == 4 and shown["can_batch"] is True
        with understudy.Client(endpoint=daemon.endpoint) as client:
            alone = {s: client.generate("sd-a", p, seed=s, **SMALL) for s, p in PROMPTS.items()}
        together = asyncio.run(three_at_once(daemon))
        assert sorted(together) == [1, 3]
        for seed, result in together.items():
            made = [pixels(image) for image in result.images]
            for other, expected in alone.items():
                apart = distance(made, [pixels(image) for image in expected.images])
                assert apart <= CLOSE if other == seed else apart > 8 * CLOSE
        made = [d for d in daemon.ask(admin.Decisions()) if d["decision"] == "Chosen" and d["along_with"]]
        assert len(made) == 2 and len({d["along_with"] for d in made}) == 1
        assert daemon.ask(admin.Show(arena=True))["tensors_outside"] == []
        daemon.ask(admin.Remove(name="sd-a"))
        assert daemon.ask(admin.Status())["max_batch"] == {}
    assert json.loads((own_store / "settings.json").read_bytes()) == {}

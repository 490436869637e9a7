"""A loader dies in the middle of an adapter's load; the client gets its image, nothing stays behind."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from family_kit import Family, pixels
from faults_kit import Stricken, stricken_daemon, until
from ingest_kit import single_threaded
from lora_family_kit import OPTIONS, PROMPT, Applied, Loras
from understudy import admin

POINTS = ("header", "read", "copy", "synchronise", "report")
PLAIN, POOLED = "0", "32MiB"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    yield from single_threaded()


@pytest.fixture(autouse=True)
def nothing_left_behind() -> None:
    """Loaders come and go, and the daemon stays."""


@pytest.fixture(scope="module")
def loras(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Loras:
    return Loras(tmp_path_factory.mktemp("loras"), family.folders["sd-c"])


@pytest.fixture(scope="module")
def stricken(
    family: Family, loras: Loras, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Stricken]:
    with stricken_daemon(family, tmp_path_factory.mktemp("stricken"), pool=request.param) as stricken:
        for name in ("plain", "whole"):
            loras.add(stricken.store.path, name)
        stricken.ask(admin.Rescan())
        yield stricken


async def asked(stricken: Stricken, adapters: Applied) -> Any:
    return await stricken.client.submit("sd-c", PROMPT, adapters=list(adapters), **OPTIONS)


async def image(handle: Any) -> bytes:
    return pixels((await handle.result()).images[0])


@pytest.mark.parametrize(
    ("stricken", "point"),
    [pytest.param(PLAIN if i % 2 else POOLED, point, id=point) for i, point in enumerate(POINTS)],
    indirect=["stricken"],
    scope="module",
)
def test_a_loader_is_killed_over_an_adapter(stricken: Stricken, loras: Loras, point: str) -> None:
    """The base is resident: what is loaded, and struck, is the adapter."""
    struck, unharmed = [("plain", 0.8)], [("whole", 0.7)]

    async def scenario() -> None:
        async with stricken.visited():
            await stricken.served("sd-c")
            restarts = stricken.restarts()
            claim = stricken.strike_one(f"kill:{point}")
            victim = await asked(stricken, struck)
            await until(claim.exists, bool)
            assert await image(victim) == loras.image(struck)
            assert await image(await asked(stricken, unharmed)) == loras.image(unharmed)
            await stricken.served("sd-c")
            await stricken.replaced(restarts + 1)
        stricken.relent()
        assert stricken.status()["requests_failed"] == 0
        await stricken.quiet()
        for combination in stricken.ask(admin.Loras())["combinations"]:
            stricken.ask(admin.Evict(name=combination["name"]))
        await stricken.emptied()

    asyncio.run(scenario())

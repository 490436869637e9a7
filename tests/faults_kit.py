"""What the fault tests share: a daemon whose loaders can be struck at a named point, and ways to watch it."""

import asyncio
import contextlib
import os
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

import understudy
from daemon_kit import DaemonProcess, running_daemon
from family_kit import Family, pixels
from understudy import admin
from understudyd.loader.faults import ENVIRONMENT_VARIABLE
from understudyd.store.store import Store

PROMPT = "a red circle on blue"
OPTIONS = {"seed": 7, "steps": 1, "width": 32, "height": 32}
REFERENCE = {"prompt": PROMPT, "seed": 7, "num_inference_steps": 1, "width": 32, "height": 32}
WAIT_S = 20.0
AT_WORK = ("idle", "loading")
HELD = ("filling_bytes", "quarantined_bytes", "leased_bytes", "in_use_bytes")
"""Bytes of the arena or of the host pool that somebody works with."""


async def until(look: Callable[[], Any], wanted: Callable[[Any], Any], timeout_s: float = WAIT_S) -> Any:
    """Ask again and again, yielding to the loop in between, until the answer is the wanted one."""
    seen: Any = None
    try:
        async with asyncio.timeout(timeout_s):
            while not wanted(seen := await asyncio.to_thread(look)):
                await asyncio.sleep(0)
    except TimeoutError:
        raise TimeoutError(f"waited {timeout_s} s in vain, at last for: {seen}") from None
    return seen


def is_in_the_middle(row: dict[str, Any]) -> bool:
    """A loader's row of `loaders`, whose load has begun and is not done."""
    return bool(0 < row["bytes_done"] < row["size_bytes"])


@dataclass
class Stricken:
    """A daemon under test, its store, which the test may change, and the file that its loaders obey."""

    daemon: DaemonProcess
    family: Family
    store: Store
    orders: Path
    strikes: int = 0
    client: understudy.AsyncClient = field(init=False)

    # -- strikes ------------------------------------------------------------------------------------

    def strike_one(self, order: str) -> Path:
        """Have one loader struck, `[action:]point[:n]`; the file that appears when it is."""
        self.strikes += 1
        claim = self.orders.with_name(f"struck-{self.strikes}")
        self.strike(f"{order}@{claim}")
        return claim

    def strike(self, order: str) -> None:
        """Have every loader struck that passes the point."""
        fresh = self.orders.with_suffix(".new")
        fresh.write_text(order)
        fresh.replace(self.orders)

    def relent(self) -> None:
        """Strike no more; those that were slow are no longer."""
        self.orders.unlink(missing_ok=True)

    # -- a client -----------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def visited(self) -> AsyncIterator[None]:
        """With a client."""
        async with understudy.AsyncClient(endpoint=self.daemon.endpoint) as self.client:
            yield

    async def submit(self, model: str) -> Any:
        """A request whose image `family` knows."""
        return await self.client.submit(model, PROMPT, **OPTIONS)

    async def served(self, *models: str) -> None:
        """Ask for each model, all at once; every image must be the right one."""
        handles = [(model, await self.submit(model)) for model in models]
        for model, handle in handles:
            await self.right(model, handle)

    async def right(self, model: str, handle: Any) -> None:
        """The request must give the right image."""
        images = (await handle.result()).images
        assert [pixels(image) for image in images] == self.expected(model), f"{model}: a wrong image"

    def expected(self, model: str) -> list[bytes]:
        """What plain diffusers makes of it."""
        return self.family.reference(model, **REFERENCE)

    async def refused(self, model: str, code: str) -> understudy.DaemonError:
        """Ask for a model whose request must fail with this code."""
        try:
            await self.served(model)
        except understudy.DaemonError as error:
            assert error.code == code, f"{error.code}, not {code}: {error}"
            return error
        raise AssertionError(f"{model} was served, not refused with {code}")

    # -- what the daemon says -----------------------------------------------------------------------

    def ask(self, command: admin.AdminRequest) -> Any:
        return self.daemon.ask(command)

    def status(self) -> dict[str, Any]:
        return dict(self.ask(admin.Status()))

    def loaders(self) -> list[dict[str, Any]]:
        return list(self.ask(admin.Loaders()))

    def restarts(self) -> int:
        return sum(row["restarts"] for row in self.loaders())

    def regions(self) -> list[dict[str, int]]:
        """Bytes by use: the arena's and the host pool's."""
        status = self.status()
        return [status["arena"], status["host_pool"]]

    async def in_the_middle(self, load: str = "") -> dict[str, Any]:
        """The row of a loader in mid-load, of this model and component if they are named."""

        def busy() -> list[dict[str, Any]]:
            return [row for row in self.loaders() if is_in_the_middle(row) and load in row["load"]]

        return dict((await until(busy, bool))[0])

    async def replaced(self, restarts: int) -> tuple[float, float]:
        """When so many loaders had been given up, and when every place had one at work (`time.time`)."""
        await until(self.restarts, lambda count: count >= restarts)
        given_up_at_s = time.time()
        rows = await until(self.loaders, lambda rows: all(row["state"] in AT_WORK for row in rows))
        at_work_at_s = time.time()
        assert sum(row["restarts"] for row in rows) == restarts, rows
        return given_up_at_s, at_work_at_s

    async def quiet(self) -> list[dict[str, int]]:
        """Nothing is loading, leased or quarantined any more; the bytes by use, which must add up."""
        regions = await until(
            self.regions, lambda regions: not any(region.get(name) for region in regions for name in HELD)
        )
        for region in regions:
            assert region["ready_bytes"] + region["free_bytes"] == region["size_bytes"], region
        return list(regions)

    async def emptied(self) -> None:
        """Evict everything; the whole arena must be free again."""
        await self.quiet()
        for name in self.family.folders:
            self.ask(admin.Evict(name=name))
        arena = (await self.quiet())[0]
        assert arena["free_bytes"] == arena["size_bytes"] == arena["largest_gap_bytes"], arena

    # -- what the system says -----------------------------------------------------------------------

    def blob(self, model: str, component: str = "unet") -> Path:
        """A component's file, which it may share with other models."""
        (key,) = [c.blob.sha256 for c in self.store.model(model).components if c.name == component]
        return Path(self.store.blob_path(key))

    def descriptors(self) -> Counter[str]:
        """What the daemon has open, by kind."""
        opened: Counter[str] = Counter()
        for entry in Path(f"/proc/{self.daemon.process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                opened[os.readlink(entry).split(":[")[0]] += 1
        return opened

    def children(self) -> list[psutil.Process]:
        return list(psutil.Process(self.daemon.process.pid).children(recursive=True))


@contextlib.contextmanager
def stricken_daemon(
    family: Family,
    folder: Path,
    *,
    pool: str = "0",
    count: int = 2,
    environ: Mapping[str, str] | None = None,
    **sections: Any,
) -> Iterator[Stricken]:
    """A daemon over a copy of the family's store, ready; its small chunks give many points to strike at."""
    folder.mkdir(parents=True, exist_ok=True)
    store = Path(shutil.copytree(family.store, folder / "store"))
    orders = folder / "orders"
    chosen: dict[str, Any] = {
        "stage": {"warm_up": False},
        "policy": {"prefetch": False},
        "host": {"pool": pool},
    } | sections
    chosen["loader"] = {"count": count, "chunk": "256KiB"} | sections.get("loader", {})
    variables = {ENVIRONMENT_VARIABLE: f"@{orders}", **(environ or {})}
    with running_daemon(store, folder / "run", environ=variables, **chosen) as daemon:
        yield Stricken(daemon, family, Store.open(store, writable=False), orders)

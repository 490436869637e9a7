"""What is served follows the stores, also where a folder changes while the stage reads it."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from test_store_store import add
from understudyd.core import actions as ac
from understudyd.core import events as ev
from understudyd.core.machine import Machine
from understudyd.core.types import ErrorCode, RequestInfo
from understudyd.shell.keeper import Keeper, ReplaceFailed
from understudyd.store.store import Store
from understudyd.store.union import StoreUnion


class Shell:
    """A keeper and a machine; the test plays the stage. `performed` are the machine's actions."""

    def __init__(self, own: Store, *read_only: Store) -> None:
        self.machine = Machine(1 << 20)
        self.performed: list[ac.Action] = []
        self.keeper = Keeper(
            self.machine, StoreUnion(own, read_only), asyncio.get_running_loop(), self.handle
        )
        self._now_s = 0.0

    def handle(self, event: ev.Event) -> None:
        self._now_s += 0.001
        for action in self.machine.handle(event, self._now_s):
            self.performed.append(action)
            if isinstance(action, ac.RetireModel | ac.AdoptEdition | ac.RejectEdition | ac.RetireEdition):
                self.keeper.perform(action)

    def ask(self, request_id: str, name: str) -> None:
        self.handle(ev.RequestReceived(RequestInfo(request_id, "ann", name)))

    def report(self, event: ev.Event) -> None:
        """As the stage does, by way of the runtime."""
        if (verified := self.keeper.verified(event)) is not None:
            self.handle(verified)

    def answers(self) -> dict[str, ErrorCode | None]:
        return {a.request_id: a.code for a in self.performed if isinstance(a, ac.AnswerRequest)}


def play(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 20))  # type: ignore[arg-type]


@pytest.fixture
def own(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "own", writable=True)


def test_parts_read_from_a_folder_that_changed_are_never_used(own: Store) -> None:
    """The old record's weights with the new folder's tokenizer would be neither model."""

    async def work() -> None:
        old = add(own, "m", b"a")
        shell = Shell(own)
        await shell.keeper.rescan()
        shell.ask("r", "m")
        assert ac.PrepareModel("m") in shell.performed
        new = add(own, "m", b"b", replace=True)
        assert shell.keeper.served.records["m"] == old
        shell.report(ev.ModelPrepared("m"))
        assert shell.machine.catalogue.editions["m"].parts.state.value == "preparing", "not believed"
        while shell.keeper.served.records["m"] != new:
            await asyncio.sleep(0)
        assert ac.RetireEdition("m", "m") in shell.performed
        assert ac.PrepareModel("m@1") in shell.performed and shell.answers() == {}
        assert await shell.keeper.refresh("m") == new, "the operator's command finds it done"
        assert sum(isinstance(a, ac.AdoptEdition) for a in shell.performed) == 1

    play(work)


def test_a_failure_to_read_a_store_that_is_away_passes(own: Store, tmp_path: Path) -> None:
    async def work() -> None:
        far = Store.open(tmp_path / "far", writable=True)
        add(far, "m", b"a")
        shell = Shell(own, Store(far.path))
        await shell.keeper.rescan()
        shell.ask("first", "m")
        away = far.path.rename(tmp_path / "away")
        shell.report(ev.ModelPreparationFailed("m", "no such file"))
        assert shell.answers() == {"first": ErrorCode.LOAD_FAILED}
        report = await shell.keeper.rescan()
        assert list(report.away) == [str(far.path)] and "m" in shell.keeper.served.records
        away.rename(far.path)
        shell.ask("second", "m")
        assert shell.performed.count(ac.PrepareModel("m")) == 2
        shell.report(ev.ModelPreparationFailed("m", "a broken tokenizer"))
        assert shell.answers()["second"] is ErrorCode.INTERNAL, "the store is there: this one lasts"

    play(work)


def test_an_edition_that_cannot_be_prepared_is_told_and_tried_again_by_a_rescan(own: Store) -> None:
    async def work() -> None:
        old = add(own, "m", b"a")
        shell = Shell(own)
        await shell.keeper.rescan()
        shell.ask("r", "m")
        shell.report(ev.ModelPrepared("m"))
        add(own, "m", b"b", replace=True)
        refreshing = asyncio.ensure_future(shell.keeper.refresh("m"))
        while ac.PrepareModel("m@1") not in shell.performed:
            await asyncio.sleep(0.001)
        shell.report(ev.ModelPreparationFailed("m@1", "no tokenizer"))
        with pytest.raises(ReplaceFailed, match="no tokenizer"):
            await refreshing
        assert shell.keeper.served.records["m"] == old
        rescanning = asyncio.ensure_future(shell.keeper.rescan())
        while shell.performed.count(ac.PrepareModel("m@1")) < 2:
            await asyncio.sleep(0.001)
        shell.report(ev.ModelPrepared("m@1"))
        assert (await rescanning).replaced == ["m"]

    play(work)


def test_blobs_in_use_outlive_their_manifest(own: Store) -> None:
    """A removal cleans up, but not what another model's old edition may yet load."""

    async def work() -> None:
        old = add(own, "m", b"a")
        add(own, "other", b"x")
        shell = Shell(own)
        await shell.keeper.rescan()
        add(own, "m", b"b", replace=True)
        await shell.keeper.remove("other")
        path = own.blob_path(old.components[0].blob.sha256)
        assert path.exists()
        await shell.keeper.refresh("m")
        while path.exists():
            await asyncio.sleep(0.001)
        assert set(own.names()) == {"m"}

    play(work)

"""Adapters and bases that are replaced, removed, damaged or away while combinations of them are in use."""

import asyncio
from pathlib import Path

import pytest

import lora_kit as kit
from lora_shell_kit import Shell, play, until
from understudyd.core import events as ev
from understudyd.store.errors import StoreError
from understudyd.store.store import Store

CHANGES = (ev.ModelAdded, ev.ModelReplaced, ev.ModelRemoved)


@pytest.fixture
def own(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "own", writable=True)


async def open_shell(own: Store, *read_only: Store) -> Shell:
    shell = Shell(own, *read_only)
    await shell.keeper.rescan()
    shell.machine.events.clear()
    return shell


def idle(shell: Shell, request_id: str, name: str) -> None:
    """The request is taken back and its model prepared: nobody needs the model now."""
    shell.prepared(name)
    shell.runtime.cancel("ann", request_id)


# -- replaced --------------------------------------------------------------------------------------


def test_a_replaced_adapter_takes_its_unused_combinations_with_it(own: Store) -> None:
    kit.add_model(own, "base"), kit.add_adapter(own, "lora")

    async def work() -> None:
        shell = await open_shell(own)
        shell.ask("r", "base", ("lora", 1.0))
        old = shell.added()[-1].blobs[-1].key
        idle(shell, "r", "base+lora@1.0")
        new = kit.add_adapter(own, "lora", b"z", replace=True)
        assert await shell.adapters.refresh("lora") == new
        assert "base+lora@1.0" not in shell.adapters.derived
        shell.ask("s", "base", ("lora", 1.0))
        name = "base+lora@1.0"
        assert shell.told(*CHANGES) == [f"ModelAdded {name}", f"ModelRemoved {name}", f"ModelAdded {name}"]
        assert shell.added()[-1].blobs[-1].key != old
        with pytest.raises(KeyError):
            shell.adapters.derived.plan(old)

    play(work)


def test_who_waits_gets_the_new_adapter_when_it_is_prepared(own: Store) -> None:
    kit.add_model(own, "base")
    path = own.blob_path(kit.add_adapter(own, "lora").blob.sha256)

    async def work() -> None:
        shell = await open_shell(own)
        shell.ask("waits", "base", ("lora", 1.0))
        name = "base+lora@1.0"
        old = shell.adapters.derived.current(name)
        shell.prepared(name)
        kit.add_adapter(own, "lora", b"z", replace=True)
        await shell.adapters.refresh("lora")
        assert shell.told(ev.ModelReplaced) == [f"ModelReplaced {name}@1"]
        assert shell.adapters.derived.current(name) is old, "until the new one is prepared"
        assert path.exists()
        shell.prepared(f"{name}@1")
        await until(lambda: not path.exists())
        new = shell.adapters.derived.current(name)
        assert new.overlays["unet"].key != old.overlays["unet"].key and not shell.failures()
        assert list(shell.adapters.derived.editions) == [f"{name}@1"]

    play(work)


def test_the_same_again_changes_nothing(own: Store) -> None:
    kit.add_model(own, "base"), kit.add_adapter(own, "lora")

    async def work() -> None:
        shell = await open_shell(own)
        shell.ask("r", "base", ("lora", 1.0))
        kit.add_adapter(own, "lora", base="base", replace=True)  # other notes, equal content
        report = await shell.keeper.rescan()
        assert (report.added, report.replaced, report.removed) == ([], [], [])
        assert shell.told(*CHANGES) == ["ModelAdded base+lora@1.0"]
        assert shell.adapters.book.found["lora"].record.base_model == "base"

    play(work)


def test_a_replaced_base_takes_its_combinations_along(own: Store) -> None:
    kit.add_model(own, "base"), kit.add_adapter(own, "lora"), kit.add_adapter(own, "idle", b"i")

    async def work() -> None:
        shell = await open_shell(own)
        shell.ask("i", "base", ("idle", 1.0))
        idle(shell, "i", "base+idle@1.0")
        shell.ask("r", "base", ("lora", 1.0))
        before = shell.adapters.derived.current("base+lora@1.0")
        shell.machine.events.clear()
        new = kit.add_model(own, "base", b"N", replace=True)
        await shell.keeper.refresh("base")
        assert sorted(shell.told(*CHANGES)) == [
            "ModelRemoved base+idle@1.0", "ModelReplaced base+lora@1.0@1", "ModelReplaced base@1",
        ]  # fmt: skip
        after = shell.adapters.derived.latest["base+lora@1.0"]
        assert after.base_key == "base@1" and after.base.record == new
        assert after.overlays["unet"].base_blob == new.components[-1].blob.sha256
        assert before.overlays["unet"].base_blob in shell.keeper.served.places, "it is being prepared still"
        shell.prepared("base+lora@1.0")
        shell.prepared("base+lora@1.0@1")
        assert before.overlays["unet"].base_blob not in shell.keeper.served.places
        assert shell.adapters.derived.current("base+lora@1.0") is after
        assert shell.failures() == {"i": "cancelled"}

    play(work)


def test_a_base_that_fits_no_more_loses_its_combinations(own: Store) -> None:
    kit.add_model(own, "base"), kit.add_adapter(own, "lora")

    async def work() -> None:
        shell = await open_shell(own)
        shell.ask("r", "base", ("lora", 1.0))
        kit.add_model(own, "base", width=6, replace=True)
        await shell.keeper.refresh("base")
        assert shell.failures() == {"r": "model_removed"}
        shell.ask("s", "base", ("lora", 1.0))
        assert shell.failures()["s"] == "adapter_misfit"

    play(work)


def test_parts_from_a_folder_that_changed_are_not_used_for_combinations(own: Store) -> None:
    kit.add_model(own, "base"), kit.add_adapter(own, "lora")

    async def work() -> None:
        shell = await open_shell(own)
        shell.ask("r", "base", ("lora", 1.0))
        new = kit.add_model(own, "base", b"N", replace=True)
        shell.prepared("base+lora@1.0")  # the stage built it from the new folder
        await until(lambda: shell.keeper.served.records["base"] == new)
        await until(lambda: "base+lora@1.0@1" in shell.adapters.derived.editions)
        assert not shell.machine.residency.models["base+lora@1.0"].is_ready

    play(work)


# -- removed ---------------------------------------------------------------------------------------


def test_removing_an_adapter_waits_for_its_last_user(own: Store) -> None:
    kit.add_model(own, "base")
    record = kit.add_adapter(own, "lora")
    blob = own.blob_path(record.blob.sha256)
    size_bytes = blob.stat().st_size

    async def work() -> None:
        shell = await open_shell(own)
        shell.ask("r", "base", ("lora", 1.0))  # is being prepared, and so in use
        removing = asyncio.ensure_future(shell.adapters.remove("lora"))
        await until(lambda: shell.adapters.is_leaving("lora"))
        await asyncio.sleep(0)
        assert shell.failures() == {"r": "model_removed"}
        shell.ask("s", "base", ("lora", 1.0))
        assert shell.failures()["s"] == "unknown_adapter"
        with pytest.raises(StoreError, match="being removed"):
            await shell.adapters.refresh("lora")
        assert (await shell.keeper.rescan()).added == []
        assert blob.exists() and not removing.done()
        shell.prepared("base+lora@1.0")
        assert await removing == size_bytes
        assert not blob.exists() and not shell.adapters.is_leaving("lora")
        assert shell.told(*CHANGES) == ["ModelAdded base+lora@1.0", "ModelRemoved base+lora@1.0"]

    play(work)


def test_an_adapter_that_nobody_uses_is_deleted_at_once(own: Store) -> None:
    kit.add_model(own, "base")
    size_bytes = own.blob_path(kit.add_adapter(own, "lora").blob.sha256).stat().st_size

    async def work() -> None:
        shell = await open_shell(own)
        assert await shell.adapters.remove("lora") == size_bytes
        assert shell.told(*CHANGES) == [] and not shell.adapters.book.found

    play(work)


def test_a_name_whose_last_user_has_not_gone_gets_a_number(own: Store) -> None:
    """The old model is being prepared when the adapter is gone and back."""
    kit.add_model(own, "base"), kit.add_adapter(own, "lora")

    async def work() -> None:
        shell = await open_shell(own)
        shell.ask("r", "base", ("lora", 1.0))
        kit.remove_adapter(own, "lora")
        assert (await shell.keeper.rescan()).removed == ["lora"]
        kit.add_adapter(own, "lora", b"z")
        assert (await shell.keeper.rescan()).added == ["lora"]
        shell.ask("s", "base", ("lora", 1.0))
        shell.ask("t", "base", ("lora", 1.0))
        assert [info.name for info in shell.added()] == ["base+lora@1.0", "base+lora@1.0#2"]
        shell.prepared("base+lora@1.0")
        assert list(shell.adapters.derived.latest) == ["base+lora@1.0#2"]
        assert shell.failures() == {"r": "model_removed"}

    play(work)


def test_what_is_derived_goes_before_its_base(own: Store) -> None:
    kit.add_model(own, "base"), kit.add_adapter(own, "lora")

    async def work() -> None:
        shell = await open_shell(own)
        shell.ask("r", "base", ("lora", 1.0))
        shell.prepared("base+lora@1.0")
        await shell.keeper.remove("base")
        assert shell.told(ev.ModelRemoved) == ["ModelRemoved base+lora@1.0", "ModelRemoved base"]
        assert shell.failures() == {"r": "model_removed"} and not shell.adapters.derived.editions
        shell.ask("s", "base", ("lora", 1.0))
        shell.ask("t", "lora")
        assert (shell.failures()["s"], shell.failures()["t"]) == ("unknown_model", "adapter_misfit")

    play(work)


def test_the_core_may_forget_a_combination_by_itself(own: Store) -> None:
    kit.add_model(own, "base")
    record = kit.add_adapter(own, "lora")

    async def work() -> None:
        shell = await open_shell(own)
        shell.ask("r", "base", ("lora", 1.0))
        idle(shell, "r", "base+lora@1.0")
        assert record.blob.sha256 in shell.keeper.served.places
        shell.runtime.handle(ev.ModelRemoved("base+lora@1.0"))
        assert "base+lora@1.0" not in shell.adapters.derived
        assert record.blob.sha256 not in shell.keeper.served.places
        assert shell.machine.residency.blobs.keys().isdisjoint([record.blob.sha256])
        shell.ask("s", "base", ("lora", 1.0))
        assert shell.failures() == {"r": "cancelled"} and "base+lora@1.0" in shell.adapters.derived

    play(work)


# -- several stores --------------------------------------------------------------------------------


def test_stores_of_adapters(own: Store, tmp_path: Path) -> None:
    far = Store.open(tmp_path / "far", writable=True)
    kit.add_model(own, "base"), kit.add_adapter(own, "near"), kit.add_adapter(own, "both", b"o")
    kit.add_adapter(far, "both", b"f"), kit.add_adapter(far, "far", b"F"), kit.add_adapter(far, "base", b"B")

    async def work() -> None:
        shell = Shell(own, Store(far.path))
        report = await shell.keeper.rescan()
        assert sorted(report.added) == ["base", "both", "far", "near"]
        assert "model's name" in report.damaged["base"]
        homes = {name: found.home.path.name for name, found in shell.adapters.book.found.items()}
        assert homes == {"near": "own", "both": "own", "far": "far"}
        with pytest.raises(StoreError) as caught:
            await shell.adapters.remove("far")
        assert caught.value.code == "read_only"
        await shell.adapters.remove("both")
        assert shell.adapters.book.found["both"].home.path == far.path, "the one behind it shows"
        away = far.path.rename(tmp_path / "away")
        report = await shell.keeper.rescan()
        assert (report.removed, list(report.away)) == ([], [str(far.path)])
        assert set(shell.adapters.book.found) == {"near", "both", "far"}
        away.rename(far.path)
        kit.remove_adapter(far, "far")
        assert (await shell.keeper.rescan()).removed == ["far"]

    play(work)


def test_a_damaged_adapter_is_served_as_it_was_known(own: Store) -> None:
    kit.add_model(own, "base"), kit.add_adapter(own, "lora"), kit.add_adapter(own, "new", b"n")

    async def work() -> None:
        shell = await open_shell(own)
        for name in ("lora", "new"):
            (own.path / "adapters" / name / "manifest.json").write_text("{")
        shell.adapters.book.put("new", None)
        report = await shell.keeper.rescan()
        assert set(report.damaged) == {"lora", "new"} and set(shell.adapters.book.found) == {"lora"}

    play(work)

"""Admin commands about adapters, and others that meet them; ingest in its own process."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

import lora_kit as kit
from lora_shell_kit import Shell, play, until
from understudy import admin
from understudy.admin import AdminError
from understudyd.core import events as ev
from understudyd.shell import scanning
from understudyd.shell.commands import Commands
from understudyd.shell.ingesting import IngestFailed, ingest, ingest_arguments
from understudyd.shell.timeline import Timeline
from understudyd.store.adapters.cli import build_parser
from understudyd.store.store import Store


@pytest.fixture
def own(tmp_path: Path) -> Store:
    store = Store.open(tmp_path / "own", writable=True)
    kit.add_model(store, "base")
    kit.add_model(store, "wide", width=6)
    kit.add_adapter(store, "lora", base="base", components=("text_encoder", "unet"))
    kit.add_adapter(store, "more", b"m", alpha=1.0)
    return store


class Desk:
    """Commands over a shell; `notes` are what was told meanwhile."""

    def __init__(self, shell: Shell) -> None:
        no_pool: Any = None
        no_daemon: Any = None
        self.notes: list[admin.Note] = []
        self._commands = Commands(shell.runtime, no_pool, Timeline(), no_daemon, time.monotonic)

    async def ask(self, command: admin.Command) -> Any:
        return await self._commands.execute(command, self.notes.append)

    async def refusal(self, command: admin.Command) -> AdminError:
        with pytest.raises(AdminError) as caught:
            await self.ask(command)
        return caught.value


async def open_desk(own: Store) -> tuple[Shell, Desk]:
    shell = Shell(own)
    await shell.keeper.rescan()
    return shell, Desk(shell)


# -- looking ---------------------------------------------------------------------------------------


def test_models_and_loras_are_listed_apart(own: Store) -> None:
    async def work() -> None:
        shell, desk = await open_desk(own)
        shell.ask("r", "base", ("lora", 0.5), ("more", 1.0))
        assert [row["name"] for row in await desk.ask(admin.Models())] == ["base", "wide"]
        document = await desk.ask(admin.Loras())
        lora, more = document["loras"]
        assert (lora["name"], lora["base"], lora["ranks"], lora["tier"]) == ("lora", "base", [2], "disk")
        assert (lora["overlays"], lora["overlays_resident"]) == (2, 0)
        assert (more["base"], more["overlays"], more["requests"], more["last_used_s_ago"]) == ("", 1, 0, None)
        (one,) = document["combinations"]
        overlays = shell.adapters.derived.current("base+lora@0.5+more@1.0").overlays.values()
        assert one["name"] == "base+lora@0.5+more@1.0" and one["base"] == "base"
        assert one["adapters"] == [["lora", 0.5], ["more", 1.0]]
        assert one["size_bytes"] == sum(overlaid.plan.size_bytes for overlaid in overlays)

    play(work)


def test_show_explains_adapters_and_combinations(own: Store) -> None:
    async def work() -> None:
        shell, desk = await open_desk(own)
        shell.ask("r", "base", ("lora", 0.5))
        lora = await desk.ask(admin.Show(name="lora"))
        assert (lora["fits"], lora["weights"], lora["components"]) == (["base"], 4, ["text_encoder", "unet"])
        assert [one["name"] for one in lora["combinations"]] == ["base+lora@0.5"]
        for said in ("base+lora@0.5", "base+lora@.5"):
            shown = await desk.ask(admin.Show(name=said))
            assert shown["name"] == "base+lora@0.5" and shown["waiting"] == 1
        roles = [(part["name"], part["role"]) for part in shown["components"]]
        assert roles == [
            ("text_encoder", "base"), ("text_encoder", "overlay"), ("unet", "base"), ("unet", "overlay"),
            ("lora", "lora"),
        ]  # fmt: skip
        assert (await desk.ask(admin.Show(name="base")))["components"][0]["shared_by"] == [
            "base", "base+lora@0.5", "wide",
        ]  # fmt: skip
        assert (await desk.refusal(admin.Show(name="base+lora@0.75"))).code == "unknown_model"
        assert (await desk.refusal(admin.Show(name="basse"))).code == "unknown_model"

    play(work)


# -- combinations as models ------------------------------------------------------------------------


def test_a_combination_is_loaded_pinned_and_evicted_by_its_name(own: Store) -> None:
    async def work() -> None:
        shell, desk = await open_desk(own)
        name = "base+lora@1.0"
        assert (await desk.ask(admin.Pin(name="base+lora")))["name"] == name
        assert name in shell.machine.residency.pinned
        assert (await desk.ask(admin.Pin(name="lora")))["name"] == name, "alone it means the same"
        assert (await desk.ask(admin.Unpin(name=name)))["pinned"] is False
        assert (await desk.ask(admin.Load(name=name, wait=False)))["name"] == name
        assert (await desk.ask(admin.Evict(name=name)))["name"] == name
        refused = {
            "base+nobody": "unknown_adapter", "wide+lora": "adapter_misfit", "nobody+lora": "unknown_model",
        }  # fmt: skip
        for said, code in refused.items():
            assert (await desk.refusal(admin.Pin(name=said))).code == code

    play(work)


def test_what_is_set_or_removed_is_a_model(own: Store) -> None:
    async def work() -> None:
        shell, desk = await open_desk(own)
        shell.ask("r", "base", ("lora", 1.0))
        for command in (admin.Remove(name="base+lora@1.0"), admin.Set(name="base+lora@1.0", max_batch=2)):
            assert (await desk.refusal(command)).code == "unknown_model"
        assert "remove-lora" in str(await desk.refusal(admin.Remove(name="lora")))
        await desk.ask(admin.Set(name="base", max_batch=3))
        assert shell.machine.residency.models["base+lora@1.0"].max_batch == 3
        shell.ask("s", "base", ("lora", 2.0))
        assert shell.machine.residency.models["base+lora@2.0"].max_batch == 3

    play(work)


def test_remove_lora(own: Store) -> None:
    async def work() -> None:
        shell, desk = await open_desk(own)
        assert (await desk.ask(admin.RemoveLora(name="more")))["freed_bytes"] > 0
        assert (await desk.refusal(admin.RemoveLora(name="more"))).code == "unknown_adapter"
        assert "did you mean 'lora'" in str(await desk.refusal(admin.RemoveLora(name="loar")))
        shell.ask("r", "base", ("lora", 1.0))
        shell.prepared("base+lora@1.0")
        removed = await desk.ask(admin.RemoveLora(name="lora"))
        assert removed["name"] == "lora" and shell.told(ev.ModelRemoved) == ["ModelRemoved base+lora@1.0"]

    play(work)


def test_a_base_that_is_removed_takes_its_adapters_use_along(own: Store) -> None:
    """Both fitted it alone; what could not be asked for before is not told."""

    async def work() -> None:
        _, desk = await open_desk(own)
        removed = await desk.ask(admin.Remove(name="base"))
        assert removed["warning"] == "; ".join(
            f"no model here fits the adapter {name!r}; add the base model it was made for"
            for name in ("lora", "more")
        )
        assert "warning" not in await desk.ask(admin.Remove(name="wide"))

    play(work)


def test_no_warning_while_another_base_takes_over(own: Store) -> None:
    async def work() -> None:
        for name in ("twin", "triplet"):
            kit.add_model(own, name)
        _, desk = await open_desk(own)
        removed = await desk.ask(admin.Remove(name="base"))
        assert "the adapter 'lora' fits 2 models (triplet, twin); name one" in removed["warning"]
        assert "'more'" not in removed["warning"], "it had to be told a model before, too"
        assert "warning" not in await desk.ask(admin.Remove(name="twin")), "one is left, and no choice"

    play(work)


# -- adding ----------------------------------------------------------------------------------------


def test_the_command_becomes_words_that_ingest_understands(tmp_path: Path) -> None:
    command = admin.AddLora(
        source="/loras", name="--x", base="b", name_prefix="p-", revision="v", weight_name="w", replace=True
    )
    parsed = build_parser().parse_args(["--store", "/s", *ingest_arguments(command)])
    assert (parsed.source, parsed.name, parsed.base, parsed.name_prefix) == ("/loras", "--x", "b", "p-")
    assert (parsed.revision, parsed.weight_name, parsed.replace) == ("v", "w", True)
    bare = build_parser().parse_args(["--store", "/s", *ingest_arguments(admin.AddLora(source="org/x"))])
    assert (bare.source, bare.name, bare.base, bare.name_prefix, bare.replace) == (
        "org/x",
        None,
        None,
        "",
        False,
    )


def test_the_ingest_process_reports_what_it_cannot_find(own: Store) -> None:
    async def work() -> None:
        with pytest.raises(IngestFailed) as caught:
            await ingest(own.path, admin.AddLora(source="/nowhere/x.safetensors"), lambda note: None)
        assert caught.value.code == "not_found"
        assert f"understudyd ingest-lora --store {own.path}" in str(caught.value)

    play(work)


def test_each_lora_is_served_as_soon_as_it_is_there(own: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is played: one is added, one replaced, one refused, one went before it could be served."""

    async def ingest(store: Path, command: admin.AddLora, on_note: Any, read_only: list[Path]) -> Any:
        assert command.source == "/loras"
        kit.add_adapter(own, "new", b"n")
        kit.add_adapter(own, "more", b"M", replace=True)
        for outcome, name in (
            ("added", "new"),
            ("replaced", "more"),
            ("unchanged", "lora"),
            ("added", "gone"),
        ):
            on_note(admin.Note(phase=name, done=1, total=4))
            result = admin.ScanResult(outcome=outcome, path=f"/loras/{name}", name=name)  # type: ignore[arg-type]
            on_note(admin.Note(phase=outcome, result=result))
            await asyncio.sleep(0)
        refused = admin.ScanResult(outcome="refused", path="/loras/dora", name="dora", code="not_plain_lora")
        on_note(admin.Note(phase="refused", result=refused))
        return {"results": []}

    monkeypatch.setattr(scanning, "ingest", ingest)

    async def work() -> None:
        shell, desk = await open_desk(own)
        before = shell.adapters.book.found["more"].record
        document = await desk.ask(admin.AddLora(source="/loras"))
        assert {result.name: (result.outcome, result.code) for result in document["results"]} == {
            "new": ("added", ""), "more": ("replaced", ""), "lora": ("unchanged", ""),
            "gone": ("refused", "not_found"), "dora": ("refused", "not_plain_lora"),
        }  # fmt: skip
        assert set(shell.adapters.book.found) == {"lora", "more", "new"}
        assert shell.adapters.book.found["more"].record.content != before.content
        assert sum(note.result is not None for note in desk.notes) == 5
        shell.ask("r", "base", ("new", 1.0))
        await until(lambda: "base+new@1.0" in shell.adapters.derived)

    play(work)

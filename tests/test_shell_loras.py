"""Requests with adapters: which model they become, what the core and the stage are told, what is refused."""

import math
from pathlib import Path

import pytest

import lora_kit as kit
from lora_shell_kit import Shell, play
from understudy.wire import Accepted, Adapter, Finished, Generate
from understudyd.config import Config, ConfigError, StartupConfig, StoreConfig, check_startup
from understudyd.core import actions as ac
from understudyd.core import events as ev
from understudyd.core.types import BlobInfo
from understudyd.shell.derived import derived_name, parse_name
from understudyd.shell.forecast_file import ForecastFile
from understudyd.shell.start_up import StartUp
from understudyd.store.store import Store


@pytest.fixture
def own(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "own", writable=True)


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "adapters", [[("a", 1.0)], [("a", 0.1), ("b-2.x", -3e-9)], [("b", 1 / 3), ("a", 100.0)]], ids=str
)
def test_a_derived_models_name_says_what_it_is(adapters: list[tuple[str, float]]) -> None:
    wanted = tuple(Adapter(*pair) for pair in adapters)
    assert parse_name(derived_name("base", wanted)) == ("base", wanted)


def test_short_names_and_names_that_are_none() -> None:
    assert derived_name("base", [Adapter("a", 0.8), Adapter("b")]) == "base+a@0.8+b@1.0"
    assert parse_name("base+a+b@2") == ("base", (Adapter("a", 1.0), Adapter("b", 2.0)))
    assert parse_name("base") is parse_name("base+a@much") is parse_name("base+a@1.0#2") is None


# -- what a request becomes ------------------------------------------------------------------------


def test_the_core_hears_of_the_model_before_the_request(own: Store) -> None:
    model = kit.add_model(own, "base")
    one, two = (
        kit.add_adapter(own, "one", components=("text_encoder", "unet")),
        kit.add_adapter(own, "two", b"c"),
    )

    async def work() -> None:
        shell = Shell(own)
        await shell.keeper.rescan()
        before = len(shell.machine.events)
        shell.ask("r", "base", ("one", 0.5), ("two", 2.0))
        added, received = shell.machine.events[before:]
        assert isinstance(added, ev.ModelAdded) and isinstance(received, ev.RequestReceived)
        info, name = added.model, "base+one@0.5+two@2.0"
        assert received.request.model == info.name == info.key == name and info.is_derived
        text, unet = (BlobInfo(c.blob.sha256, c.blob.size_bytes) for c in model.components)
        loras = {r.name: BlobInfo(r.blob.sha256, r.blob.size_bytes) for r in (one, two)}
        assert info.blobs[:2] == (text, unet)
        over_text, over_unet = info.blobs[2:]
        assert over_text.made_of == (text, loras["one"])
        assert over_unet.made_of == (unet, loras["one"], loras["two"])
        overlays = shell.adapters.derived.current(name).overlays
        assert [o.key for o in overlays.values()] == [over_text.key, over_unet.key]
        for overlaid, blob in zip(overlays.values(), (over_text, over_unet), strict=True):
            assert overlaid.plan.size_bytes == blob.size_bytes
            assert overlaid.plan.key(overlaid.base_blob) == overlaid.key

    play(work)


def test_one_combination_is_one_model_and_order_and_scale_tell_others_apart(own: Store) -> None:
    kit.add_model(own, "base")
    kit.add_adapter(own, "a"), kit.add_adapter(own, "b", b"b")

    async def work() -> None:
        shell = Shell(own)
        await shell.keeper.rescan()
        for number in range(3):
            shell.ask(f"r{number}", "base", ("a", 1.0), ("b", 1.0))
        shell.ask("s", "base+a@1.0", ("b", 1.0))  # another way to say it
        shell.ask("t", "base", ("b", 1.0), ("a", 1.0))
        shell.ask("u", "base", ("a", 1.0), ("b", math.nextafter(1.0, 2.0)))
        keys = [info.blobs[-1].key for info in shell.added()]
        assert len(keys) == len(set(keys)) == 3
        assert not shell.failures()

    play(work)


def test_two_adapters_of_one_blob_are_one_source_and_count_twice(own: Store) -> None:
    """Here with other alphas: the blob is the same, what it does is not."""
    kit.add_model(own, "base")
    one, two = kit.add_adapter(own, "a"), kit.add_adapter(own, "b", alpha=3.0)
    assert one.blob == two.blob and one.content != two.content

    async def work() -> None:
        shell = Shell(own)
        await shell.keeper.rescan()
        wishes = [("a", "b"), ("b", "a"), ("a",), ("b",)]
        for number, wish in enumerate(wishes):
            shell.ask(f"r{number}", "base", *((name, 1.0) for name in wish))
        overlays = [info.blobs[-1] for info in shell.added()]
        assert len({overlay.key for overlay in overlays}) == len(wishes)
        for overlay in overlays:
            assert overlay.made_of[1:] == (BlobInfo(one.blob.sha256, one.blob.size_bytes),)
        assert {overlay.size_bytes for overlay in overlays} == {overlays[0].size_bytes}
        plan = shell.adapters.derived.plan(overlays[0].key)
        assert [applied.record.name for applied in plan.adapters] == ["a", "b"]
        assert all(len(weight.terms) == 2 for weight in plan.weights)
        for info in shell.added():
            shell.prepared(info.key)
            shell.runtime.handle(ev.ModelRemoved(info.name))
        assert one.blob.sha256 not in shell.machine.residency.blobs
        assert not shell.adapters.derived.is_adapter(one.blob.sha256)

    play(work)


def test_what_cannot_be_had_is_refused_and_the_core_hears_nothing(own: Store) -> None:
    kit.add_model(own, "base"), kit.add_model(own, "wide", width=6)
    kit.add_adapter(own, "pixel-art", base="base")

    async def work() -> None:
        shell = Shell(own)
        await shell.keeper.rescan()
        before = len(shell.machine.events)
        shell.ask("typo", "base", ("pixel-rat", 1.0))
        shell.ask("misfit", "wide", ("pixel-art", 1.0))
        shell.ask("twice", "base", ("pixel-art", 1.0), ("pixel-art", 0.5))
        shell.ask("as-base", "base", ("base", 1.0))
        assert shell.failures() == {
            "typo": "unknown_adapter", "misfit": "adapter_misfit", "twice": "adapter_misfit",
            "as-base": "unknown_adapter",
        }  # fmt: skip
        assert "did you mean 'pixel-art'" in shell.failure("typo").message
        assert "unet.w0.weight" in shell.failure("misfit").message
        assert not any(reply.retryable for reply in map(shell.failure, shell.failures()))
        assert len(shell.machine.events) == before and not shell.runtime.pending
        assert shell.runtime.tally.failed["unknown_adapter"] == 2
        shell.ask("nobody", "nobody", ("pixel-art", 1.0))
        assert shell.failures()["nobody"] == "unknown_model"

    play(work)


# -- an adapter's name alone -----------------------------------------------------------------------


def test_an_adapter_alone_is_used_with_its_own_base(own: Store) -> None:
    for name in ("one", "two"):
        kit.add_model(own, name, name[:1].encode())
    kit.add_adapter(own, "lora", base="two")
    kit.add_adapter(own, "more", b"m")

    async def work() -> None:
        shell = Shell(own)
        await shell.keeper.rescan()
        shell.ask("r", "lora")
        shell.ask("s", "lora", ("more", 0.5))
        assert [info.name for info in shell.added()] == ["two+lora@1.0", "two+lora@1.0+more@0.5"]

    play(work)


def test_an_adapter_alone_without_a_base_of_its_own(own: Store) -> None:
    kit.add_model(own, "wide", width=6)
    kit.add_adapter(own, "lora", base="gone")

    async def work() -> None:
        shell = Shell(own)
        await shell.keeper.rescan()
        shell.ask("none", "lora")
        assert shell.failures() == {"none": "adapter_misfit"}
        kit.add_model(own, "one", b"1")
        await shell.keeper.refresh("one")
        shell.ask("only", "lora")
        assert [info.name for info in shell.added()] == ["one+lora@1.0"]
        kit.add_model(own, "two", b"2")
        await shell.keeper.refresh("two")
        shell.ask("open", "lora")
        assert shell.failures()["open"] == "bad_request"
        assert "one, two" in shell.failure("open").message and "wide" not in shell.failure("open").message

    play(work)


# -- the stage -------------------------------------------------------------------------------------


def test_the_stage_gets_its_work_when_it_stands(own: Store) -> None:
    kit.add_model(own, "base"), kit.add_adapter(own, "lora")

    async def work() -> None:
        shell = Shell(own)
        await shell.keeper.rescan()
        shell.ask("r", "base", ("lora", 0.5))
        derived = shell.adapters.derived.current("base+lora@0.5")
        (overlaid,) = derived.overlays.values()
        sources = ((overlaid.base_blob, 0), (derived.found[0].record.blob.sha256, 8192))
        shell.machine.next += [
            ac.Fold(overlaid.key, 16384, overlaid.plan.size_bytes, 7, sources),
            ac.CancelFold(overlaid.key, 7),
        ]
        shell.runtime.handle(ev.Ticked())
        shell.runtime.handle(ev.Ticked())
        assert shell.stage.calls == []
        shell.runtime.attach_stage(shell.stage)
        assert shell.stage.calls == [
            ("prepare_derived", "base+lora@0.5", "base", derived.overlays),
            ("fold", overlaid.key, 7, 16384, overlaid.plan, sources),
            ("cancel_fold", overlaid.key, 7),
        ]
        shell.ask("plain", "base")
        assert shell.stage.calls[-1] == ("prepare_model", "base")

    play(work)


def test_adapters_have_no_views(own: Store) -> None:
    kit.add_model(own, "base"), kit.add_adapter(own, "lora")

    async def work() -> None:
        shell = Shell(own)
        await shell.keeper.rescan()
        shell.runtime.attach_stage(shell.stage)
        shell.ask("r", "base", ("lora", 0.5))
        derived = shell.adapters.derived.current("base+lora@0.5")
        lora, unet = derived.found[0].record.blob.sha256, derived.base.record.components[-1].blob.sha256
        shell.machine.next += [ac.BuildViews(lora, 0, 3), ac.BuildViews(unet, 8192, 4)]
        shell.runtime.handle(ev.Ticked())
        shell.runtime.handle(ev.Ticked())
        assert shell.stage.named("build_views") == [(unet,)]
        assert ev.ViewsBuilt(lora, 3) in shell.machine.events

    play(work)


def test_the_answer_says_what_was_folded_and_everything_is_counted(own: Store) -> None:
    kit.add_model(own, "base"), kit.add_adapter(own, "lora", base="base"), kit.add_adapter(own, "more", b"m")

    async def work() -> None:
        shell = Shell(own)
        await shell.keeper.rescan()
        shell.runtime.attach_stage(shell.stage)
        shell.ask("r", "lora", ("more", 0.5))
        shell.machine.next.append(ac.AnswerRequest("ann/r"))
        shell.runtime.handle(ev.Ticked())
        (finished,) = [reply for reply in shell.replies if isinstance(reply, Finished)]
        assert (finished.id, finished.model) == ("r", "lora")
        assert finished.adapters == (Adapter("lora", 1.0), Adapter("more", 0.5))
        used = {"base": 1, "lora": 1, "more": 1, "base+lora@1.0+more@0.5": 1}
        assert shell.runtime.tally.by_name == used

    play(work)


def test_the_daemons_own_requests_may_name_adapters(own: Store) -> None:
    kit.add_model(own, "base")

    async def work() -> None:
        shell = Shell(own)
        await shell.keeper.rescan()
        with pytest.raises(Exception, match="bad_request: adapter 'x' unknown"):
            await shell.runtime.run(Generate(id="w", model="base", seed=0, adapters=(Adapter("x"),)))

    play(work)


def test_a_load_of_an_adapter_finds_its_file(own: Store, tmp_path: Path) -> None:
    """Also where base and adapter are in different stores."""
    far = Store.open(tmp_path / "far", writable=True)
    kit.add_model(own, "base")
    record = kit.add_adapter(far, "lora")

    async def work() -> None:
        shell = Shell(own, Store(far.path))
        await shell.keeper.rescan()
        shell.ask("r", "base", ("lora", 1.0))
        sha256 = record.blob.sha256
        shell.machine.next.append(ac.StartLoad(99, 1, sha256, 0, record.blob.size_bytes, 1))
        shell.runtime.handle(ev.Ticked())
        ((_, label, path),) = shell.pool.loads
        assert (label, path) == ("lora lora", far.blob_path(sha256))

    play(work)


def test_clients_see_models_then_adapters_and_no_combinations(own: Store) -> None:
    kit.add_model(own, "base"), kit.add_adapter(own, "lora", base="base"), kit.add_adapter(own, "more", b"m")

    async def work() -> None:
        shell = Shell(own)
        await shell.keeper.rescan()
        shell.ask("r", "base", ("lora", 1.0))
        entries = shell.runtime.models()
        assert [(e.name, e.kind, e.base, e.tier) for e in entries] == [
            ("base", "model", "", "disk"), ("lora", "lora", "base", "disk"), ("more", "lora", "", "disk"),
        ]  # fmt: skip
        assert entries[1].pipeline == kit.FAMILY and entries[1].size_bytes > 0

    play(work)


# -- an earlier life, and the start ----------------------------------------------------------------


def test_combinations_of_an_earlier_life_are_known_again(own: Store, tmp_path: Path) -> None:
    kit.add_model(own, "base"), kit.add_adapter(own, "lora"), kit.add_adapter(own, "gone", b"g")

    async def live() -> Shell:
        shell = Shell(own)
        await shell.keeper.rescan()
        file = ForecastFile(tmp_path, shell.machine, revive=shell.adapters.revive)
        await file.read()
        file.start()
        if not shell.added():
            for number in range(5):
                shell.ask(f"r{number}", "base", ("lora", 0.5))
            shell.ask("g", "base", ("gone", 1.0))
        await file.close()
        return shell

    async def work() -> None:
        before = await live()
        kit.remove_adapter(own, "gone")
        after = await live()
        name = "base+lora@0.5"
        assert [info.name for info in after.added()] == [name]
        assert after.machine.forecast.chance(name) == pytest.approx(before.machine.forecast.chance(name), 0.1)
        assert not after.runtime.pending

    play(work)


def test_combinations_may_be_chosen_for_the_start(own: Store) -> None:
    (
        kit.add_model(own, "base"),
        kit.add_adapter(own, "lora", base="base"),
        kit.add_model(own, "other", width=6),
    )

    async def work() -> None:
        shell = Shell(own)
        await shell.keeper.rescan()
        chosen = StartupConfig(models=("base+lora@0.5", "lora", "base+gone", "nobody"), prompts=("x",))
        start_up = StartUp(shell.runtime, Config(startup=chosen), lambda status: None)
        combinations = {"base+lora@0.5", "base+lora@1.0"}
        assert start_up.load_ahead() == combinations | {"other"}, "the other architecture is warmed up"
        assert {info.name for info in shell.added()} == combinations
        assert start_up.missing == {"base+gone": "unknown_adapter", "nobody": "unknown"}

    play(work)


def test_the_configuration_check_knows_combinations(own: Store) -> None:
    kit.add_model(own, "base"), kit.add_adapter(own, "lora")

    def check(*models: str) -> None:
        check_startup(Config(store=StoreConfig(path=own.path), startup=StartupConfig(models=models)))

    check("base", "base+lora@0.5", "lora")
    with pytest.raises(ConfigError, match="'gone' unknown"):
        check("base+gone@0.5")


# -- several at once -------------------------------------------------------------------------------


def test_what_comes_together_is_taken_in_at_once_and_looked_at_once(own: Store) -> None:
    kit.add_model(own, "base")
    kit.add_adapter(own, "one", components=("unet",))

    async def work() -> None:
        shell = Shell(own)
        await shell.keeper.rescan()
        before = len(shell.machine.events)
        with shell.runtime.together():
            for name in ("r", "s"):
                shell.ask(name, "base", ("one", 0.5))  # the second finds the model that the first one made
            assert len(shell.added()) == 1 and shell.machine.is_unsettled
            assert [type(reply) for reply in shell.replies] == [Accepted, Accepted]
            assert not shell.stage.calls
        kinds = [type(event) for event in shell.machine.events[before:]]
        assert kinds == [ev.ModelAdded, ev.RequestReceived, ev.RequestReceived, ev.Ticked]
        assert not shell.machine.is_unsettled

    play(work)

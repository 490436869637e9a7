"""LoRAs through the real daemon: added while it serves, folded, evicted, replaced, removed."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

import adapter_kit as kit
import understudy
from adapter_kit import Making
from daemon_kit import DaemonProcess, running_daemon
from family_kit import Family, distance, pixels
from ingest_kit import single_threaded
from input_kit import mask, picture
from lora_family_kit import OPTIONS, PROMPT, REFERENCE, Applied, Loras
from understudy import admin
from understudy.ctl import main as ctl
from understudy_demo import tiny
from understudyd.store.adapters.shelf import AdapterShelf
from understudyd.store.store import Store


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    yield from single_threaded()


@pytest.fixture(scope="module")
def loras(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Loras:
    loras = Loras(tmp_path_factory.mktemp("loras"), family.folders["sd-c"])
    loras.write_dora()
    return loras


@pytest.fixture(scope="module")
def store(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(family.store, tmp_path_factory.mktemp("lora") / "store"))


@pytest.fixture(scope="module")
def added(store: Path, loras: Loras, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon to which the folder was added while it served; room for a few combinations only."""
    more: dict[str, Any] = {"stage": {"warm_up": False}, "policy": {"decisions": 500}}
    with running_daemon(store, tmp_path_factory.mktemp("run"), arena="12MiB", **more) as daemon:
        words = ["add-lora", str(loras.folder), "--base", "sd-c", "-o", "json"]
        told = CliRunner().invoke(ctl, ["--socket", str(daemon.admin_socket), *words])
        assert told.exit_code == 1, "one was refused"
        outcomes = {r["name"]: (r["outcome"], r["code"]) for r in json.loads(told.stdout)["results"]}
        assert outcomes == {
            "plain": ("added", ""), "whole": ("added", ""), "kohya": ("added", ""),
            "dora": ("refused", "not_plain_lora"),
        }  # fmt: skip
        yield daemon


@pytest.fixture
def client(added: DaemonProcess) -> Iterator[understudy.Client]:
    with understudy.Client(endpoint=added.endpoint) as client:
        yield client


def image(client: understudy.Client, model: str, adapters: Applied = (), **more: Any) -> bytes:
    result = client.generate(model, PROMPT, adapters=list(adapters), **(OPTIONS | more))
    return pixels(result.images[0])


CASES: list[Applied] = [
    [("plain", 1.0)],
    [("whole", 0.7)],
    [("plain", 0.5), ("kohya", 1.3)],
    [("kohya", 1.3), ("plain", 0.5)],
    [("whole", -0.4), ("plain", 0.25), ("kohya", 1.0)],
]


def test_every_image_is_diffusers_there_and_back(
    client: understudy.Client, loras: Loras, family: Family
) -> None:
    base = family.reference("sd-c", prompt=PROMPT, seed=7, **REFERENCE)[0]
    expected = [loras.image(case) for case in CASES]
    assert len({base, *expected}) >= len(CASES), "the images must differ, but for the one in another order"
    for order in (range(len(CASES)), reversed(range(len(CASES)))):
        for number in order:
            assert image(client, "sd-c", CASES[number]) == expected[number], CASES[number]
            assert image(client, "sd-c") == base, "the base is as it was"


def test_a_lora_alone_is_a_model(client: understudy.Client, loras: Loras) -> None:
    result = client.generate("plain", PROMPT, **OPTIONS)
    assert pixels(result.images[0]) == loras.image([("plain", 1.0)])
    assert result.model == "plain" and result.adapters == (understudy.Adapter("plain", 1.0),)


def test_every_task_takes_adapters(client: understudy.Client, loras: Loras) -> None:
    applied = [("whole", 0.7), ("plain", 0.5)]
    fused, size = loras.fused(applied), {"width": 32, "height": 32}
    inputs, mask_image = {"image": picture(1)}, mask()
    asked: dict[str, Any] = {"adapters": applied, "seed": 7, "steps": 4, "guidance": 5.0}

    def made(**more: Any) -> list[bytes]:
        return [pixels(image) for image in client.generate("sd-c", PROMPT, **asked, **more).images]

    several = made(images=3, **size)
    assert several == loras.images(fused, steps=4, num_images_per_prompt=3, **size)
    assert len(set(several)) == 3
    image_to_image = AutoPipelineForImage2Image.from_pipe(fused)
    assert made(**inputs) == loras.images(image_to_image, steps=4, **inputs)
    inpainting = AutoPipelineForInpainting.from_pipe(fused)
    expected = loras.images(inpainting, steps=4, mask_image=mask_image, **inputs, **size)
    assert made(mask=mask_image, **inputs, **size) == expected


def test_more_combinations_than_fit_are_all_right(client: understudy.Client, loras: Loras) -> None:
    """Forty combinations at once, and other models between them, in an arena for a few."""
    scales = [round(0.1 * number, 1) for number in range(1, 21)]
    wishes = [
        understudy.Request(
            model="sd-c", prompt=PROMPT, adapters=[(name, scale)], request_id=f"{name}-{scale}", **OPTIONS
        )
        for scale in scales
        for name in ("plain", "kohya")
    ]
    others = [
        understudy.Request(model=m, prompt=PROMPT, request_id=m, **OPTIONS) for m in ("sd-a", "sd-b", "xl")
    ]
    wishes[5:5], wishes[20:20], wishes[30:30] = others[:1], others[1:2], others[2:]
    made = {result.id: result for result in client.generate_many(wishes, in_flight=len(wishes))}
    assert len(made) == len(wishes)
    for name, scale in (("plain", 0.3), ("kohya", 2.0), ("kohya", 1.1)):
        result = made[f"{name}-{scale}"]
        assert isinstance(result, understudy.Result)
        assert pixels(result.images[0]) == loras.image([(name, scale)])


def test_what_cannot_be_had_is_told_by_type(client: understudy.Client) -> None:
    with pytest.raises(understudy.UnknownAdapter, match="did you mean 'plain'"):
        client.generate("sd-c", PROMPT, adapters=["plian"], **OPTIONS)
    with pytest.raises(understudy.AdapterMisfit, match=r"unet\."):
        client.generate("xl", PROMPT, adapters=["plain"], **OPTIONS)
    with pytest.raises(understudy.AdapterMisfit, match="twice"):
        client.generate("sd-c", PROMPT, adapters=["plain", "plain"], **OPTIONS)


def test_operators_see_loras_and_combinations_and_pin_them(
    added: DaemonProcess, client: understudy.Client
) -> None:
    name = "sd-c+plain@0.5"
    assert added.ask(admin.Load(name=name))["tier"] in ("resident", "bound")
    added.ask(admin.Pin(name=name))
    document = added.ask(admin.Loras())
    assert [lora["name"] for lora in document["loras"]] == ["kohya", "plain", "whole"]
    assert {lora["base"] for lora in document["loras"]} == {"sd-c"}
    (one,) = [c for c in document["combinations"] if c["name"] == name]
    assert one["tier"] in ("resident", "bound") and one["pinned"] and one["size_bytes"] > 0
    shown = added.ask(admin.Show(name=name))
    (overlay,) = [part for part in shown["components"] if part["role"] == "overlay"]
    assert (overlay["tier"], overlay["made_of"]) == ("resident", [["plain", 0.5]])
    assert 0 < overlay["fold_s"] < 5 and 0 <= overlay["chance_next"] <= 1
    assert added.ask(admin.Show(name="plain"))["fits"] == ["sd-a", "sd-b", "sd-c", "sd-half"]
    assert name not in [model["name"] for model in added.ask(admin.Models())]
    for scale in (0.1, 0.2, 0.3, 0.4):
        image(client, "sd-c", [("kohya", scale)])
    assert added.ask(admin.Show(name=name))["tier"] in ("resident", "bound")
    added.ask(admin.Unpin(name=name))
    for view in (["loras"], ["show", "plain"], ["show", name], ["status"]):
        told = CliRunner().invoke(ctl, ["--socket", str(added.admin_socket), *view])
        assert told.exit_code == 0, told.output
        assert view == ["status"] or "plain" in told.stdout
    assert added.ask(admin.Show(arena=True))["tensors_outside"] == []


def test_batches_of_one_combination(added: DaemonProcess, client: understudy.Client, loras: Loras) -> None:
    added.ask(admin.Set(name="sd-c", max_batch=4))
    try:
        wishes = [
            understudy.Request(model="sd-c", prompt=PROMPT, adapters=["plain"], **(OPTIONS | {"seed": seed}))
            for seed in range(4)
        ]
        made = list(client.generate_many(wishes))
        assert len(made) == 4
        for result in made:
            assert isinstance(result, understudy.Result)
            assert distance([pixels(result.images[0])], [loras.image([("plain", 1.0)], result.seed)]) <= 1
    finally:
        added.ask(admin.Set(name="sd-c", max_batch=1))


def put(daemon: DaemonProcess, store: Path, loras: Loras, name: str) -> str:
    """Add a LoRA to the store beside the daemon, and have it look: cheaper than a process for each."""
    loras.add(store, name)
    report = daemon.ask(admin.Rescan())
    return next(change for change in ("added", "replaced") if name in report[change])


def test_a_replaced_lora_is_another_from_then_on(
    added: DaemonProcess, client: understudy.Client, loras: Loras, store: Path
) -> None:
    pipeline = tiny.stable_diffusion(3)
    loras.write("changing", kit.make_adapter(pipeline, Making({"unet": ("to_q",)}, seed=8)))
    assert put(added, store, loras, "changing") == "added"
    before = image(client, "changing")
    assert before == loras.image([("changing", 1.0)])
    loras.write("changing", kit.make_adapter(pipeline, Making({"unet": ("to_v",)}, seed=9)))
    assert put(added, store, loras, "changing") == "replaced"
    assert image(client, "changing") == loras.image([("changing", 1.0)]) != before


def test_weights_that_are_not_finite_are_the_callers_fault(
    added: DaemonProcess, client: understudy.Client, loras: Loras, store: Path
) -> None:
    made = kit.make_adapter(tiny.stable_diffusion(3), Making({"unet": ("to_q",)}, seed=11))
    for factor in made.layers["unet"].values():
        factor.mul_(1e30)  # finite itself: it is the product that overflows
    loras.write("broken", made)
    put(added, store, loras, "broken")
    for _ in range(2):
        with pytest.raises(understudy.CallerError, match="finite") as caught:
            client.generate("sd-c", PROMPT, adapters=["broken"], **OPTIONS)
        assert caught.value.code == "bad_request"
    assert image(client, "sd-c", [("plain", 1.0)]) == loras.image([("plain", 1.0)])


def test_a_removed_lora_serves_who_runs_and_nobody_after(
    added: DaemonProcess, client: understudy.Client, loras: Loras, store: Path
) -> None:
    pipeline = tiny.stable_diffusion(3)
    loras.write("leaving", kit.make_adapter(pipeline, Making({"unet": ("to_k",)}, seed=10)))
    assert put(added, store, loras, "leaving") == "added"
    blob = Store(store).blob_path(AdapterShelf(Store(store)).adapter("leaving").blob.sha256)
    handle = client.submit("leaving", PROMPT, **(OPTIONS | {"steps": 60}))
    next(event for event in handle.events() if isinstance(event, understudy.Progress))
    document = added.ask(admin.RemoveLora(name="leaving"), timeout_s=120)
    assert handle.result().images, "it ran to its end"
    assert document["freed_bytes"] > 0 and not blob.exists()
    with pytest.raises(understudy.UnderstudyError) as caught:
        client.generate("leaving", PROMPT, **OPTIONS)
    assert caught.value.code == "unknown_model"
    with pytest.raises(understudy.UnknownAdapter):
        client.generate("sd-c", PROMPT, adapters=["leaving"], **OPTIONS)

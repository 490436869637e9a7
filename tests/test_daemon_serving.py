"""Through the real daemon, loaders and client: what is served equals plain diffusers, bit for bit."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import understudy
from daemon_kit import DaemonProcess, running_daemon
from family_kit import Family, pixels
from understudy import admin

PROMPT = "a red circle on blue"
SETTINGS = {"num_inference_steps": 2, "width": 32, "height": 32, "guidance_scale": 5.0}


@pytest.fixture(scope="module")
def daemon(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """Room for about two of the six models, so that serving them all evicts."""
    with running_daemon(family.store, tmp_path_factory.mktemp("run"), arena="12MiB") as daemon:
        yield daemon


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[understudy.Client]:
    with understudy.Client(endpoint=daemon.endpoint) as client:
        yield client


def ask(client: understudy.Client, model: str, seed: int = 7, **more: object) -> understudy.Result:
    options = {"steps": 2, "width": 32, "height": 32, "guidance": 5.0} | more
    return client.generate(model, PROMPT, seed=seed, **options)


def test_every_model_there_and_back_equals_diffusers(client: understudy.Client, family: Family) -> None:
    names = sorted(family.folders)
    expected = {name: family.reference(name, prompt=PROMPT, seed=7, **SETTINGS) for name in names}
    assert len({images[0] for images in expected.values()}) == len(names), "the models must differ"
    for name in [*names, *reversed(names)]:
        result = ask(client, name)
        assert [pixels(image) for image in result.images] == expected[name], name
        assert result.model == name and result.seed == 7


def test_negative_prompt_and_several_images_equal_diffusers(
    client: understudy.Client, family: Family
) -> None:
    more = {"negative_prompt": "blur", "images": 2}
    expected = family.reference("sd-c", prompt=PROMPT, seed=3, **SETTINGS, **more)
    result = ask(client, "sd-c", seed=3, **more)
    assert [pixels(image) for image in result.images] == expected


def test_pipeline_defaults_are_diffusers_defaults(client: understudy.Client, family: Family) -> None:
    expected = family.reference("sd-a", prompt=PROMPT, seed=1, num_inference_steps=1)
    assert [pixels(i) for i in client.generate("sd-a", PROMPT, seed=1, steps=1).images] == expected


def test_a_burst_over_all_models_gives_every_one_its_own_image(daemon: DaemonProcess, family: Family) -> None:
    names = sorted(family.folders)
    expected = {name: family.reference(name, prompt=PROMPT, seed=7, **SETTINGS)[0] for name in names}

    async def burst() -> list[understudy.Result]:
        async with understudy.AsyncClient(endpoint=daemon.endpoint) as client:
            options = {"seed": 7, "steps": 2, "width": 32, "height": 32, "guidance": 5.0}
            return await asyncio.gather(*(client.generate(n, PROMPT, **options) for n in names * 4))

    results = asyncio.run(burst())
    assert [pixels(r.images[0]) == expected[r.model] for r in results] == [True] * len(names) * 4
    timings = [r.timings for r in results]
    for t in timings:
        assert t.queued_s + t.switch_s + t.run_s + t.encode_s == pytest.approx(t.total_s, abs=1e-6)
        assert min(t.queued_s, t.switch_s, t.run_s, t.encode_s) >= 0
    already_bound = 3  # at most one model of each of the three architectures, since warm-up or the last test
    assert sum(r.switched for r in results) >= len(names) - already_bound


def test_progress_comes_in_order_and_ends_with_the_result(client: understudy.Client) -> None:
    events = list(client.stream("sd-a", PROMPT, seed=2, steps=4, width=32, height=32))
    steps = [e.step for e in events if isinstance(e, understudy.Progress)]
    assert isinstance(events[0], understudy.Accepted)
    assert steps == sorted(set(steps)) and set(steps) <= {1, 2, 3, 4}
    assert isinstance(events[-1], understudy.Result)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"model": "nope"}, understudy.UnknownModel, "nope"),
        ({"width": 33}, understudy.CallerError, "8"),
        ({"width": -8}, understudy.CallerError, "width"),
        ({"steps": -1}, understudy.CallerError, "steps"),
        ({"images": 99}, understudy.CallerError, "images"),
        ({"guidance": float("nan")}, understudy.CallerError, "guidance"),
        ({"prompt": "x" * 10_000}, understudy.CallerError, "prompt"),
        ({"prompt": 5}, understudy.CallerError, "prompt"),
    ],
)
def test_bad_requests_get_typed_errors_and_the_daemon_serves_on(
    client: understudy.Client, options: dict[str, object], error: type[Exception], says: str
) -> None:
    arguments = {"model": "sd-a", "prompt": PROMPT, "steps": 1, "width": 32, "height": 32} | options
    model, prompt = arguments.pop("model"), arguments.pop("prompt")
    with pytest.raises(error, match=says):
        client.generate(model, prompt, **arguments)
    assert ask(client, "sd-a").images


def test_a_deadline_ends_a_run(client: understudy.Client) -> None:
    with pytest.raises(understudy.DeadlineExceeded):
        client.generate("sd-a", PROMPT, steps=400, width=64, height=64, deadline_s=0.5)
    assert ask(client, "sd-a").images


def test_a_running_request_is_cancelled_within_a_step(daemon: DaemonProcess) -> None:
    async def cancel_midway() -> None:
        async with understudy.AsyncClient(endpoint=daemon.endpoint) as client:
            handle = await client.submit("sd-a", PROMPT, steps=400, width=64, height=64)
            cancelled_at = last = 0
            with pytest.raises(understudy.Cancelled):
                async for event in handle.events():
                    if isinstance(event, understudy.Progress):
                        last = event.step
                        if last >= 2 and not cancelled_at:
                            cancelled_at = last
                            handle.cancel()
            # One step may have been under way, and one on the wire, when the word arrived.
            assert 2 <= cancelled_at <= last <= cancelled_at + 4

    asyncio.run(cancel_midway())


def test_an_upcasting_vae_leaves_nothing_behind(client: understudy.Client, daemon: DaemonProcess) -> None:
    """The second image of each model must come from the arena again, not from float32 leftovers."""

    def tensors_outside() -> list[str]:
        return daemon.ask(admin.Show(arena=True))["tensors_outside"]

    first = ask(client, "xl").images
    assert tensors_outside() == []
    ask(client, "xl-b")
    assert ask(client, "xl").images == first
    with pytest.raises(understudy.DeadlineExceeded):  # cancelled somewhere in the middle
        ask(client, "xl", steps=300, deadline_s=0.4)
    assert tensors_outside() == []
    assert ask(client, "xl").images == first
    assert tensors_outside() == []


def test_models_and_status_tell_the_truth(client: understudy.Client, daemon: DaemonProcess) -> None:
    ask(client, "sd-b")
    entries = {entry.name: entry for entry in client.models()}
    assert set(entries) == {"sd-a", "sd-b", "sd-c", "sd-half", "xl", "xl-b"}
    assert entries["sd-b"].tier == "bound" and entries["xl"].pipeline == "StableDiffusionXLPipeline"
    status = daemon.ask(admin.Status())
    arena = status["arena"]
    parts = ("ready_bytes", "leased_bytes", "filling_bytes", "quarantined_bytes", "free_bytes")
    assert sum(arena[part] for part in parts) == arena["size_bytes"]
    assert status["state"] == "ready" and status["requests_waiting"] == 0 and status["models"] == 6


def test_blobs_are_shared(daemon: DaemonProcess) -> None:
    parts = {c["name"]: c for c in daemon.ask(admin.Show(name="sd-a"))["components"]}
    assert set(parts["vae"]["shared_by"]) >= {"sd-a", "sd-b", "sd-c"}
    assert parts["unet"]["shared_by"] == ["sd-a"]
    assert parts["text_encoder"]["shared_by"] == ["sd-a", "sd-b"]


def test_many_clients_at_once(daemon: DaemonProcess) -> None:
    def one(i: int) -> str:
        with understudy.Client(endpoint=daemon.endpoint) as client:
            return ask(client, ["sd-a", "sd-b", "sd-c"][i % 3], seed=i).model

    with ThreadPoolExecutor(6) as threads:
        assert sorted(threads.map(one, range(12))) == sorted(["sd-a", "sd-b", "sd-c"] * 4)


def test_the_command_line_makes_a_picture(daemon: DaemonProcess, family: Family, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from understudy.cli import main

    out = tmp_path / "out.png"
    arguments = ["generate", PROMPT, "--model", "sd-c", "-o", str(out), "--seed", "7", "--steps", "2"]
    arguments += ["--size", "32x32", "--guidance", "5", "--endpoint", daemon.endpoint]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert pixels(out.read_bytes()) == family.reference("sd-c", prompt=PROMPT, seed=7, **SETTINGS)[0]

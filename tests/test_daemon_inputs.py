"""Images in, through the real daemon: every way to give one makes the picture that plain diffusers makes."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import understudy
from daemon_kit import DaemonProcess, running_daemon
from family_kit import Family, pixels
from understudy.cli import main

PROMPT = "a red circle"


def gradient(mode: str = "RGB") -> Image.Image:
    grey = Image.linear_gradient("L").resize((32, 32))
    return Image.merge("RGB", [grey, grey.rotate(90), Image.new("L", (32, 32), 40)]).convert(mode)


MASK = Image.new("L", (32, 32), 0)
MASK.paste(255, (0, 0, 16, 32))


@pytest.fixture(scope="module")
def daemon(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with running_daemon(family.store, tmp_path_factory.mktemp("run")) as daemon:
        yield daemon


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[understudy.Client]:
    with understudy.Client(endpoint=daemon.endpoint) as client:
        yield client


def plain(family: Family, kind: str, **arguments: Any) -> bytes:
    """What diffusers' own pipeline for the task makes of the same arguments."""
    import diffusers

    pipeline = getattr(diffusers, kind).from_pretrained(family.folders["sd-c"], local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        prompt=PROMPT,
        num_inference_steps=4,
        guidance_scale=5.0,
        generator=torch.Generator("cpu").manual_seed(3),
        **arguments,
    )
    return bytes(made.images[0].convert("RGB").tobytes())


def ask(client: understudy.Client, **fields: Any) -> understudy.Result:
    return client.generate("sd-c", PROMPT, steps=4, guidance=5.0, seed=3, **fields)


def test_image_to_image_however_the_image_is_given(
    client: understudy.Client, family: Family, tmp_path: Path
) -> None:
    expected = plain(family, "StableDiffusionImg2ImgPipeline", image=gradient(), strength=0.5)
    buffer = io.BytesIO()
    gradient().save(buffer, "PNG")
    (tmp_path / "init.png").write_bytes(buffer.getvalue())
    for image in (gradient(), numpy.asarray(gradient()), buffer.getvalue(), tmp_path / "init.png"):
        result = ask(client, image=image, options={"strength": 0.5})
        assert pixels(result.images[0]) == expected, type(image)
    assert expected != plain(family, "StableDiffusionImg2ImgPipeline", image=gradient(), strength=0.75)


def test_inpainting(client: understudy.Client, family: Family) -> None:
    expected = plain(
        family, "StableDiffusionInpaintPipeline", image=gradient(), mask_image=MASK, height=32, width=32
    )
    result = ask(client, image=gradient(), mask=MASK, size=(32, 32), format="raw")
    assert result.pil()[0].tobytes() == expected
    assert (result.numpy()[0] == numpy.frombuffer(expected, "uint8").reshape(32, 32, 3)).all()


def test_the_command_line(daemon: DaemonProcess, family: Family, tmp_path: Path) -> None:
    gradient().save(tmp_path / "init.png")
    arguments = ["generate", PROMPT, "-m", "sd-c", "--steps", "4", "--guidance", "5", "--seed", "3", "-q"]
    arguments += ["--init-image", str(tmp_path / "init.png"), "--set", "strength=0.5"]
    arguments += ["--endpoint", daemon.endpoint, "--count", "2", "-o", str(tmp_path / "out.webp")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    files = [io.BytesIO((tmp_path / f"out-{i}.webp").read_bytes()) for i in (0, 1)]
    assert [Image.open(file, formats=["webp"]).size for file in files] == [(32, 32)] * 2


def test_an_image_that_is_not_what_it_says_is_refused_and_the_daemon_serves_on(
    client: understudy.Client,
) -> None:
    whole = io.BytesIO()
    gradient().save(whole, "PNG")
    with pytest.raises(understudy.CallerError):  # its header is right: only the decoder can tell
        ask(client, image=whole.getvalue()[:60])
    with pytest.raises(understudy.CallerError):
        ask(client, inputs={"no_such_argument": gradient()})
    assert ask(client, image=gradient(), options={"strength": 0.5}).images


def test_many_with_images(client: understudy.Client) -> None:
    requests = [
        understudy.Request(
            model=model, prompt=PROMPT, image=gradient(), steps=2, options={"strength": 0.5}, seed=seed
        )
        for seed, model in enumerate(["sd-a", "sd-b", "sd-c"] * 4)
    ]
    results = list(client.generate_many(requests, in_flight=4, ordered=True))
    assert [result.seed for result in results] == list(range(12))
    assert len({result.images[0] for result in results}) == 12

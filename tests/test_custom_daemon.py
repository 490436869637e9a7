"""The example of docs/custom-pipelines.md, taken from the page and served by a real daemon."""

import asyncio
import os
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import understudy
from custom_kit import install, page_block
from daemon_kit import DaemonProcess, running_daemon
from family_kit import pixels
from understudy import admin, ctl
from understudyd.store.ingest import ingest
from understudyd.store.store import Store

PROMPT = "a lake"
MORE_CLASSES = """
import os
from tiny_paint import TinyPaint

class Watched(TinyPaint):
    @classmethod
    def on_startup(cls):
        with open(os.environ["STARTED"], "a") as file:
            file.write(f"{os.getpid()}\\n")

class Broken(TinyPaint):
    @classmethod
    def on_startup(cls):
        raise RuntimeError("the licence server is down")
"""


@dataclass(frozen=True)
class Served:
    """A daemon; the folder with the models; the file that start-ups leave a line in."""

    daemon: DaemonProcess
    folder: Path
    started: Path

    def command(self, line: str) -> Result:
        """A line of the page, as typed in the folder."""
        program, *arguments = shlex.split(line)
        assert program == "understudyctl"
        before = Path.cwd()
        os.chdir(self.folder)
        try:
            return CliRunner().invoke(ctl.main, ["--socket", str(self.daemon.admin_socket), *arguments])
        finally:
            os.chdir(before)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two models of other classes are in the store when the daemon starts; the page's come while it runs."""
    site, folder = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("models")
    (site / "tiny_paint.py").write_text(page_block("tiny_paint.py"))
    (site / "more_paint.py").write_text(MORE_CLASSES)
    project = tomllib.loads(page_block("pyproject.toml"))["project"]
    install(site, project["name"], project["entry-points"]["understudy.pipelines"], project["version"])
    install(site, "more-paint", {"watched": "more_paint:Watched", "broken": "more_paint:Broken"})
    environ = {"PYTHONPATH": str(site), "STARTED": str(tmp_path_factory.mktemp("started") / "pids")}
    _run_script("make_models.py", folder, environ)
    store = Store.open(tmp_path_factory.mktemp("store"), writable=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        ingest(store, "watched", folder / "morning", pipeline="watched")
        ingest(store, "broken", folder / "evening", pipeline="broken")
        run = tmp_path_factory.mktemp("run")
        with running_daemon(store.path, run, arena="24KiB", environ=environ) as daemon:
            yield Served(daemon, folder, Path(environ["STARTED"]))
        for name in ("tiny_paint", "more_paint"):
            sys.modules.pop(name, None)


def _run_script(name: str, folder: Path, environ: dict[str, str]) -> None:
    """Run a file of the page in `folder`."""
    (folder / name).write_text(page_block(name))
    done = subprocess.run(
        [sys.executable, name], cwd=folder, env=os.environ | environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def added(served: Served) -> Served:
    """The page's models, added as the page says."""
    for line in page_block("understudyctl add").splitlines():
        result = served.command(line)
        assert result.exit_code == 0, result.output
    return served


@pytest.fixture
def client(added: Served) -> Iterator[understudy.Client]:
    with understudy.Client(endpoint=added.daemon.endpoint) as client:
        yield client


def plainly(folder: Path, seed: int, steps: int, contrast: float, size: int = 32) -> bytes:
    """RGB bytes of what the page's modules make of `PROMPT`, without any of ours."""
    import torch
    from diffusers.image_processor import VaeImageProcessor
    from safetensors.torch import load_file
    from tiny_paint import Denoiser, TextEncoder  # found while the fixture lives

    torch.set_num_threads(1)
    modules: dict[str, Any] = {"text_encoder": TextEncoder(16, 64), "denoiser": Denoiser(16, 24)}
    for name, module in modules.items():
        module.load_state_dict(load_file(folder / f"{name}.safetensors"))
    letters = torch.tensor(["abcdefghijklmnopqrstuvwxyz ".index(letter) for letter in PROMPT])
    noisy = torch.randn((1, 3, size, size), generator=torch.Generator("cpu").manual_seed(seed))
    with torch.no_grad():
        text = modules["text_encoder"](letters)
        for _ in range(steps):
            noisy = noisy + modules["denoiser"](noisy, text) / steps
        image = (noisy * contrast).sigmoid()
    return bytes(VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(image))[0].tobytes())


def test_on_startup_ran_once_before_ready_and_in_no_other_process(served: Served) -> None:
    assert served.started.read_text().split() == [str(served.daemon.process.pid)]


def test_a_class_that_cannot_start_fails_alone(served: Served) -> None:
    assert served.daemon.wait_for_log("no model of the pipeline broken can be served")
    with understudy.Client(endpoint=served.daemon.endpoint) as client:
        with pytest.raises(understudy.UnderstudyError, match="the licence server is down"):
            client.generate("broken", PROMPT)
        watched = client.generate("watched", PROMPT, seed=7, steps=8).images[0]
    assert pixels(watched) == plainly(served.folder / "morning", 7, 8, 1.0)


def test_the_page_works_as_it_stands(added: Served) -> None:
    _run_script("ask.py", added.folder, {"UNDERSTUDY_ENDPOINT": added.daemon.endpoint})
    for name in ("morning", "evening"):
        expected = plainly(added.folder / name, 7, 8, 2.0)
        assert pixels((added.folder / f"{name}.png").read_bytes()) == expected, name


def test_there_and_back_with_too_little_room(client: understudy.Client, added: Served) -> None:
    """The arena holds one and a half models; `watched` has morning's weights, so shares its blobs."""
    expected = {name: plainly(added.folder / name, 3, 2, 1.0) for name in ("morning", "evening")}
    assert expected["morning"] != expected["evening"]
    for name in ("morning", "evening", "watched", "evening", "morning"):
        image = client.generate(name, PROMPT, seed=3, steps=2).images[0]
        assert pixels(image) == expected.get(name, expected["morning"]), name
        assert added.daemon.ask(admin.Show(arena=True))["tensors_outside"] == []
        tiers = {row["name"]: row["tier"] for row in added.daemon.ask(admin.Models())}
        assert tiers[name] == "bound"
        assert "disk" in (tiers["morning"], tiers["evening"])
    for shown, other in (("morning", "watched"), ("watched", "morning")):
        blobs = added.daemon.ask(admin.Show(name=shown))["components"]
        assert [set(blob["shared_by"]) for blob in blobs] == [{shown, other}] * 2


def test_cancelled_half_way_and_the_next_is_right(added: Served) -> None:
    async def cancel_midway() -> list[bytes]:
        async with understudy.AsyncClient(endpoint=added.daemon.endpoint) as client:
            handle = await client.submit("morning", PROMPT, steps=500, width=128, height=128)
            with pytest.raises(understudy.Cancelled):
                async for event in handle.events():
                    if isinstance(event, understudy.Progress) and event.step >= 2:
                        handle.cancel()
            return list((await client.generate("evening", PROMPT, seed=3, steps=2)).images)

    assert pixels(asyncio.run(cancel_midway())[0]) == plainly(added.folder / "evening", 3, 2, 1.0)
    assert added.daemon.ask(admin.Show(arena=True))["tensors_outside"] == []


@pytest.mark.parametrize(
    ("prompt", "fields", "says"),
    [
        ("???", {}, "send a prompt in small ones"),
        (PROMPT, {"options": {"contrats": 1.0}}, "did you mean 'contrast'"),
        (PROMPT, {"options": {"contrast": "high"}}, "it must be a number"),
    ],
)
def test_refusals_are_the_callers_fault(
    client: understudy.Client, prompt: str, fields: dict[str, Any], says: str
) -> None:
    with pytest.raises(understudy.CallerError, match=says):
        client.generate("morning", prompt, **fields)


def test_adding_with_a_name_that_is_no_pipeline(added: Served) -> None:
    result = added.command("understudyctl add other ./morning --pipeline tiny-point")
    assert result.exit_code == 1 and "did you mean 'tiny-paint'" in result.output
    assert "other" not in {row["name"] for row in added.daemon.ask(admin.Models())}


def test_removed_like_any_other(client: understudy.Client, added: Served) -> None:
    assert {entry.pipeline for entry in client.models() if entry.name == "evening"} == {"tiny-paint"}
    added.daemon.ask(admin.Remove(name="evening"))
    with pytest.raises(understudy.UnknownModel):
        client.generate("evening", PROMPT)
    assert pixels(client.generate("morning", PROMPT, seed=7, steps=8).images[0]) == plainly(
        added.folder / "morning", 7, 8, 1.0
    )

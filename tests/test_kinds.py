"""Every pipeline kind of the table, through one daemon whose arena holds only a few of them at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import understudy
from daemon_kit import DaemonProcess, running_daemon
from family_kit import pixels
from understudy import admin
from zoo.kinds import KINDS, Kind

SEED = 7
FINE_TUNES = {"a": 1, "b": 2}
FIELDS = {
    "prompt": "prompt",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "width": "width",
    "height": "height",
}


@dataclass(frozen=True)
class Stock:
    """A store of two fine-tunes of every kind, and the folders they came from."""

    store: Path
    folders: dict[str, Path]


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Stock:
    import torch

    from understudyd.store.ingest import IngestOptions, ingest_many
    from understudyd.store.store import Store

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("kinds")
    store = Store.open(folder / "store", writable=True)
    folders: dict[str, Path] = {}
    for kind in KINDS:
        own = {
            f"{kind.name}-{tune}": kind.save(seed, folder / f"{kind.name}-{tune}")
            for tune, seed in FINE_TUNES.items()
        }
        ingest_many(store, own.items(), IngestOptions(dtype=kind.ingested_as))
        folders |= own
    return Stock(store.path, folders)


@pytest.fixture(scope="module")
def daemon(stock: Stock, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    settings = {"arena": "20MiB", "stage": {"warm_up": False}}
    with running_daemon(stock.store, tmp_path_factory.mktemp("run"), **settings) as daemon:
        yield daemon


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[understudy.Client]:
    with understudy.Client(endpoint=daemon.endpoint) as client:
        yield client


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_kind(kind: Kind, stock: Stock, client: understudy.Client, daemon: DaemonProcess) -> None:
    a, b = (f"{kind.name}-{tune}" for tune in FINE_TUNES)
    plain = {name: plain_pictures(kind, stock.folders[name]) for name in (a, b)}
    assert plain[a] != plain[b], "the fine-tunes must differ"

    served: dict[str, list[bytes]] = {}
    for name in (a, b, a):
        result = client.generate(name, **asked(kind.arguments()))
        images = [pixels(image) for image in result.images]
        assert images == plain[name]
        assert served.setdefault(name, images) == images

    handle = client.submit(b, **asked(kind.arguments(**kind.many_steps)))
    with pytest.raises(understudy.Cancelled):
        for event in handle:
            if isinstance(event, understudy.Progress):
                handle.cancel()

    for name in (b, a):
        result = client.generate(name, **asked(kind.arguments()))
        assert [pixels(image) for image in result.images] == served[name]
    assert daemon.ask(admin.Show(arena=True))["tensors_outside"] == []


def asked(arguments: dict[str, Any]) -> dict[str, Any]:
    """The request for a pipeline call."""
    from PIL.Image import Image

    request: dict[str, Any] = {"seed": SEED, "options": {}, "inputs": {}}
    for name, value in arguments.items():
        if name in FIELDS:
            request[FIELDS[name]] = value
        else:
            request["inputs" if isinstance(value, Image) else "options"][name] = value
    return request


def plain_pictures(kind: Kind, folder: Path) -> list[bytes]:
    """RGB bytes of what a fresh `from_pretrained` makes, frame after frame.

    On the CPU it leaves weights where they lie in the mapped file, and kernels sum misaligned ones in another
    order. Copies of them, as `pipeline.to(device)` makes, are aligned as ours are.
    """
    import torch
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=kind.reference_dtype)
    pipeline.set_progress_bar_config(disable=True)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component._apply(torch.clone)
    generator = torch.Generator("cpu").manual_seed(SEED)
    with torch.no_grad():
        output = pipeline(generator=generator, **kind.arguments(output_type="pil"))
    if hasattr(output, "images"):
        return [image.convert("RGB").tobytes() for image in output.images]
    return [frame.convert("RGB").tobytes() for clip in output.frames for frame in clip]

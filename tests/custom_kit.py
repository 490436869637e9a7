"""Custom pipelines for tests: how they are installed, and classes that do one odd thing each."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from understudyd.pipelines import CustomPipeline, Refused, Request
from understudyd.store.ingest import ingest
from understudyd.store.store import Store

PAGE = Path(__file__).parent.parent / "docs" / "custom-pipelines.md"


def page_block(name: str) -> str:
    """The code block of the page whose first line is this file's name, or which begins with this command."""
    blocks = re.findall(r"^```(?:\w+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return next(block for block in blocks if block.startswith((f"# {name}\n", name)))


def install(folder: Path, name: str, entry_points: dict[str, str], version: str = "1.0") -> None:
    """What an installer leaves of a package besides its modules, in a folder that is on the path."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [f"{entry} = {target}" for entry, target in entry_points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[understudy.pipelines]", *lines, ""]))


def save_model(folder: Path, modules: dict[str, nn.Module], **files: str) -> Path:
    """A model's folder; `files` are small files by name, a dot written as two underscores."""
    folder.mkdir(parents=True)
    for component, module in modules.items():
        save_file(module.state_dict(), folder / f"{component}.safetensors")
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


class Grid(nn.Module):
    """Parameters, one tied; a buffer of each kind; attributes, one in a list, one set while computing."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.first = nn.Linear(size, size)
        self.last = nn.Linear(size, size, bias=False)
        self.last.weight = self.first.weight
        self.register_buffer("kept", torch.zeros(size))
        self.register_buffer("wave", torch.arange(size).float().cos(), persistent=False)
        self.bend = torch.linspace(-1, 1, size)
        self.tables = [torch.arange(size).float().sin()]
        self.last_output: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x + self.wave.to(x.dtype)) + self.kept
        if self.last_output is not None:
            hidden = hidden + self.last_output
        self.last_output = self.last(hidden * self.bend.to(x.dtype)) + self.tables[0].to(x.dtype)
        return self.last_output


def random_grid(seed: int, size: int = 8) -> Grid:
    torch.manual_seed(seed)
    grid = Grid(size)
    grid.kept.normal_()
    return grid.eval()


def untied_state(grid: Grid) -> dict[str, Tensor]:
    """As safetensors writes it: of the tied tensors one."""
    return {name: tensor for name, tensor in grid.state_dict().items() if name != "last.weight"}


class Painter(CustomPipeline):
    """One component `grid`; paints its output, a step a pass."""

    options = {"gain": 1.0, "words": list, "loud": False}
    inputs = ("image", "mask_image")
    built: list[str] = []
    started: list[str] = []

    @classmethod
    def components(cls, config: dict[str, Any]) -> Any:
        def build() -> Grid:
            cls.built.append("grid")
            return Grid(config.get("size", 8))

        return {"grid": build}

    @classmethod
    def on_startup(cls) -> None:
        cls.started.append("started")

    @classmethod
    def read_files(cls, folder: Path, config: dict[str, Any]) -> Any:
        path = folder / "offset.txt"
        return float(path.read_text()) if path.exists() else 0.0

    def prepare(self, request: Request) -> None:
        if request.prompt == "refuse me":
            raise Refused("not this prompt; send another")
        if request.prompt == "bug before":
            raise ValueError("a bug, not the caller")

    def __call__(self, request: Request) -> Tensor:
        steps = request.steps or 2
        pixels = torch.randn(request.images, 3, 8, 8, generator=request.generator()).to(request.dtype)
        for image in request.inputs["image"]:
            pixels = (
                pixels
                + torch.tensor(list(image.resize((8, 8)).tobytes())).view(8, 8, 3).permute(2, 0, 1) / 255
            )
        for done in range(steps):
            pixels = self.modules["grid"](pixels) * request.options["gain"]
            request.step(done + 1, steps)
        return (pixels + self.files).float().sigmoid()


def plainly(grid: Grid, seed: int = 7, steps: int = 2, gain: float = 1.0, offset: float = 0.0) -> bytes:
    """RGB bytes of what the class makes of a module that never saw the daemon."""
    from diffusers.image_processor import VaeImageProcessor

    grid.last_output = None
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator("cpu").manual_seed(seed)).to(
        grid.first.weight.dtype
    )
    with torch.no_grad():
        for _ in range(steps):
            pixels = grid(pixels) * gain
        image = (pixels + offset).float().sigmoid()
    return bytes(VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(image))[0].tobytes())


class Reader(Painter):
    """Reads a weight without calling the module, and gives PIL images."""

    def __call__(self, request: Request) -> Any:
        level = int(self.modules["grid"].first.weight.abs().sum().item() * 10) % 256
        return [Image.new("RGB", (8, 8), (level, 0, 0))]


class Grown(Painter):
    """A later version of the code has one tensor more, or another component."""

    version = 1

    @classmethod
    def components(cls, config: dict[str, Any]) -> Any:
        def build() -> nn.Module:
            module = Grid(8)
            if cls.version == 2:
                module.register_parameter("more", nn.Parameter(torch.zeros(1)))
            return module

        return {"grid": build} | ({"other": build} if cls.version == 3 else {})


class Careless(Painter):
    """Swallows everything, cancelling too."""

    def __call__(self, request: Request) -> Tensor:
        for done in range(50):
            try:
                request.step(done, 50)
            except BaseException:
                continue
        return torch.zeros(1, 3, 8, 8)


class Hungry(Painter):
    """No memory at the first try."""

    tries = 0

    def __call__(self, request: Request) -> Tensor:
        type(self).tries += 1
        if type(self).tries == 1:
            raise MemoryError("activations")
        return super().__call__(request)


class Bad(Painter):
    """Fails where `where` says."""

    where = ""

    @classmethod
    def on_startup(cls) -> None:
        if cls.where == "on_startup":
            raise SystemExit("no licence")

    @classmethod
    def components(cls, config: dict[str, Any]) -> Any:
        if cls.where == "components":
            raise KeyError("width")
        if cls.where == "modules":
            return {"grid": Grid(8)}
        return super().components(config)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if self.where == "__init__":
            raise RuntimeError("no tokenizer")

    def __call__(self, request: Request) -> Any:
        match self.where:
            case "bug":
                raise TypeError("a bug, not the caller")
            case "exit":
                raise SystemExit(3)
            case "steps":
                request.step(3, 2)
            case "output":
                return "a picture"
        return super().__call__(request)


class Table:
    """An object that is no module."""

    def __init__(self) -> None:
        self.values = torch.zeros(3)


class Hiding(Painter):
    """Its module has a tensor where nobody looks."""

    @classmethod
    def components(cls, config: dict[str, Any]) -> Any:
        def build() -> nn.Module:
            grid = Grid(8)
            grid.first.table = Table()
            return grid

        return {"grid": build}


class NoPipeline:
    """Not derived from the base class."""


CLASSES = (Painter, Reader, Grown, Careless, Hungry, Bad, Hiding, NoPipeline)


def install_all(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every class of this file under its name in small letters; as if just imported."""
    install(site, "kit", {cls.__name__.lower(): f"custom_kit:{cls.__name__}" for cls in CLASSES})
    monkeypatch.syspath_prepend(site)
    for cls in (Painter, Grown, Hungry, Bad):
        monkeypatch.setattr(cls, "built", [])
        monkeypatch.setattr(cls, "started", [])
    monkeypatch.setattr(Hungry, "tries", 0)


def custom_store(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty store, and every class of this file installed."""
    install_all(folder / "site", monkeypatch)
    return Store.open(folder / "store", writable=True)


def grid_folder(folder: Path, seed: int, size: int = 8, **files: str) -> Path:
    folder = save_model(folder, {}, **files)
    save_file(untied_state(random_grid(seed, size)), folder / "grid.safetensors")
    return folder


def add_grid(
    store: Store, tmp_path: Path, name: str, seed: int, pipeline: str = "painter", **files: str
) -> None:
    ingest(store, name, grid_folder(tmp_path / "sources" / name, seed, **files), pipeline=pipeline)

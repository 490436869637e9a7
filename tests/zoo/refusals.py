"""What is refused when it is added: ways to spoil a good model folder, and what the refusal is called."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from understudyd.store.errors import StoreError
from understudyd.store.ingest import ingest
from understudyd.store.store import Store

_UNET = Path("unet", "diffusion_pytorch_model.safetensors")


@dataclass(frozen=True)
class Refusal:
    """One row: `spoil(folder)` changes a Stable Diffusion folder, `code` is what adding it then says."""

    what: str
    code: str
    spoil: Callable[[Path], object]

    def message(self, good: Path, workplace: Path) -> tuple[str, str]:
        """Code and message of the refusal, without the workplace's own path."""
        folder = shutil.copytree(good, workplace / "model")
        self.spoil(folder)
        store = Store.open(workplace / "store", writable=True)
        try:
            ingest(store, "model", folder)
        except StoreError as error:
            return error.code.value, error.message.replace(f"{folder}/", "")
        finally:
            shutil.rmtree(folder)
        raise AssertionError(f"{self.what} was not refused")


def _edited(file: str, **changes: object) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def _written(file: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_text(text)


def _pickled(folder: Path) -> None:
    (folder / _UNET).rename((folder / _UNET).with_suffix(".bin"))


def _truncated(folder: Path) -> None:
    path = folder / _UNET
    path.write_bytes(path.read_bytes()[:-8])


def _without_a_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / _UNET)
    del weights["conv_in.weight"]
    save_file(weights, folder / _UNET)


def _pipeline(name: str) -> Callable[[Path], object]:
    return _edited("model_index.json", _class_name=name)


REFUSALS = (
    Refusal("a Python file", "unsafe_file", _written("unet/model.py", "import os\n")),
    Refusal("a pipeline with code of its own", "unsafe_file",
            _edited("model_index.json", custom_pipeline="somebody/pipeline")),
    Refusal("a component with remote code", "unsafe_file",
            _edited("unet/config.json", auto_map={"AutoModel": "modeling.Model"})),
    Refusal("weights as a pickle", "unsafe_file", _pickled),
    Refusal("a link out of the folder", "unsafe_file",
            lambda folder: (folder / "unet" / "notes.txt").symlink_to("/etc/hostname")),
    Refusal("a component of another library", "unknown_class",
            _edited("model_index.json", unet=["my_models", "Net"])),
    Refusal("a component class that is no model", "unknown_class",
            _edited("model_index.json", unet=["diffusers", "DiffusionPipeline"])),
    Refusal("a pipeline class of a newer release", "unknown_class", _pipeline("StableDiffusion9Pipeline")),
    Refusal("a quantised component", "unsupported_source",
            _edited("unet/config.json", quantization_config={"quant_method": "bitsandbytes"})),
    Refusal("a LoRA adapter", "unsupported_source", _written("unet/adapter_config.json", "{}")),
    Refusal("connected pipelines", "unsupported_source", _pipeline("KandinskyV22CombinedPipeline")),
    Refusal("a prior, which makes embeddings", "unsupported_source", _pipeline("KandinskyV22PriorPipeline")),
    Refusal("a decoder of embeddings", "unsupported_source", _pipeline("StableCascadeDecoderPipeline")),
    Refusal("a pipeline that makes sound", "unsupported_source", _pipeline("StableAudioPipeline")),
    Refusal("a missing weight", "corrupt_source", _without_a_weight),
    Refusal("a truncated file", "corrupt_source", _truncated),
    Refusal("a missing component", "corrupt_source", lambda folder: shutil.rmtree(folder / "vae")),
)  # fmt: skip

"""A store with one model, and LoRA files for it."""

from pathlib import Path
from typing import Any

import adapter_kit as kit
from adapter_kit import Making
from understudy_demo import tiny
from understudyd.store.adapters.files import find_adapters
from understudyd.store.adapters.ingest import AdapterOptions, add_adapter
from understudyd.store.adapters.records import AdapterRecord
from understudyd.store.adapters.shelf import AdapterShelf
from understudyd.store.ingest import ingest
from understudyd.store.records import SignatureRecord
from understudyd.store.store import Store
from zoo import unets

UNET = {"unet": kit.UNET_LAYERS[:4]}
CONV_AND_TEXT = {"unet": kit.CONV_LAYERS, "text_encoder": kit.TEXT_LAYERS}


class Shop:
    """A store with a Stable Diffusion model, its pipeline, and a folder for LoRA files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = root / "files"
        self.pipeline: Any = unets.stable_diffusion(0)
        self.store = Store.open(root / "store", writable=True)
        self.model = ingest(self.store, "base", tiny.save(self.pipeline, root / "saved"))
        self.shelf = AdapterShelf(self.store)

    def make(self, **changes: Any) -> kit.MadeAdapter:
        return kit.make_adapter(self.pipeline, Making(**{"layers": UNET} | changes))

    def add(self, path: Path, **options: Any) -> AdapterRecord:
        (file,) = find_adapters(path)
        return add_adapter(self.store, file, AdapterOptions(**options))

    def signatures(self) -> dict[str, SignatureRecord]:
        return {c.name: self.store.signature(c.signature) for c in self.model.components}

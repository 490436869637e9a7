"""Shared by the tests of ingest: what diffusers makes of a source, and whether a store has the same bits."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from understudyd.store.pretrained import quiet_libraries
from understudyd.store.records import ModelRecord
from understudyd.store.store import Store


def single_threaded() -> Iterator[None]:
    """For a fixture: torch on one thread, as sums depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def reference(folder: Path, **options: Any) -> Any:
    with quiet_libraries():
        return DiffusionPipeline.from_pretrained(folder, local_files_only=True, **options)


def assert_serves(store: Store, record: ModelRecord, pipeline: Any) -> None:
    """Every tensor of every component is in the store, and is the pipeline's, bit for bit."""
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    assert {c.name for c in record.components} == set(modules)
    for component in record.components:
        stored = load_file(store.blob_path(component.blob.sha256))
        signature = store.signature(component.signature)
        module = modules[component.name]
        assert {t.path for t in signature.tensors} >= set(module.state_dict())
        for tensor in signature.tensors:
            owner, _, leaf = tensor.path.rpartition(".")
            live = getattr(module.get_submodule(owner), leaf)
            found = stored[tensor.alias_of or tensor.path]
            assert found.dtype == live.dtype, tensor.path
            assert torch.equal(found.reshape(-1).view(torch.uint8), live.reshape(-1).view(torch.uint8))
        names = {t.path for t in signature.tensors if t.alias_of is None}
        assert {name for name in stored if not name.startswith("__pad.")} == names

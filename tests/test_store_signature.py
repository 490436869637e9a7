"""What a component's tensor table records, on modules made for it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextModel

from understudy_demo import tiny
from understudyd.store.blob_writer import write_blob
from understudyd.store.errors import StoreError
from understudyd.store.signature import Component, canonical_config, held_tensors


class Holder(nn.Module):
    """One of each kind of tensor, ties among them, odd strides and sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"width": 4, "_name_or_path": "/x", "_diffusers_version": "1", "sizes": (1, 2)}
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("counter", torch.arange(3))
        self.register_buffer("mask", torch.ones(2, 2, dtype=torch.bool), persistent=False)
        self.register_buffer("tied_mask", self.mask)
        self.register_buffer("none", None)
        self.table = torch.arange(12, dtype=torch.float64).reshape(3, 4).T
        self.empty = torch.zeros(0, 3)
        self.part = torch.zeros(100)[10:20]
        self.wave = torch.tensor([1 + 2j])


def test_every_kind_is_recorded(tmp_path: Path) -> None:
    module = Holder()
    component = Component("holder", module)
    records = {t.path: t for t in component.signature.tensors}
    assert {path: t.kind for path, t in records.items()} == {
        "embed.weight": "parameter",
        "head.weight": "parameter",
        "scale": "parameter",
        "counter": "buffer",
        "mask": "temporary_buffer",
        "tied_mask": "buffer",
        "table": "attribute",
        "empty": "attribute",
        "part": "attribute",
        "wave": "attribute",
    }
    ties = {path: t.alias_of for path, t in records.items() if t.alias_of}
    assert ties == {"head.weight": "embed.weight", "tied_mask": "mask"}
    assert records["head.weight"].offset == records["embed.weight"].offset
    assert records["scale"].shape == ()
    assert all(t.offset % 512 == 0 for t in records.values())

    path = tmp_path / "blob.safetensors"
    blob = write_blob(path, component.layout, lambda span: component.read(span.name))
    stored = load_file(path)
    data = path.read_bytes()[blob.data_start_bytes :]
    assert len(data) == component.signature.size_bytes
    for name, _, live in held_tensors(module):
        record = records[name]
        assert torch.equal(stored[record.alias_of or name], live)
        raw = data[record.offset : record.offset + record.size_bytes]
        assert raw == live.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_the_signature_knows_ties_and_dtypes_but_not_values() -> None:
    def signature(change: str = "") -> str:
        torch.manual_seed(len(change))
        module = Holder()
        match change:
            case "values":
                module.scale.data += 1
                module.config = {**module.config, "_name_or_path": "/y", "dtype": "float16"}
            case "tie":
                module.head.weight = nn.Parameter(module.embed.weight.detach().clone())
            case "dtype":
                module.scale.data = module.scale.data.half()
            case "config":
                module.config = {**module.config, "width": 5}
        return Component("holder", module).signature.id

    assert signature() == signature("values")
    assert len({signature(change) for change in ("", "tie", "dtype", "config")}) == 4
    assert len(signature()) == 32


def test_a_config_round_trips_through_the_library() -> None:
    config = tiny.text_config()
    canonical = canonical_config(config)
    assert not {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"} & set(
        canonical
    )
    assert canonical_config(type(config).from_dict(canonical)) == canonical
    unet = tiny.unet()
    canonical = canonical_config(unet.config)
    assert not any(key.startswith("_") for key in canonical)
    assert canonical_config(type(unet).from_config(canonical).config) == canonical


def test_attention_implementation_is_part_of_it() -> None:
    eager = CLIPTextModel._from_config(tiny.text_config(), attn_implementation="eager")
    sdpa = CLIPTextModel._from_config(tiny.text_config(), attn_implementation="sdpa")
    one, other = Component("t", eager).signature, Component("t", sdpa).signature
    assert (one.attn_implementation, other.attn_implementation) == ("eager", "sdpa")
    assert one.tensors == other.tensors
    assert one.id != other.id


class TwoOfOnePath(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.tables = {1: torch.ones(1), "1": torch.zeros(1)}


@pytest.mark.parametrize(
    ("module", "code"),
    [
        (nn.Linear(2, 2, device="meta"), "corrupt_source"),
        (nn.ReLU(), "unsupported_source"),
        (TwoOfOnePath(), "unsupported_source"),
        (nn.Module(), "unsupported_source"),
    ],
)
def test_what_cannot_be_stored_is_refused(module: nn.Module, code: str) -> None:
    with pytest.raises(StoreError) as caught:
        Component("c", module)
    assert caught.value.code == code


def test_a_sparse_tensor_is_refused() -> None:
    module = nn.Module()
    module.table = torch.eye(3).to_sparse()
    with pytest.raises(StoreError, match="cannot be served yet"):
        Component("c", module)

"""Awkward classes: tensors in containers, constructors that read numbers, runs that leave tensors."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from stage_kit import signature_of
from understudyd.stage import building
from understudyd.stage.skeleton import Skeleton
from understudyd.stage.views import BlobViews, WeightArena
from understudyd.store.blob_writer import write_blob
from understudyd.store.signature import Component
from understudyd.store.tensor_places import tensor_places
from zoo.kinds import KINDS


class Pair(NamedTuple):
    cosine: Tensor
    sine: Tensor


class Contained(nn.Module):
    """Tensors where no state dict looks, numbers read off tensors, and a cache that fills as it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"kind": "contained"}
        self.linear = nn.Linear(4, 4)
        self.rates = torch.linspace(0, 1, 4).tolist()
        self.list = [torch.polar(torch.ones(2), torch.ones(2)), torch.arange(3)]
        self.pair = Pair(torch.ones(4), torch.zeros(4))
        self.nested = {"tables": (torch.full((4,), 2.0), [torch.ones(2, dtype=torch.complex128)])}
        self.hidden = [nn.Linear(4, 4)]
        self.register_buffer("steps", torch.zeros(1), persistent=False)
        self.made: Tensor | None = None
        self.is_made = False
        self.cache: dict[str, Tensor] = {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Contained":
        return cls()

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_made:
            self.made, self.is_made = self.linear.weight * 2, True
        self.cache["last"] = x
        self.steps = self.steps + 1
        self.new = x
        y = self.linear(x) @ self.made + self.hidden[0](x) * self.pair.cosine + self.pair.sine
        return y * self.nested["tables"][0] + self.list[0].real.sum() + self.rates[1]


def filled(module: nn.Module, folder: Path) -> tuple[Skeleton, BlobViews, WeightArena]:
    """A skeleton of the module, and views of its weights as a blob brings them."""
    component = Component("component", module)
    path = folder / f"{id(module)}.safetensors"
    blob = write_blob(path, component.layout, lambda span: component.read(span.name))
    data = path.read_bytes()[blob.data_start_bytes :]
    arena = WeightArena(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    views = BlobViews.build(arena, component.signature, 0, lambda: None)
    return Skeleton(component.signature), views, arena


@pytest.fixture
def contained(monkeypatch: pytest.MonkeyPatch) -> Contained:
    monkeypatch.setattr(building, "resolve", lambda library, name: Contained)
    torch.manual_seed(0)
    return Contained().eval()


def test_paths_of_tensors_in_containers(contained: Contained) -> None:
    places = {place.path: place.kind for place in tensor_places(contained)}
    assert places == {
        "linear.weight": "parameter",
        "linear.bias": "parameter",
        "list.0": "attribute",
        "list.1": "attribute",
        "pair.0": "attribute",
        "pair.1": "attribute",
        "nested.tables.0": "attribute",
        "nested.tables.1.0": "attribute",
        "hidden.0.weight": "parameter",
        "hidden.0.bias": "parameter",
        "steps": "temporary_buffer",
    }


@torch.no_grad()
def test_tensors_in_containers_are_bound_and_put_back(contained: Contained, tmp_path: Path) -> None:
    skeleton, views, arena = filled(contained, tmp_path)
    module = skeleton.module
    assert isinstance(module, Contained) and module.rates == contained.rates
    x = torch.randn(2, 4)
    expected = contained(x)
    for _ in range(2):
        skeleton.bind(views)
        assert torch.equal(module(x), expected)
        assert isinstance(module.pair, Pair)
        assert torch.equal(module.nested["tables"][1][0], torch.ones(2, dtype=torch.complex128))
        assert skeleton.strays(arena.address_range) == ["steps"], "the run has replaced it"
        skeleton.restore()
        assert skeleton.strays(arena.address_range) == []
        assert module.made is None and not module.is_made and module.cache == {}
        assert not hasattr(module, "new")
        module.to(torch.float64)
        skeleton.restore()
        assert skeleton.strays(arena.address_range) == []
        skeleton.unbind(views)
        assert module.pair.cosine.isnan().all()


@torch.no_grad()
def test_what_one_fine_tune_left_does_not_reach_the_next(contained: Contained, tmp_path: Path) -> None:
    torch.manual_seed(1)
    other = Contained().eval()
    skeleton, views, _ = filled(contained, tmp_path)
    _, other_views, _ = filled(other, tmp_path)
    x = torch.randn(2, 4)
    for own, module in ((views, contained), (other_views, other), (views, contained)):
        skeleton.bind(own)
        assert torch.equal(skeleton.module(x), Contained.forward(module, x))
        skeleton.restore()


def test_what_a_library_sets_up_once_stays(contained: Contained, tmp_path: Path) -> None:
    """Hooks and the flag that says they are there belong together."""
    skeleton, _, _ = filled(contained, tmp_path)
    skeleton.module.hooks_installed = True
    skeleton.restore()
    assert skeleton.module.hooks_installed is True


def signatures(kind: str, folder: Path) -> dict[str, Any]:
    """By component, as ingest records them."""
    from understudyd.store.ingest import ingest
    from understudyd.store.store import Store

    row = next(k for k in KINDS if k.name == kind)
    store = Store.open(folder / "store", writable=True)
    record = ingest(store, kind, row.save(1, folder / kind), dtype=row.ingested_as)
    return {c.name: store.signature(c.signature) for c in record.components}


def test_the_table_has_what_it_says_it_has(tmp_path: Path) -> None:
    found = {
        kind: signatures(kind, tmp_path / kind) for kind in ("pixart", "pixart-half", "wan-half", "lumina2")
    }
    assert any(t.alias_of for t in found["pixart"]["text_encoder"].tensors)
    assert {t.dtype for t in found["pixart-half"]["text_encoder"].tensors} == {"F16", "F32"}
    assert {t.dtype for t in found["wan-half"]["transformer"].tensors} >= {"BF16", "F32"}
    assert {t.dtype for t in found["wan-half"]["vae"].tensors} == {"F32"}
    rotary = {t.path: t for t in found["lumina2"]["transformer"].tensors if t.kind == "attribute"}
    assert "rope_embedder.freqs_cis.0" in rotary
    assert {t.dtype for t in rotary.values()} <= {"C64", "C128"}


def test_no_signature_differs_between_fine_tunes_of_a_kind() -> None:
    for kind in KINDS:
        one, other = (
            {
                n: signature_of(c).id
                for n, c in kind.build(seed).components.items()
                if isinstance(c, nn.Module)
            }
            for seed in (1, 2)
        )
        assert one == other, kind.name

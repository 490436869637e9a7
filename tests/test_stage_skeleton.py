"""A skeleton's slots: everything is bound, nothing is forgotten, and what a run moved is put back."""

import functools
from typing import Any

import msgspec
import pytest
import torch
from diffusers.utils.torch_utils import lru_cache_unless_export
from torch import Tensor, nn

from stage_kit import signature_of
from understudy_demo import tiny
from understudyd.stage import building
from understudyd.stage.classes import resolve
from understudyd.stage.errors import NotResident, SkeletonMismatch, StageError, UnknownClass
from understudyd.stage.skeleton import Skeleton
from understudyd.stage.views import BlobViews, ResidentBlobs, ViewShelf, WeightArena
from understudyd.store.records import SignatureRecord


class Odd(nn.Module):
    """Every way a module can hold a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"kind": "odd"}
        self.inner = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
        self.tied = nn.Linear(4, 6, bias=False)
        self.tied.weight = self.inner[0].weight
        self.register_buffer("temporary", torch.arange(3), persistent=False)
        self.scale = torch.tensor(2.5)
        self.nothing: Tensor | None = None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Odd":
        return cls()

    def forward(self, x: Tensor) -> Tensor:
        return (self.inner(x) + self.tied(x)) * self.scale + self.temporary.sum()


class Remembers(nn.Module):
    """Has methods whose results its class keeps, in both ways that libraries write it."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"kind": "remembers"}
        self.table = torch.arange(4.0)
        self.calls = 0

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Remembers":
        return cls()

    @functools.lru_cache(maxsize=7)  # noqa: B019  as libraries do
    def rows(self, count: int) -> Tensor:
        self.calls += 1
        return self.table[:count]

    @lru_cache_unless_export(maxsize=None)
    def on(self, device: torch.device) -> Tensor:
        return self.table.to(device)


class Filled:
    """A module's weights laid out in an arena, as ingest and a loader would."""

    def __init__(self, module: nn.Module) -> None:
        self.signature = signature_of(module)
        self.memory = torch.zeros(self.signature.size_bytes + 4096, dtype=torch.uint8)
        self.arena = WeightArena(self.memory)
        self.breaths = 0
        for record in self.signature.tensors:
            owner, _, name = record.path.rpartition(".")
            self.arena.tensor(record, 4096).copy_(getattr(module.get_submodule(owner), name).detach())

    def views(self) -> BlobViews:
        return BlobViews.build(self.arena, self.signature, 4096, self._breathe)

    def _breathe(self) -> None:
        self.breaths += 1


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.setattr(building, "resolve", lambda library, name: Odd)
    torch.manual_seed(0)
    return Odd().eval()


def test_what_cached_methods_returned_is_forgotten_with_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "resolve", lambda library, name: Remembers)
    filled = Filled(Remembers())
    skeleton, views = Skeleton(filled.signature), filled.views()
    module = skeleton.module
    for run in (1, 2):
        skeleton.bind(views)
        for _ in range(2):
            assert module.rows(count=2).data_ptr() == module.table.data_ptr()
            assert module.on(torch.device("cpu")) is views.bound[0]
        assert module.calls == run, "within a run they are kept"
        skeleton.restore()
        skeleton.unbind(views)
        assert module.on(torch.device("cpu")).isnan().all(), "an unbound module shows no extent"
        skeleton.restore()
        views = filled.views()
    assert Remembers.rows.cache_info().currsize == 0, "the class keeps no module alive"


@torch.no_grad()
def test_ties_buffers_and_attributes_are_bound(odd: nn.Module) -> None:
    filled = Filled(odd)
    skeleton = Skeleton(filled.signature)
    assert skeleton.bind(filled.views())
    assert skeleton.strays(filled.arena.address_range) == []
    module = skeleton.module
    x = torch.randn(5, 4)
    assert torch.equal(module(x), odd(x))
    assert module.tied.weight is module.inner[0].weight
    assert module.scale.data_ptr() in filled.arena.address_range
    kinds = {record.kind for record, _ in skeleton.tensors()}
    assert kinds == {"parameter", "buffer", "temporary_buffer", "attribute"}


def test_binding_twice_does_nothing(odd: nn.Module) -> None:
    filled = Filled(odd)
    skeleton, views = Skeleton(filled.signature), filled.views()
    assert skeleton.bind(views)
    assert not skeleton.bind(views)
    assert skeleton.bind(filled.views())


def test_the_module_is_frozen_and_in_eval_mode(odd: nn.Module) -> None:
    filled = Filled(odd)
    skeleton = Skeleton(filled.signature)
    skeleton.bind(filled.views())
    assert not any(module.training for module in skeleton.module.modules())
    assert not any(parameter.requires_grad for parameter in skeleton.module.parameters())


def without(signature: SignatureRecord, path: str) -> SignatureRecord:
    tensors = tuple(record for record in signature.tensors if record.path != path)
    return msgspec.structs.replace(signature, tensors=tensors)


@pytest.mark.parametrize("path", ["inner.0.bias", "temporary", "scale", "tied.weight", "inner.1.running_var"])
def test_a_tensor_without_a_record_is_refused(odd: nn.Module, path: str) -> None:
    with pytest.raises(SkeletonMismatch, match=path):
        Skeleton(without(signature_of(odd), path))


def test_a_record_without_a_slot_is_refused(odd: nn.Module) -> None:
    signature = signature_of(odd)
    stranger = msgspec.structs.replace(signature.tensors[0], path="inner.7.weight")
    with pytest.raises(SkeletonMismatch, match=r"inner\.7\.weight"):
        Skeleton(msgspec.structs.replace(signature, tensors=(*signature.tensors, stranger)))


def test_another_shape_is_refused(odd: nn.Module) -> None:
    signature = signature_of(odd)
    first, *others = signature.tensors
    wrong = msgspec.structs.replace(first, shape=(1, *first.shape[1:]))
    with pytest.raises(SkeletonMismatch, match="shape"):
        Skeleton(msgspec.structs.replace(signature, tensors=(wrong, *others)))


def test_views_of_another_signature_are_refused(odd: nn.Module) -> None:
    filled = Filled(odd)
    skeleton = Skeleton(msgspec.structs.replace(filled.signature, id="other"))
    with pytest.raises(SkeletonMismatch):
        skeleton.bind(filled.views())


@pytest.mark.parametrize("path", ["", "inner", "inner.0"])
def test_a_cast_anywhere_is_noticed_and_undone(odd: nn.Module, path: str) -> None:
    filled = Filled(odd)
    skeleton = Skeleton(filled.signature)
    skeleton.bind(filled.views())
    skeleton.module.get_submodule(path).to(torch.float64)
    assert skeleton.is_dirty
    assert "inner.0.weight" in skeleton.strays(filled.arena.address_range)
    displaced = skeleton.restore()
    assert any(tensor.dtype == torch.float64 for tensor in displaced)
    assert not skeleton.is_dirty
    assert skeleton.strays(filled.arena.address_range) == []
    assert skeleton.module.inner[0].weight.dtype == torch.float32
    assert skeleton.restore() == []


def test_an_unbound_skeleton_shows_dtype_and_device_but_computes_nan() -> None:
    text_encoder = tiny.stable_diffusion(1).text_encoder.half()
    skeleton = Skeleton(signature_of(text_encoder))
    assert skeleton.module.dtype == torch.float16
    assert skeleton.module.device == torch.device("cpu")
    with torch.no_grad():
        hidden = skeleton.module(torch.tensor([[1, 2, 513]])).last_hidden_state
    assert hidden.isnan().all()


def test_unbinding_lets_go_of_these_views_only(odd: nn.Module) -> None:
    filled = Filled(odd)
    skeleton, views, others = Skeleton(filled.signature), filled.views(), filled.views()
    skeleton.bind(views)
    skeleton.unbind(others)
    assert skeleton.strays(filled.arena.address_range) == []
    skeleton.unbind(views)
    assert len(skeleton.strays(filled.arena.address_range)) == len(filled.signature.tensors)
    assert skeleton.bind(views)


def test_a_rewritten_config_is_put_back() -> None:
    skeleton = Skeleton(signature_of(tiny.unet()))
    canonical = skeleton.module.config
    skeleton.module.register_to_config(sample_size=64)
    assert skeleton.module.config is not canonical
    skeleton.restore()
    assert skeleton.module.config is canonical


def test_touch_comes_before_computing_and_before_moving() -> None:
    touches: list[bool] = []
    vae = tiny.vae()
    filled = Filled(vae)
    skeleton = Skeleton(filled.signature, lambda: touches.append(skeleton.is_dirty))
    skeleton.bind(filled.views())
    with torch.no_grad():
        skeleton.module.decode(torch.zeros(1, 4, 4, 4))
    blocks = len(touches)
    assert blocks > 10, "an autoencoder can be stopped in each of its blocks"
    skeleton.module.to(torch.float32)
    assert touches[blocks] is False


def test_skeletons_equal_the_module_they_were_recorded_from() -> None:
    for module in (tiny.unet(), tiny.vae(), tiny.stable_diffusion_xl(1).text_encoder_2):
        module.eval()
        filled = Filled(module)
        skeleton = Skeleton(filled.signature)
        skeleton.bind(filled.views())
        built = skeleton.module.state_dict()
        assert list(built) == list(module.state_dict())
        assert all(torch.equal(built[key], value) for key, value in module.state_dict().items())


def test_views_are_built_in_slices() -> None:
    filled = Filled(tiny.unet())
    filled.views()
    assert filled.breaths == len(filled.signature.tensors) // 64


def test_scalars_and_empty_tensors_have_views() -> None:
    arena = WeightArena(torch.zeros(8192, dtype=torch.uint8))
    record = signature_of(nn.Linear(2, 2)).tensors[0]
    scalar = msgspec.structs.replace(record, shape=(), offset=512)
    empty = msgspec.structs.replace(record, shape=(0, 3), offset=1024)
    assert arena.tensor(scalar, 4096).shape == ()
    assert arena.tensor(scalar, 4096).data_ptr() == arena.address_range.start + 4608
    assert arena.tensor(empty, 0).shape == (0, 3)


def test_an_unknown_dtype_is_a_typed_error() -> None:
    record = msgspec.structs.replace(signature_of(nn.Linear(2, 2)).tensors[0], dtype="F4")
    with pytest.raises(StageError, match="F4"):
        WeightArena(torch.zeros(4096, dtype=torch.uint8)).tensor(record, 0)


@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("os", "system"),
        ("diffusers_modules.local", "X"),
        ("diffusers", "NoSuch"),
        ("transformers", "__name__"),
        ("transformers", "Trainer"),
        ("diffusers", "ConfigMixin"),
        ("transformers", "pipeline"),
    ],
)
def test_only_classes_of_the_two_libraries(library: str, name: str) -> None:
    with pytest.raises(UnknownClass):
        resolve(library, name)


def test_a_dropped_generation_does_not_come_back() -> None:
    filled = Filled(tiny.vae())
    resident = ResidentBlobs(filled.arena)
    resident.expect("blob", 4096, 1)
    resident.build("blob", 1, [filled.signature], lambda: None)
    first = resident.views("blob", filled.signature)
    assert resident.drop("blob", 2) == [], "another generation"
    assert resident.drop("blob", 1) == [first]
    with pytest.raises(NotResident):
        resident.views("blob", filled.signature)
    # A build that was under way when the blob was dropped leaves nothing.
    resident.expect("blob", 4096, 2)
    resident.build("blob", 2, [filled.signature], lambda: resident.drop("blob", 2) and None)
    with pytest.raises(NotResident):
        resident.views("blob", filled.signature)


def test_kept_views_serve_the_next_blob_at_their_place_and_no_other() -> None:
    filled = Filled(tiny.vae())
    resident = ResidentBlobs(filled.arena)

    def build(blob: str, offset: int, generation: int) -> BlobViews:
        resident.expect(blob, offset, generation)
        resident.build(blob, generation, [filled.signature], lambda: None)
        return resident.views(blob, filled.signature)

    first = build("a", 4096, 1)
    for views in resident.drop("a", 1):
        resident.keep(views)
    elsewhere = build("b", 0, 2)
    assert elsewhere is not first and elsewhere.bound[0].data_ptr() == first.bound[0].data_ptr() - 4096
    assert build("c", 4096, 3) is first
    resident.drop("c", 3)
    assert build("d", 4096, 4) is not first, "dropped but not kept"


def test_the_shelf_forgets_the_longest_unused() -> None:
    filled = Filled(tiny.vae())
    shelf = ViewShelf(capacity=2 * len(filled.signature.tensors))
    for offset in (0, 512, 4096):
        shelf.put(BlobViews.build(filled.arena, filled.signature, offset, lambda: None))
    assert shelf.take(filled.signature, 0) is None
    assert shelf.take(filled.signature, 512) is not None and shelf.take(filled.signature, 512) is None

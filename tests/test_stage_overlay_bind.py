"""Overlays over base weights: what a bind touches, what an unbind gives back, what a run may not leave."""

from collections.abc import Iterator, Sequence

import msgspec
import pytest
import torch
from torch import Tensor, nn

from stage_kit import signature_of
from understudy_demo import tiny
from understudyd.stage.errors import NotResident, SkeletonMismatch
from understudyd.stage.overlays import OverlayLayout
from understudyd.stage.skeleton import Skeleton
from understudyd.stage.views import BlobViews, ResidentBlobs, WeightArena
from understudyd.store.records import TensorRecord

BASE_AT, OTHER_AT = 4096, 1 << 20


class Scene:
    """A VAE's skeleton, two base blobs and overlays that hold a number each, in one arena."""

    def __init__(self) -> None:
        self.signature = signature_of(tiny.vae())
        self.skeleton = Skeleton(self.signature)
        self.memory = torch.zeros(4 << 20, dtype=torch.uint8)
        self.arena = WeightArena(self.memory)
        self.base = self._blob(BASE_AT, 1.0)
        self.other = self._blob(OTHER_AT, 2.0)
        self._free_at = 2 << 20
        self.paths = [record.path for record in self.signature.tensors]

    def _blob(self, offset: int, value: float) -> BlobViews:
        for record in self.signature.tensors:
            self.arena.tensor(record, offset).fill_(value)
        return BlobViews.build(self.arena, self.signature, offset, lambda: None)

    def layout(self, slots: Sequence[int], **changes: object) -> OverlayLayout:
        tensors, at = [], 0
        for slot in slots:
            tensors.append(msgspec.structs.replace(self.signature.tensors[slot], offset=at, **changes))
            at += -(-tensors[-1].size_bytes // 512) * 512
        return OverlayLayout(repr(tensors), tuple(tensors))

    def overlay(self, slots: Sequence[int], value: float) -> BlobViews:
        layout = self.layout(slots)
        views = BlobViews.build(self.arena, layout, self._free_at, lambda: None)
        for tensor in views.bound:
            tensor.fill_(value)
        self._free_at += 1 << 18
        return views

    def values(self) -> list[float]:
        """The first number of every tensor that is bound."""
        return [tensor.flatten()[0].item() for _, tensor in self.skeleton.tensors()]

    def expected(self, base: float, **overlays: Sequence[int]) -> list[float]:
        values = [base] * len(self.paths)
        for value, slots in overlays.items():
            for slot in slots:
                values[slot] = float(value.removeprefix("v"))
        return values


class Slots(dict[str, Tensor]):
    """Counts who is written to."""

    writes = 0

    def __setitem__(self, key: str, value: Tensor) -> None:
        Slots.writes += 1
        super().__setitem__(key, value)


@pytest.fixture
def scene() -> Iterator[Scene]:
    with torch.no_grad():
        yield Scene()


def test_an_overlay_lies_over_its_slots_and_nothing_else(scene: Scene) -> None:
    first, second = scene.overlay([0, 5, 9], 7), scene.overlay([5, 6], 8)
    for overlay, expected in (
        (first, scene.expected(1, v7=[0, 5, 9])),
        (second, scene.expected(1, v8=[5, 6])),
        (None, scene.expected(1)),
        (second, scene.expected(1, v8=[5, 6])),
    ):
        assert scene.skeleton.bind(scene.base, overlay)
        assert scene.values() == expected
        assert not scene.skeleton.bind(scene.base, overlay), "it is there already"
        assert scene.skeleton.strays(scene.arena.address_range) == []
    assert scene.skeleton.bind(scene.other, second)
    assert scene.values() == scene.expected(2, v8=[5, 6])
    assert scene.skeleton.bind(scene.other)
    assert scene.values() == scene.expected(2)


def test_from_one_overlay_to_another_only_their_slots_are_touched(scene: Scene) -> None:
    scene.skeleton._owners = [Slots(owner) for owner in scene.skeleton._owners]
    first, second = scene.overlay(range(10), 7), scene.overlay(range(5, 20), 8)

    def writes(base: BlobViews, overlay: BlobViews | None) -> int:
        before = Slots.writes
        scene.skeleton.bind(base, overlay)
        return Slots.writes - before

    everything = len(scene.paths)
    assert everything > 60
    assert writes(scene.base, first) == everything + 10
    assert writes(scene.base, second) == 10 + 15
    assert writes(scene.base, None) == 15
    assert writes(scene.base, first) == 10
    assert writes(scene.other, first) == everything + 10


def test_an_overlay_that_leaves_gives_its_slots_back_to_the_base(scene: Scene) -> None:
    first, second = scene.overlay([0, 5, 9], 7), scene.overlay([5, 6], 8)
    scene.skeleton.bind(scene.base, first)
    scene.skeleton.unbind(second)
    assert scene.values() == scene.expected(1, v7=[0, 5, 9])
    scene.skeleton.unbind(first)
    assert scene.values() == scene.expected(1)
    assert not scene.skeleton.bind(scene.base), "the base is bound as it is"
    scene.skeleton.bind(scene.base, first)
    scene.skeleton.unbind(scene.base)
    assert not scene.skeleton.is_bound
    assert len(scene.skeleton.strays(scene.arena.address_range)) == len(scene.paths)
    scene.skeleton.unbind(first)
    assert scene.skeleton.bind(scene.base, first)
    assert scene.values() == scene.expected(1, v7=[0, 5, 9])


def test_what_a_run_moved_is_restored_from_the_overlay_where_there_is_one(scene: Scene) -> None:
    overlay = scene.overlay([0, 5, 9], 7)
    scene.skeleton.bind(scene.base, overlay)
    scene.skeleton.module.to(torch.float64)
    assert scene.skeleton.is_dirty
    displaced = scene.skeleton.restore()
    assert sum(t.dtype == torch.float64 for t in displaced) == len(scene.paths)
    assert scene.values() == scene.expected(1, v7=[0, 5, 9])
    assert scene.skeleton.strays(scene.arena.address_range) == []
    assert {t.dtype for _, t in scene.skeleton.tensors()} == {torch.float32}
    assert scene.skeleton.bind(scene.base)
    assert scene.values() == scene.expected(1)


def test_a_moved_component_is_bound_whole(scene: Scene) -> None:
    """The next request may come on stage before the last one's tensors are put back."""
    first, second = scene.overlay([0, 5], 7), scene.overlay([5, 6], 8)
    scene.skeleton.bind(scene.base, first)
    for key in (*scene.skeleton._owners[7],):
        scene.skeleton._owners[7][key] = nn.Parameter(torch.zeros(1), requires_grad=False)
    scene.skeleton._is_dirty = True
    assert scene.skeleton.bind(scene.base, first)
    assert scene.values() == scene.expected(1, v7=[0, 5])
    assert scene.skeleton.bind(scene.base, second)
    assert scene.values() == scene.expected(1, v8=[5, 6])


def test_a_replaced_buffer_is_put_back_with_an_overlay_bound() -> None:
    torch.manual_seed(0)
    module = tiny.stable_diffusion(1).text_encoder
    signature = signature_of(module)
    arena = WeightArena(torch.zeros(signature.size_bytes + (1 << 20), dtype=torch.uint8))
    base = BlobViews.build(arena, signature, 0, lambda: None)
    weight = next(i for i, record in enumerate(signature.tensors) if record.path.endswith("q_proj.weight"))
    kept = msgspec.structs.replace(signature.tensors[weight], offset=0)
    overlay = BlobViews.build(arena, OverlayLayout("l", (kept,)), signature.size_bytes, lambda: None)
    skeleton = Skeleton(signature)
    skeleton.bind(base, overlay)
    (slot,) = [i for i, record in enumerate(signature.tensors) if record.kind != "parameter"][:1]
    skeleton._owners[slot][skeleton._keys[slot]] = torch.zeros(1)
    skeleton.restore()
    assert skeleton.strays(arena.address_range) == []
    assert skeleton._owners[weight][skeleton._keys[weight]] is overlay.bound[0]


@pytest.mark.parametrize(
    "changes", [{"path": "no.such.weight"}, {"shape": (1, 1)}, {"dtype": "F16"}, {"kind": "buffer"}]
)
def test_an_overlay_of_another_component_is_refused(scene: Scene, changes: dict[str, object]) -> None:
    with pytest.raises(SkeletonMismatch, match="overlay"):
        scene.skeleton.fit(scene.layout([3], **changes))
    layout = scene.layout([3], **changes)
    scene.skeleton.bind(scene.base)
    with pytest.raises(SkeletonMismatch):
        scene.skeleton.bind(scene.base, BlobViews.build(scene.arena, layout, 0, lambda: None))
    assert scene.values() == scene.expected(1), "nothing was bound"


def test_an_overlay_over_tied_weights_is_refused(monkeypatch: pytest.MonkeyPatch, scene: Scene) -> None:
    first, second, *_ = scene.signature.tensors
    twin: TensorRecord = msgspec.structs.replace(second, alias_of=first.path)
    tied = msgspec.structs.replace(scene.signature, tensors=(first, twin))
    monkeypatch.setattr(scene.skeleton, "signature", tied)
    for slot in (0, 1):
        with pytest.raises(SkeletonMismatch):
            scene.skeleton.fit(scene.layout([slot]))


def test_overlays_share_the_books_of_blobs(scene: Scene) -> None:
    resident = ResidentBlobs(scene.arena)
    layout = scene.layout([0, 5])
    resident.expect("overlay", 2 << 20, 3)
    resident.build("overlay", 3, [layout], lambda: None)
    views = resident.views("overlay", layout)
    assert [record.path for record in layout.tensors] == [scene.paths[0], scene.paths[5]]
    assert len(views.bound) == 2
    assert resident.drop("overlay", 3) == [views]
    resident.keep(views)
    with pytest.raises(NotResident):
        resident.views("overlay", layout)
    resident.expect("another", 2 << 20, 4)
    resident.build("another", 4, [layout], lambda: None)
    assert resident.views("another", layout) is views, "views of one layout and place are used again"

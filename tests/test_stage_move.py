"""Extents that change their place: every byte arrives, and the same images come out of the new place."""

from collections.abc import Iterator

import pytest
import torch

from stage_kit import ALIGN_BYTES, Family, Rig, pixels, rig_over, two_models
from understudyd.core.events import ExtentMoved, MoveFailed, ViewsBuilt
from understudyd.stage import views
from understudyd.stage.views import WeightArena


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return two_models(tmp_path_factory.mktemp("family"))


@pytest.fixture
def rig(family: Family) -> Iterator[Rig]:
    with rig_over(family) as rig:
        yield rig


@pytest.mark.parametrize("shift", [16, 100, 128, 1000, 4096])
@pytest.mark.parametrize("piece", [64, 96, 1 << 20])
def test_every_byte_arrives_however_the_places_overlap(
    monkeypatch: pytest.MonkeyPatch, shift: int, piece: int
) -> None:
    monkeypatch.setattr(views, "_MOVE_PIECE_BYTES", piece)
    memory = torch.randint(0, 256, (8192,), dtype=torch.uint8)
    before = memory.clone()
    WeightArena(memory).move_down(shift, 0, 1000)
    assert torch.equal(memory[:1000], before[shift : shift + 1000])
    assert torch.equal(memory[max(1000, shift + 1000) :], before[max(1000, shift + 1000) :])


def test_a_moved_model_makes_the_same_images(rig: Rig, family: Family) -> None:
    """Its weights slide down a page at a time over themselves while it is bound; then it runs again."""
    rig._free_at = ALIGN_BYTES
    rig.serve("a", "b")
    first = pixels(rig.run("a"))
    for component in rig.store.model("a").components:
        key, size_bytes = component.blob.sha256, component.blob.size_bytes
        offset = rig.offsets[key]
        rig.stage.drop_views(key, 1)
        rig.stage.move_extent(key, offset, offset - ALIGN_BYTES, size_bytes, 2)
        rig.wait_for(ExtentMoved(key, 2))
        rig.stage.build_views(key, offset - ALIGN_BYTES, 2)
        rig.wait_for(ViewsBuilt(key, 2))
    assert pixels(rig.run("a")) == first == family.plain_images("a")
    assert pixels(rig.run("b")) == family.plain_images("b")
    assert rig.strays() == []


def test_a_move_that_cannot_be_done_is_reported(rig: Rig) -> None:
    rig.stage.move_extent("blob", 4096, 0, 2 * rig.arena.numel(), 3)
    rig.wait_until(lambda: any(isinstance(event, MoveFailed) for event in rig.events))
    (failed,) = [event for event in rig.events if isinstance(event, MoveFailed)]
    assert (failed.blob, failed.generation) == ("blob", 3) and failed.message

"""Folds beside the stage: how they end, what they leave, and the models that are derived with them."""

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from adapter_kit import Making
from overlay_kit import UNET, AdaptedFamily, Derived, OverlayRig, adapted_stable_diffusion
from stage_kit import DEADLINE_S, pixels
from understudy_demo import tiny
from understudyd.core.events import (
    FoldCancelled,
    FoldFailed,
    FoldFinished,
    ModelPreparationFailed,
    ModelPrepared,
    ViewsBuilt,
    ViewsFailed,
)
from understudyd.core.types import ErrorCode, Outcome
from understudyd.stage import fold_job
from understudyd.stage.device import CpuDevice
from understudyd.stage.fold_crew import FoldCrew
from understudyd.stage.fold_job import FoldJob
from understudyd.stage.views import WeightArena
from understudyd.store.adapters.overlays import OverlaidComponent

STYLE = (("style", 0.8),)
TWO = (("style", 0.8), ("shape", -0.35))
WORDS = (("words", 0.6),)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> AdaptedFamily:
    family = adapted_stable_diffusion(tmp_path_factory.mktemp("family"))
    family.add("other", tiny.stable_diffusion(2))
    return family


@pytest.fixture
def rig(family: AdaptedFamily) -> Iterator[OverlayRig]:
    rig = OverlayRig(family)
    yield rig
    rig.close()


def unet_overlay(rig: OverlayRig, adapters: Any = STYLE) -> OverlaidComponent:
    return rig.derive("sd", adapters).overlays["unet"]


# -- one job ---------------------------------------------------------------------------------------


class RecordingDevice(CpuDevice):
    """Says when it was waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def wait(self, mark: None) -> None:
        self.waits += 1


def job_of(rig: OverlayRig, overlay: OverlaidComponent) -> tuple[FoldJob, torch.Tensor, WeightArena]:
    """A job that the rig's stage knows nothing of, its extent full of ones, and the rig's arena."""
    sources = rig.sources(overlay)
    offset = rig.take(overlay.plan.size_bytes)
    extent = rig.arena[offset : offset + overlay.plan.size_bytes].fill_(0xFF)
    return FoldJob(overlay.key, 5, offset, overlay.plan, sources), extent, WeightArena(rig.arena)


@pytest.mark.parametrize("stop_at", [0, 1, 3])
def test_a_cancelled_job_stops_before_the_next_step(rig: OverlayRig, stop_at: int) -> None:
    rig.serve("sd")
    overlay = unet_overlay(rig, TWO)
    job, extent, arena = job_of(rig, overlay)
    device, steps = RecordingDevice(), 0

    def breathe() -> None:
        nonlocal steps
        steps += 1
        if steps == stop_at:
            job.cancel()

    if stop_at == 0:
        job.cancel()
    assert job.run(arena, device, breathe, FoldCrew()) == FoldCancelled(overlay.key, 5)
    assert device.waits == 1, "nothing may write to the extent any more"
    assert steps == stop_at
    unfinished = overlay.plan.weights[stop_at + 1].folded.offset
    assert extent[unfinished:].eq(0xFF).all()


def test_a_cancel_in_the_last_step_still_counts(rig: OverlayRig) -> None:
    rig.serve("sd")
    overlay = unet_overlay(rig)
    job, _, arena = job_of(rig, overlay)
    steps = 0

    def count() -> None:
        nonlocal steps
        steps += 1

    assert job.run(arena, CpuDevice(), count, FoldCrew()) == FoldFinished(overlay.key, 5)
    last, steps = steps, 0

    def cancel_in_the_last() -> None:
        count()
        if steps == last:
            again.cancel()

    again, _, arena = job_of(rig, overlay)
    assert again.run(arena, CpuDevice(), cancel_in_the_last, FoldCrew()) == FoldCancelled(overlay.key, 5)


@pytest.mark.parametrize(
    ("error", "code"),
    [(RuntimeError("a bug"), ErrorCode.INTERNAL), (MemoryError(), ErrorCode.OUT_OF_MEMORY)],
)
def test_whatever_goes_wrong_is_told(
    monkeypatch: pytest.MonkeyPatch, rig: OverlayRig, error: Exception, code: ErrorCode
) -> None:
    rig.serve("sd")
    overlay = unet_overlay(rig)

    def broken(*_args: object) -> Iterator[int]:
        yield 0
        raise error

    job, _, arena = job_of(rig, overlay)
    device = RecordingDevice()
    with monkeypatch.context() as patched:
        patched.setattr(fold_job, "fold_steps", broken)
        outcome = job.run(arena, device, lambda: None, FoldCrew())
    assert isinstance(outcome, FoldFailed)
    assert (outcome.overlay, outcome.generation, outcome.code) == (overlay.key, 5, code)
    assert type(error).__name__ in outcome.message
    assert device.waits == 1


# -- on the stage ----------------------------------------------------------------------------------


def test_a_result_that_is_not_finite_is_the_callers_fault(rig: OverlayRig) -> None:
    rig.serve("sd")
    overlay = unet_overlay(rig, (("shape", 1.0), ("style", 1e39)))
    generation = rig.start_fold(overlay)
    rig.wait_until(lambda: any(isinstance(event, FoldFailed) for event in rig.events))
    (failed,) = [event for event in rig.events if isinstance(event, FoldFailed)]
    assert (failed.overlay, failed.generation) == (overlay.key, generation)
    assert failed.code is ErrorCode.BAD_REQUEST
    assert "'style' at 1e+39" in failed.message and "unet." in failed.message
    model = rig.serve_derived("sd", STYLE)
    assert pixels(rig.run(model)) != pixels(rig.run("sd")), "the stage goes on"


def test_a_fold_without_an_adapters_blob_fails_and_the_next_one_does_not(rig: OverlayRig) -> None:
    rig.serve("sd")
    overlay = unet_overlay(rig)
    rig.stage.fold(overlay.key, 9, 0, overlay.plan, rig.sources(overlay)[:1])
    rig.wait_until(lambda: any(isinstance(event, FoldFailed) for event in rig.events))
    (failed,) = [event for event in rig.events if isinstance(event, FoldFailed)]
    assert (
        failed.code is ErrorCode.INTERNAL
        and overlay.plan.adapters[0].record.blob.sha256[:12] in failed.message
    )
    rig.fold(overlay)


def test_two_adapters_of_one_blob_are_one_source(rig: OverlayRig, family: AdaptedFamily) -> None:
    """Equal factors under two names, say with other alphas: the core holds one extent for both."""
    family.adapt("sd", "style-again", Making(UNET))
    adapters = (("style", 0.5), ("style-again", 0.25))
    overlay = unet_overlay(rig, adapters)
    first, second = overlay.plan.adapters
    assert first.record.blob.sha256 == second.record.blob.sha256
    expected = family.fused("sd", adapters).unet.state_dict()
    rig.serve("sd")
    sources = dict.fromkeys(rig.sources(overlay))
    offset = rig.take(overlay.plan.size_bytes)
    rig.stage.fold(overlay.key, 2, offset, overlay.plan, list(sources))
    rig.wait_for(FoldFinished(overlay.key, 2))
    for weight in overlay.plan.weights:
        owner = weight.base.path.removesuffix(".weight")
        folded = WeightArena(rig.arena).tensor(weight.folded, offset)
        assert torch.equal(folded, expected[f"{owner}.base_layer.weight"])


def test_a_fold_is_cancelled_while_it_runs_and_while_it_waits(
    monkeypatch: pytest.MonkeyPatch, rig: OverlayRig
) -> None:
    rig.serve("sd")
    has_begun, may_go_on = threading.Event(), threading.Event()

    def breathe() -> None:
        has_begun.set()
        assert may_go_on.wait(60)

    monkeypatch.setattr(rig.stage._slices, "take", breathe)
    running, waiting = unet_overlay(rig, STYLE), unet_overlay(rig, TWO)
    first = rig.start_fold(running)
    second = rig.start_fold(waiting)
    assert has_begun.wait(60)
    rig.stage.cancel_fold(running.key, first + 100)
    rig.stage.cancel_fold("unknown", first)
    rig.stage.cancel_fold(waiting.key, second)
    rig.stage.cancel_fold(running.key, first)
    may_go_on.set()
    rig.wait_for(FoldCancelled(running.key, first))
    rig.wait_for(FoldCancelled(waiting.key, second))
    generation = rig.fold(running)
    rig.stage.cancel_fold(running.key, generation)
    told = [e for e in rig.events if isinstance(e, FoldFinished | FoldFailed | FoldCancelled)]
    assert told == [
        FoldCancelled(running.key, first),
        FoldCancelled(waiting.key, second),
        FoldFinished(running.key, generation),
    ]


def test_closing_ends_a_fold(monkeypatch: pytest.MonkeyPatch, family: AdaptedFamily) -> None:
    rig = OverlayRig(family)
    rig.serve("sd")
    has_begun = threading.Event()
    monkeypatch.setattr(rig.stage._slices, "take", has_begun.set)
    overlay = unet_overlay(rig, TWO)
    generation = rig.start_fold(overlay)
    assert has_begun.wait(60)
    rig.close()
    (told,) = [e for e in rig.events if isinstance(e, FoldFinished | FoldCancelled)]
    assert (told.overlay, told.generation) == (overlay.key, generation)
    assert not [t for t in threading.enumerate() if t.name == "stage-fold" and t in rig.stage._workers]


def test_a_request_is_not_disturbed_by_folds_beside_it(rig: OverlayRig, family: AdaptedFamily) -> None:
    """Every step of the request waits until another fold has ended: they interleave for certain."""
    expected = family.plain_images("sd", steps=6)
    rig.serve("sd")
    overlay = unet_overlay(rig, TWO)
    place = rig.take(overlay.plan.size_bytes)
    rig.sources(overlay)

    def fold_beside(_request_id: str, _step: int, _steps: int) -> None:
        generation = rig.start_fold(overlay, place)
        rig.wait_for(FoldFinished(overlay.key, generation))
        rig.start_fold(overlay, place)

    rig.on_progress = fold_beside
    assert pixels(rig.run("sd", steps=6)) == expected
    rig.on_progress = lambda *_: None
    rig.wait_until(lambda: sum(isinstance(e, FoldFinished) for e in rig.events) == 12)


# -- derived models --------------------------------------------------------------------------------


def test_a_derived_model_shares_what_its_base_has(rig: OverlayRig) -> None:
    derived = rig.derive("sd", WORDS)
    rig.prepare(derived)
    assert [e for e in rig.events if isinstance(e, ModelPrepared)] == [ModelPrepared(derived.key, True)]
    assert len(rig.stage.skeletons()) == 3, "its base was prepared for it, and nobody told"
    rig.stage.prepare_model("sd")
    rig.wait_until(lambda: rig.is_prepared("sd"))
    own, theirs = rig.stage._repertoire.find(derived.key), rig.stage._repertoire.find("sd")
    assert own.parts["tokenizer"] is theirs.parts["tokenizer"]
    assert [a.skeleton for a in own.components] == [b.skeleton for b in theirs.components]
    assert [p.name for p in own.components if p.overlay] == ["text_encoder", "unet"]
    assert not any(part.overlay for part in theirs.components)


def forget(rig: OverlayRig, *keys: str) -> None:
    """Forget models, and wait until the preparing thread has come by."""
    for key in keys:
        rig.stage.forget_model(key)
    rig.stage.start_custom_classes()


def test_what_is_derived_lives_without_its_base_and_nothing_lives_longer(rig: OverlayRig) -> None:
    model = rig.serve_derived("sd", STYLE)
    other = rig.serve_derived("sd", TWO)
    expected = pixels(rig.run(model)), pixels(rig.run(other))
    forget(rig, "sd")
    assert (pixels(rig.run(model)), pixels(rig.run(other))) == expected
    forget(rig, other)
    assert rig.fail(other).code is ErrorCode.INTERNAL
    assert pixels(rig.run(model)) == expected[0]
    skeletons = [weakref.ref(skeleton) for skeleton in rig.stage.skeletons()]
    assert len(skeletons) == 3
    forget(rig, model)
    deadline_s = time.monotonic() + DEADLINE_S
    while any(reference() for reference in skeletons):  # a thread that has announced its end may still end
        assert time.monotonic() < deadline_s, "something keeps a skeleton alive"
        gc.collect()
    again = rig.derive("sd", STYLE)
    rig.prepare(again)
    assert pixels(rig.run(model)) == expected[0], "its blobs and overlay still have views"


def test_an_overlay_that_two_models_share_outlives_either(rig: OverlayRig) -> None:
    """The text encoder's overlay is the same for both."""
    both = (("words", 0.6), ("style", 0.5))
    one, other = rig.derive("sd", WORDS), rig.derive("sd", both)
    shared = one.overlays["text_encoder"]
    assert other.overlays["text_encoder"].key == shared.key
    assert other.overlays["unet"].key != one.overlays["unet"].key
    rig.serve_derived("sd", WORDS), rig.serve_derived("sd", both)
    expected = pixels(rig.run(other.key))
    forget(rig, one.key)
    rig.stage.drop_views(shared.key, _generation_of(rig, shared.key))
    rig.fold(shared, rig.offsets[shared.key])
    assert pixels(rig.run(other.key)) == expected


def _generation_of(rig: OverlayRig, overlay: str) -> int:
    return next(
        e.generation for e in reversed(rig.events) if isinstance(e, FoldFinished) and e.overlay == overlay
    )


def test_views_of_an_overlay_can_be_built_before_its_model_is_prepared(rig: OverlayRig) -> None:
    derived = rig.derive("sd", STYLE)
    rig.serve("sd")
    rig.fold(derived.overlays["unet"])
    rig.prepare(derived)
    assert pixels(rig.run(derived.key)) != pixels(rig.run("sd"))


def test_views_of_an_overlay_that_nobody_knows(rig: OverlayRig) -> None:
    rig.stage.build_views("0" * 64, 0, 3)
    rig.wait_until(lambda: any(isinstance(e, ViewsFailed) for e in rig.events))


@pytest.mark.parametrize("broken", ["base", "component", "blob"])
def test_what_cannot_be_derived_is_told(rig: OverlayRig, broken: str) -> None:
    derived, other = rig.derive("sd", STYLE), rig.derive("other", STYLE)
    wrong = {
        "base": Derived("wrong", "no-such-model", derived.overlays),
        "component": Derived("wrong", "sd", {"transformer": derived.overlays["unet"]}),
        "blob": Derived("wrong", "sd", other.overlays),
    }[broken]
    rig.stage.prepare_derived(wrong.key, wrong.base, wrong.overlays)
    rig.wait_until(lambda: any(isinstance(e, ModelPreparationFailed) for e in rig.events))
    (failed,) = [e for e in rig.events if isinstance(e, ModelPreparationFailed)]
    assert failed.key == "wrong"
    rig.prepare(derived)


def test_a_request_whose_overlay_is_not_there_fails_alone(rig: OverlayRig) -> None:
    rig.serve("sd")
    derived = rig.derive("sd", STYLE)
    rig.prepare(derived)
    ended = rig.fail(derived.key)
    assert (ended.outcome, ended.code) == (Outcome.FAILED, ErrorCode.INTERNAL)
    rig.fold(derived.overlays["unet"])
    assert pixels(rig.run(derived.key)) != pixels(rig.run("sd"))


def test_an_overlay_moves_like_any_extent(rig: OverlayRig) -> None:
    model = rig.serve_derived("sd", STYLE)
    expected = pixels(rig.run(model))
    overlay = unet_overlay(rig)
    gap = rig.take(overlay.plan.size_bytes)
    elsewhere = rig.take(overlay.plan.size_bytes)
    generation = rig.fold(overlay, elsewhere)
    rig.stage.drop_views(overlay.key, generation)
    rig.stage.move_extent(overlay.key, elsewhere, gap, overlay.plan.size_bytes, generation + 1)
    rig.stage.build_views(overlay.key, gap, generation + 1)
    rig.wait_for(ViewsBuilt(overlay.key, generation + 1))
    assert pixels(rig.run(model)) == expected
    assert rig.stage.strays() == []

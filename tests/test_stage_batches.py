"""Several requests in one call of a pipeline: each has a picture, progress and an end of its own."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, PixArtSigmaPipeline, StableDiffusionXLPipeline, WanPipeline
from torch import Tensor

from family_kit import distance
from stage_kit import Family, Rig, asked, pixels, rig_over, two_models
from test_stage_requests import Gate
from understudy_demo import tiny
from understudyd.core.events import ImagesEncoded, LeaseEnded, ModelPrepared, RunEnded, RunStarted
from understudyd.core.types import ErrorCode, Outcome
from understudyd.stage.batching import can_share, shared_arguments, split
from understudyd.stage.calls import read_call
from understudyd.stage.errors import StageError
from understudyd.stage.pictures import Made

CLOSE = 1
"""A batched picture's bytes are so close to the unbatched one's, of 255."""

WISHES: dict[str, dict[str, Any]] = {
    "x": {"prompt": "a red circle", "seed": 7},
    "y": {"prompt": "a blue house by the sea", "seed": 8},
    "z": {"prompt": "", "seed": 9},
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    family = two_models(tmp_path_factory.mktemp("family"))
    family.add("xl", tiny.stable_diffusion_xl(3))
    return family


@pytest.fixture
def rig(family: Family) -> Iterator[Rig]:
    with rig_over(family, "a", "b", "xl") as rig:
        yield rig


def put(rig: Rig, model: str, wishes: dict[str, dict[str, Any]] = WISHES, **more: Any) -> None:
    """All of them on deck, as one run."""
    (first, *_), params = wishes, {name: asked(**wish | more) for name, wish in wishes.items()}
    rig.stage.put_on_deck(first, model, params.pop(first), params)


def results(rig: Rig, *names: str) -> dict[str, list[bytes]]:
    for name in names:
        rig.wait_for(ImagesEncoded(name))
        rig.wait_for(LeaseEnded(name))
    return {name: pixels(rig.stage.take_result(name)) for name in names}


class Calls:
    """What the UNet was given, call by call."""

    def __init__(self, rig: Rig) -> None:
        self.samples: list[Tensor] = []
        rig.skeleton("UNet2DConditionModel").module.register_forward_pre_hook(self._seen)

    def _seen(self, _module: Any, args: tuple[Any, ...]) -> None:
        self.samples.append(args[0].clone())


@pytest.mark.parametrize("more", [{}, {"scheduler": "euler_a"}, {"negative_prompt": "blur", "guidance": 4.0}])
@pytest.mark.parametrize("model", ["a", "xl"])
def test_each_gets_the_picture_it_gets_alone(rig: Rig, model: str, more: dict[str, Any]) -> None:
    alone = {name: pixels(rig.run(model, **wish, **more)) for name, wish in WISHES.items()}
    calls = Calls(rig) if model == "a" else SimpleNamespace(samples=[None, None])
    put(rig, model, **more)
    together = results(rig, *WISHES)
    assert len(calls.samples) == 2, "two steps, one call each"
    for name in WISHES:
        assert distance(together[name], alone[name]) <= CLOSE
        others = [distance(together[name], alone[other]) for other in WISHES if other != name]
        assert min(others) > 8 * CLOSE, "another request's picture would not have been told from its own"


def test_the_noise_is_that_of_each_request_alone_bit_for_bit(rig: Rig) -> None:
    calls = Calls(rig)
    for wish in WISHES.values():
        rig.run("a", **wish)
    alone = [sample[0] for sample in calls.samples[::2]]  # of two steps the first; of guidance one half
    put(rig, "a")
    results(rig, *WISHES)
    batch = calls.samples[6]
    assert batch.shape[0] == 6
    assert all(torch.equal(batch[i], noise) for i, noise in enumerate(alone))


def test_requests_for_several_images_keep_theirs(rig: Rig) -> None:
    wishes = {"x": {"seed": 1, "images": 2}, "y": {"seed": 2}, "z": {"seed": 3, "images": 2}}
    alone = {name: pixels(rig.run("a", **wish)) for name, wish in wishes.items()}
    put(rig, "a", wishes)
    together = results(rig, *wishes)
    assert {name: len(images) for name, images in together.items()} == {"x": 2, "y": 1, "z": 2}
    assert all(distance(together[name], alone[name]) <= CLOSE for name in wishes)


def test_events_and_timings_of_a_batch(rig: Rig) -> None:
    put(rig, "a")
    results_of = {}
    for name in WISHES:
        rig.wait_for(ImagesEncoded(name))
        results_of[name] = rig.stage.take_result(name)
    for name in WISHES:
        finished = RunEnded(name, Outcome.FINISHED)
        assert rig.of(name) == [RunStarted(name), finished, LeaseEnded(name), ImagesEncoded(name)]
        assert [(step, steps) for who, step, steps in rig.progress if who == name] == [(1, 2), (2, 2)]
    assert len({r.timings.first_op_at_s for r in results_of.values()}) == 1
    assert [bool(r.components_bound) for r in results_of.values()] == [True, False, False], "one switch"
    encoded = [r.timings.encoded_at_s for r in results_of.values()]
    assert encoded == sorted(encoded) and len(set(encoded)) == 3


def test_one_that_is_cancelled_ends_at_once_and_the_others_go_on(rig: Rig) -> None:
    put(rig, "a", steps=4)

    def cancel(name: str, step: int, _steps: int) -> None:
        if (name, step) == ("y", 2):
            rig.stage.cancel_run("y", ErrorCode.DEADLINE_EXCEEDED)

    rig.on_progress = cancel
    together = results(rig, "x", "z")
    rig.wait_for(LeaseEnded("y"))
    (ended,) = [e for e in rig.events if isinstance(e, RunEnded) and e.request_id == "y"]
    assert (ended.outcome, ended.code) == (Outcome.CANCELLED, ErrorCode.DEADLINE_EXCEEDED)
    assert rig.events.index(ended) < rig.events.index(RunEnded("x", Outcome.FINISHED))
    assert ("y", 3, 4) not in rig.progress and ("x", 4, 4) in rig.progress
    for name in ("x", "z"):
        assert distance(together[name], pixels(rig.run("a", **WISHES[name], steps=4))) <= CLOSE


def test_one_that_is_cancelled_on_deck_is_answered_while_it_waits(rig: Rig) -> None:
    gate = Gate(rig)
    running = rig.submit("b")
    gate.wait_reached()
    put(rig, "a")
    rig.wait_until_waiting()
    rig.stage.cancel_run("x", ErrorCode.CANCELLED)
    rig.wait_until(lambda: any(isinstance(e, RunEnded) and e.request_id == "x" for e in rig.events))
    assert RunEnded(running, Outcome.FINISHED) not in rig.events
    gate.open()
    together = results(rig, "y", "z")
    assert RunStarted("x") not in rig.events
    assert distance(together["y"], pixels(rig.run("a", **WISHES["y"]))) <= CLOSE


def test_when_all_are_cancelled_the_run_stops(rig: Rig) -> None:
    put(rig, "a", steps=50)

    def cancel(name: str, step: int, _steps: int) -> None:
        if step == 2:
            rig.stage.cancel_run(name, ErrorCode.CANCELLED)

    rig.on_progress = cancel
    for name in WISHES:
        assert rig.ended(name).outcome is Outcome.CANCELLED
    assert max(step for _, step, _ in rig.progress) <= 3
    assert [type(e) for e in rig.of("x")] == [RunStarted, RunEnded, LeaseEnded]


def test_what_cannot_be_made_together_is_made_one_by_one(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """A batch that fails blames nobody: here memory is short for more than two samples at a time."""
    alone = {name: pixels(rig.run("a", **wish)) for name, wish in WISHES.items()}

    def refuse(_module: Any, args: tuple[Any, ...]) -> None:
        if args[0].shape[0] > 2:
            raise RuntimeError("too large")

    rig.skeleton("UNet2DConditionModel").module.register_forward_pre_hook(refuse)
    put(rig, "a")
    assert results(rig, *WISHES) == alone
    assert rig.stage.strays() == []
    assert "one by one" in caplog.text


def test_one_that_fails_alone_fails_alone(rig: Rig) -> None:
    """The wish of `y` breaks the batch and then itself; the others get their pictures."""

    def refuse(_module: Any, args: tuple[Any, ...]) -> None:
        if args[0].shape[0] > 2 or len(seen) == 2:
            seen.append("failed")
            raise RuntimeError("no")

    def count(name: str, step: int, _steps: int) -> None:
        if step == 2:
            seen.append(name)

    seen: list[str] = ["at the first call it is the batch's"]
    rig.on_progress = count
    rig.skeleton("UNet2DConditionModel").module.register_forward_pre_hook(refuse)
    put(rig, "a")
    outcomes = {name: rig.ended(name) for name in WISHES}
    assert sorted(ended.outcome for ended in outcomes.values()) == ["failed", "finished", "finished"]
    (failed,) = (ended for ended in outcomes.values() if ended.outcome is Outcome.FAILED)
    assert failed.code is ErrorCode.INTERNAL and "no" in failed.message


def test_a_bad_option_is_everybodys_own_fault(rig: Rig) -> None:
    put(rig, "a", options={"nonsense": 1})
    for name in WISHES:
        ended = rig.ended(name)
        assert ended.code is ErrorCode.BAD_REQUEST and "nonsense" in ended.message


def test_the_core_is_told_which_models_can(rig: Rig) -> None:
    assert ModelPrepared("a", can_batch=True) in rig.events


# -- which can, and with what --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pipeline", "can"),
    [
        (StableDiffusionXLPipeline, True),
        (PixArtSigmaPipeline, False),  # by its types a negative prompt is one text
        (WanPipeline, False),  # makes videos
        (DiffusionPipeline, False),
    ],
)
def test_signatures_tell_who_can(pipeline: type[Any], can: bool) -> None:
    call = read_call(pipeline) if pipeline is not DiffusionPipeline else read_call(_Wordless)
    assert can_share(call) is can


class _Wordless:
    def __call__(self, batch_size: int = 1, generator: list[torch.Generator] | None = None) -> None: ...


def test_settings_that_differ_do_not_mix() -> None:
    one = {"prompt": "a", "prompt_2": "b", "num_inference_steps": 3, "num_images_per_prompt": 2}
    shared = shared_arguments([one, one | {"prompt": "c"}], [2, 1])
    assert shared == {"prompt": ["a", "a", "c"], "prompt_2": ["b", "b", "b"], "num_inference_steps": 3}
    with pytest.raises(StageError, match="different settings"):
        shared_arguments([one, one | {"num_inference_steps": 4}], [1, 1])
    with pytest.raises(StageError, match="different settings"):
        shared_arguments([one, one | {"negative_prompt": "d"}], [1, 1])


def test_a_pipeline_that_makes_another_number_of_images_is_noticed() -> None:
    made = Made(torch.arange(3.0), is_video=False)
    assert [part.value.tolist() for part in split(made, [2, 1])] == [[0.0, 1.0], [2.0]]
    with pytest.raises(StageError, match="3 images for 4"):
        split(made, [2, 2])

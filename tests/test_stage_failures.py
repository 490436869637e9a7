"""What goes wrong on the stage, and what two threads share there: each fails the request alone."""

import functools
import shutil
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from stage_kit import DEADLINE_S, Family, Rig, pixels, rig_over, two_models
from understudy_demo import tiny
from understudyd.core.events import (
    EncodingFailed,
    LeaseEnded,
    ModelPreparationFailed,
    ModelPrepared,
    RunEnded,
    RunStarted,
    ViewsBuilt,
    ViewsFailed,
)
from understudyd.core.types import ErrorCode, Outcome
from understudyd.pipelines.installed import PipelineUnavailable
from understudyd.stage import performer
from understudyd.stage.errors import UnknownClass, told_of_preparation


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return two_models(tmp_path_factory.mktemp("family"))


@pytest.fixture
def rig(family: Family) -> Iterator[Rig]:
    with rig_over(family, "a", "b") as rig:
        yield rig


# -- failures -------------------------------------------------------------------------------------


def test_what_the_pipeline_refuses_is_the_callers_fault(rig: Rig) -> None:
    ended = rig.fail("a", width=33, height=32)
    assert (ended.outcome, ended.code) == (Outcome.FAILED, ErrorCode.BAD_REQUEST)
    assert "divisible by 8" in ended.message
    assert not any(isinstance(e, RunStarted) for e in rig.events), "a bad request takes no stage time"
    rig.run("a")


def test_an_argument_the_pipeline_does_not_know(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    original = StableDiffusionPipeline.__call__

    def call(self: Any, prompt: str, num_inference_steps: int, generator: Any, output_type: str) -> Any:
        known = {"num_inference_steps": num_inference_steps, "output_type": output_type}
        return original(self, prompt, generator=generator, **known)

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", call)
    rig.stage.prepare_model("a")
    rig.wait_for(ModelPrepared("a", can_batch=False))
    ended = rig.fail("a", negative_prompt="ugly")
    assert ended.code is ErrorCode.BAD_REQUEST
    assert "negative prompt" in ended.message
    rig.run("a")


class Trouble:
    """Raises in the middle of the UNet, a number of times."""

    def __init__(self, rig: Rig, error: Exception, times: int = 1) -> None:
        self._error = error
        self._times = times
        self.hook = rig.skeleton("UNet2DConditionModel").module.conv_out.register_forward_hook(self._raise)

    def _raise(self, *_args: Any) -> None:
        if self._times:
            self._times -= 1
            raise self._error


def test_a_failing_pipeline_leaves_the_stage_usable(
    rig: Rig, family: Family, caplog: pytest.LogCaptureFixture
) -> None:
    trouble = Trouble(rig, RuntimeError("secret /path went wrong"))
    ended = rig.fail("a")
    trouble.hook.remove()
    assert (ended.outcome, ended.code) == (Outcome.FAILED, ErrorCode.INTERNAL)
    assert "went wrong" in ended.message and len(ended.message) < 400
    assert [type(e) for e in rig.of("r1")] == [RunStarted, RunEnded, LeaseEnded]
    rig.run("b")
    rig.wait_until(lambda: "Traceback" in caplog.text)  # it is written when the request has its answer
    assert pixels(rig.run("a")) == family.plain_images("a")


def test_a_value_error_after_the_first_step_is_ours(rig: Rig) -> None:
    steps = iter([None, ValueError("bug")])

    def fail_second(*_args: Any) -> None:
        if error := next(steps, None):
            raise error

    hook = rig.skeleton("UNet2DConditionModel").module.register_forward_hook(fail_second)
    assert rig.fail("a", steps=4).code is ErrorCode.INTERNAL
    hook.remove()


def test_out_of_memory_once_is_tried_again(rig: Rig, family: Family) -> None:
    trouble = Trouble(rig, MemoryError())
    assert pixels(rig.run("a")) == family.plain_images("a")
    trouble.hook.remove()


def test_out_of_memory_twice_fails_that_request_alone(rig: Rig) -> None:
    trouble = Trouble(rig, RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), times=2)
    ended = rig.fail("a")
    trouble.hook.remove()
    assert ended.code is ErrorCode.OUT_OF_MEMORY
    rig.run("a")


def test_an_encoder_that_fails(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args: Any) -> Any:
        raise OSError("no encoder")

    monkeypatch.setattr(performer, "encode_images", broken)
    request_id = rig.submit("a")
    rig.wait_for(EncodingFailed(request_id, "OSError: no encoder"))
    assert rig.ended(request_id).outcome is Outcome.FINISHED


def test_a_model_that_is_not_prepared(rig: Rig) -> None:
    assert rig.fail("nobody").code is ErrorCode.INTERNAL
    rig.stage.forget_model("a")
    rig.stage.prepare_model("b")  # in order behind the forgetting
    rig.wait_until(lambda: rig.events.count(ModelPrepared("b")) == 2)
    assert "not prepared" in rig.fail("a").message
    rig.run("b")


def test_a_blob_without_views(rig: Rig) -> None:
    rig.run("a")
    blob = rig.store.model("a").components[0].blob.sha256
    rig.stage.drop_views(blob, 1)
    assert "no views" in rig.fail("a").message
    assert len(rig.strays()) == len(rig.skeleton("CLIPTextModel").signature.tensors), "no view outlives it"
    rig.run("b")
    rig.stage.build_views(blob, rig.offsets[blob], 2)
    rig.wait_for(ViewsBuilt(blob, 2))
    rig.run("a")


def test_views_of_a_moved_blob_are_the_new_ones(rig: Rig, family: Family) -> None:
    rig.run("a")
    component = rig.store.model("a").components[1]
    rig.stage.drop_views(component.blob.sha256, 1)
    old = rig.offsets[component.blob.sha256]
    new = rig.fill(component.blob)
    rig.arena[old : old + component.blob.size_bytes] = 0
    rig.stage.build_views(component.blob.sha256, new, 2)
    rig.wait_for(ViewsBuilt(component.blob.sha256, 2))
    result = rig.run("a")
    assert result.components_bound == (component.name,)
    assert pixels(result) == family.plain_images("a")


def test_views_can_be_built_before_the_model_is_prepared(family: Family) -> None:
    rig = Rig(family.store)
    try:
        for component in family.store.model("a").components:
            rig.load(component.blob)
        rig.stage.prepare_model("a")
        rig.wait_for(ModelPrepared("a"))
        assert pixels(rig.run("a")) == family.plain_images("a")
    finally:
        rig.close()


def test_views_of_an_unknown_blob_fail(rig: Rig) -> None:
    rig.stage.build_views("0" * 64, 0, 1)
    rig.wait_until(lambda: any(isinstance(e, ViewsFailed) for e in rig.events))


def test_a_broken_model_folder_fails_its_preparation_alone(
    family: Family, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    other = Family(tmp_path_factory.mktemp("broken"))
    other.add("broken", tiny.stable_diffusion(1))
    shutil.rmtree(other.store.model_folder("broken") / "tokenizer")
    rig = Rig(other.store)
    try:
        rig.stage.prepare_model("broken")
        rig.stage.prepare_model("missing")
        rig.wait_until(lambda: sum(isinstance(e, ModelPreparationFailed) for e in rig.events) == 2)
        broken, _ = [e.message for e in rig.events if isinstance(e, ModelPreparationFailed)]
        assert "/" not in broken and "add the model again with --replace" in broken, "a client may read it"
        assert str(other.store.path) in caplog.text, "the log has it all"
    finally:
        rig.close()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            OSError("no /var/lib/store/m/tokenizer"),
            "OSError, which the daemon's log has in full; add the mod",
        ),
        (
            ImportError("from 'x' (/opt/venv/x.py)"),
            "ImportError, which the daemon's log has in full; add the",
        ),
        (UnknownClass("no Unet here; upgrade"), "UnknownClass: no Unet here; upgrade"),
        (
            PipelineUnavailable(
                "paint (no '/my models/a b.bin' or /srv/x/y.z, see https://h/p/q); repair it"
            ),
            "PipelineUnavailable: paint (no 'a b.bin' or y.z, see https://h/p/q); repair it",
        ),
    ],
)
def test_no_place_on_this_machine_is_told_of_a_preparation(error: Exception, told: str) -> None:
    assert told_of_preparation(error).startswith(told)


def test_a_constructor_that_rewrites_configs_sees_the_canonical_one_each_time(
    rig: Rig, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = StableDiffusionPipeline.__init__
    seen: list[int] = []

    @functools.wraps(original)
    def rewriting(self: Any, **arguments: Any) -> None:
        unet = arguments["unet"]
        seen.append(unet.config.sample_size)
        unet.register_to_config(sample_size=unet.config.sample_size * 2)
        original(self, **arguments)

    monkeypatch.setattr(StableDiffusionPipeline, "__init__", rewriting)
    rig.stage.prepare_model("a")
    rig.wait_until(lambda: rig.events.count(ModelPrepared("a")) == 2)
    assert [rig.run("a").infos[0].width for _ in range(2)] == [64, 64]
    assert set(seen) == {16}
    monkeypatch.undo()
    assert rig.run("b").infos[0].width == 32, "what the run of another model rewrote was put back"


def test_two_threads_may_use_one_tokenizer(rig: Rig) -> None:
    """Padding is a state of the shared object: without a lock, lengths mix up or Rust refuses."""
    tokenizer = rig.stage._repertoire.find("a").parts["tokenizer"]
    assert tokenizer is rig.stage._repertoire.find("b").parts["tokenizer"]
    assert type(tokenizer).__name__ == "CLIPTokenizer"
    wrong: list[object] = []

    def use(padding: str, expected: int) -> None:
        for _ in range(200):
            try:
                found = len(tokenizer("abc", padding=padding, max_length=77, truncation=True).input_ids)
            except Exception as error:
                wrong.append(error)
                return
            if found != expected:
                wrong.append(found)

    users = [threading.Thread(target=use, args=a) for a in (("max_length", 77), ("longest", 5))]
    for user in users:
        user.start()
    for user in users:
        user.join(DEADLINE_S)
    assert wrong == []


def test_computing_threads_make_no_gradients(rig: Rig) -> None:
    modes: list[tuple[bool, bool]] = []
    hook = rig.skeleton("AutoencoderKL").module.decoder.register_forward_hook(
        lambda *_: modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
    )
    rig.run("a")
    hook.remove()
    assert modes == [(False, False)]

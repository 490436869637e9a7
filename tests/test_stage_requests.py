"""What happens to requests on deck and on stage: order, progress, cancellation, failures, hand-over."""

import functools
import shutil
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from stage_kit import DEADLINE_S, Family, Rig, pixels
from understudy_demo import tiny
from understudyd.core.events import (
    EncodingFailed,
    ImagesEncoded,
    LeaseEnded,
    ModelPreparationFailed,
    ModelPrepared,
    RunEnded,
    RunStarted,
    ViewsBuilt,
    ViewsFailed,
)
from understudyd.core.types import ErrorCode, Outcome
from understudyd.stage import performer
from understudyd.stage import stage as stage_module
from understudyd.stage.device import CpuDevice


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    family = Family(tmp_path_factory.mktemp("family"))
    family.add("a", tiny.stable_diffusion(1))
    family.add("b", tiny.stable_diffusion(2))
    return family


@pytest.fixture
def rig(family: Family) -> Iterator[Rig]:
    rig = Rig(family.store)
    rig.serve("a", "b")
    yield rig
    rig.close()


class Gate:
    """Holds the computing thread at a component's call until it is opened."""

    def __init__(self, rig: Rig, class_name: str = "UNet2DConditionModel") -> None:
        self._reached = threading.Event()
        self._opened = threading.Event()
        self._hook = rig.skeleton(class_name).module.register_forward_pre_hook(self._hold)

    def wait_reached(self) -> None:
        assert self._reached.wait(DEADLINE_S)

    def open(self) -> None:
        self._hook.remove()
        self._opened.set()

    def _hold(self, _module: Any, _args: Any) -> None:
        self._reached.set()
        assert self._opened.wait(DEADLINE_S)


# -- order ----------------------------------------------------------------------------------------


def test_the_events_of_a_finished_run(rig: Rig) -> None:
    rig.run("a")
    assert rig.of("r1") == [
        RunStarted("r1"),
        RunEnded("r1", Outcome.FINISHED),
        LeaseEnded("r1"),
        ImagesEncoded("r1"),
    ]


def test_hand_over_in_the_order_of_the_deck(rig: Rig, family: Family) -> None:
    gate = Gate(rig)
    first = rig.submit("a")
    gate.wait_reached()
    second, third = rig.submit("b"), rig.submit("a", seed=8)
    rig.wait_until_waiting()
    assert rig.of(second) == [], "nothing is said about a request that waits"
    gate.open()
    for request_id in (first, second, third):
        rig.wait_for(ImagesEncoded(request_id))
    turns = [e for e in rig.events if isinstance(e, RunStarted | RunEnded)]
    assert turns == [
        event
        for request_id in (first, second, third)
        for event in (RunStarted(request_id), RunEnded(request_id, Outcome.FINISHED))
    ]
    results = [rig.stage.take_result(request_id) for request_id in (first, second, third)]
    assert [pixels(r) for r in results] == [
        family.plain_images("a"),
        family.plain_images("b"),
        family.plain_images("a", seed=8),
    ]


def test_timings_come_in_order_and_name_the_gap(rig: Rig) -> None:
    gate = Gate(rig)
    first = rig.submit("a")
    gate.wait_reached()
    second = rig.submit("b")
    rig.wait_until_waiting()
    gate.open()
    rig.wait_for(ImagesEncoded(first))
    rig.wait_for(ImagesEncoded(second))
    alone, waited = rig.stage.take_result(first).timings, rig.stage.take_result(second).timings
    for t in (alone, waited):
        assert t.deck_at_s <= t.free_at_s <= t.first_op_at_s - t.bind_s
        assert t.first_op_at_s < t.run_ended_at_s < t.encoded_at_s
    assert alone.gap_s is None and alone.free_at_s == alone.deck_at_s
    assert waited.free_at_s == alone.run_ended_at_s
    assert waited.gap_s == waited.first_op_at_s - alone.run_ended_at_s
    assert waited.gap_s >= waited.bind_s > 0


def test_an_idle_stage_leaves_no_gap(rig: Rig) -> None:
    rig.run("a")
    assert rig.run("b").timings.gap_s is None


def test_spans_of_a_run(rig: Rig) -> None:
    rig.run("a")
    lanes = {span.lane: span for span in rig.spans}
    assert set(lanes) == {"prepare", "views", "stage", "bind", "encode"}
    bind, stage, encode = lanes["bind"], lanes["stage"], lanes["encode"]
    assert {bind.name, stage.name, encode.name} == {"a"} and stage.request == encode.request == "r1"
    assert all(span.start_s <= span.end_s for span in rig.spans)
    assert bind.end_s <= stage.start_s <= stage.steps_s[0] <= stage.end_s <= encode.start_s


def test_a_result_is_taken_once(rig: Rig) -> None:
    rig.run("a")
    with pytest.raises(KeyError):
        rig.stage.take_result("r1")


def test_progress_counts_every_step(rig: Rig) -> None:
    rig.run("a", steps=3)
    assert rig.progress == [("r1", 1, 3), ("r1", 2, 3), ("r1", 3, 3)]


# -- devices that run behind ----------------------------------------------------------------------


class SlowDevice(CpuDevice):
    """Like a GPU: its work is done only when somebody says so."""

    def __init__(self) -> None:
        super().__init__()
        self.done = threading.Event()
        self.waiting = threading.Event()

    def wait(self, mark: None) -> None:
        self.waiting.set()
        assert self.done.wait(DEADLINE_S)


def test_the_lease_ends_when_the_device_is_done_but_the_next_starts_at_once(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = SlowDevice()
    monkeypatch.setattr(stage_module, "open_device", lambda name: device)
    rig = Rig(family.store)
    try:
        rig.serve("a", "b")
        first, second = rig.submit("a"), rig.submit("b")
        rig.wait_for(RunEnded(first, Outcome.FINISHED))
        rig.wait_for(RunEnded(second, Outcome.FINISHED))
        assert device.waiting.wait(DEADLINE_S)
        assert not any(isinstance(e, LeaseEnded | ImagesEncoded) for e in rig.events)
        device.done.set()
        rig.wait_for(ImagesEncoded(first))
        rig.wait_for(ImagesEncoded(second))
        assert rig.events.index(LeaseEnded(first)) < rig.events.index(ImagesEncoded(first))
    finally:
        device.done.set()
        rig.close()


# -- cancellation ---------------------------------------------------------------------------------


def test_cancelled_between_steps(rig: Rig) -> None:
    rig.cancel_at_step("r1", 2)
    ended = rig.ended(rig.submit("a", steps=10))
    assert ended == RunEnded("r1", Outcome.CANCELLED, ErrorCode.CANCELLED, ended.message)
    assert rig.progress[-1] == ("r1", 2, 10)
    assert [type(e) for e in rig.of("r1")] == [RunStarted, RunEnded, LeaseEnded]


def test_cancelled_on_deck_never_starts(rig: Rig) -> None:
    gate = Gate(rig)
    first = rig.submit("a")
    gate.wait_reached()
    second = rig.submit("b")
    rig.wait_until_waiting()
    rig.stage.cancel_run(second, ErrorCode.DEADLINE_EXCEEDED)
    ended = rig.ended(second)  # while the first still holds the baton
    assert (ended.outcome, ended.code) == (Outcome.CANCELLED, ErrorCode.DEADLINE_EXCEEDED)
    assert rig.of(second) == [ended, LeaseEnded(second)]
    third = rig.submit("b")
    gate.open()
    rig.wait_for(ImagesEncoded(first))
    rig.wait_for(ImagesEncoded(third))


def test_cancelled_before_a_thread_took_it_up(rig: Rig) -> None:
    request_id = rig.submit("a")
    rig.stage.cancel_run(request_id, ErrorCode.CLIENT_GONE)
    assert rig.ended(request_id).outcome in (Outcome.CANCELLED, Outcome.FINISHED)
    rig.run("a")


def test_the_first_reason_to_cancel_counts(rig: Rig) -> None:
    gate = Gate(rig)
    request_id = rig.submit("a")
    gate.wait_reached()
    rig.stage.cancel_run(request_id, ErrorCode.CLIENT_GONE)
    rig.stage.cancel_run(request_id, ErrorCode.CANCELLED)
    gate.open()
    assert rig.ended(request_id).code is ErrorCode.CLIENT_GONE


def test_cancelling_the_unknown_and_the_answered_is_no_error(rig: Rig) -> None:
    rig.stage.cancel_run("never seen", ErrorCode.CANCELLED)
    rig.run("a")
    rig.stage.cancel_run("r1", ErrorCode.CANCELLED)
    assert sum(isinstance(e, RunEnded) for e in rig.events) == 1


def test_closing_cancels_what_runs(family: Family) -> None:
    rig = Rig(family.store)
    rig.serve("a")
    gate = Gate(rig)
    ids = [rig.submit("a") for _ in range(3)]
    gate.wait_reached()
    closing = threading.Thread(target=rig.close)
    closing.start()
    rig.wait_for(LeaseEnded(ids[-1]))
    gate.open()
    closing.join(DEADLINE_S)
    assert not closing.is_alive()
    assert {rig.ended(i).outcome for i in ids} == {Outcome.CANCELLED}


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
    assert "Traceback" in caplog.text
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
    family: Family, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = Family(tmp_path_factory.mktemp("broken"))
    other.add("broken", tiny.stable_diffusion(1))
    shutil.rmtree(other.store.model_folder("broken") / "tokenizer")
    rig = Rig(other.store)
    try:
        rig.stage.prepare_model("broken")
        rig.stage.prepare_model("missing")
        rig.wait_until(lambda: sum(isinstance(e, ModelPreparationFailed) for e in rig.events) == 2)
    finally:
        rig.close()


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

"""What happens to requests on deck and on stage: order, progress, cancellation, hand-over."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from stage_kit import DEADLINE_S, Family, Rig, pixels, rig_over, two_models
from understudyd.core.events import (
    ImagesEncoded,
    LeaseEnded,
    RunEnded,
    RunStarted,
)
from understudyd.core.types import ErrorCode, Outcome
from understudyd.stage import stage as stage_module
from understudyd.stage.device import CpuDevice


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return two_models(tmp_path_factory.mktemp("family"))


@pytest.fixture
def rig(family: Family) -> Iterator[Rig]:
    with rig_over(family, "a", "b") as rig:
        yield rig


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

"""Turns for a fold between two operations of a run."""

import threading
import time

from understudyd.stage.slices import Slices

LONG_S = 60.0


class Folder:
    """Takes turns on a thread of its own, and notes each step."""

    def __init__(self, slices: Slices, steps: int) -> None:
        self.steps_done = 0
        self.is_done = threading.Event()
        self._slices = slices
        self._thread = threading.Thread(target=self._fold, args=(steps,), daemon=True)
        self._thread.start()

    def _fold(self, steps: int) -> None:
        for _ in range(steps):
            self._slices.take()
            self.steps_done += 1
        self._slices.end()
        self.is_done.set()


def until(condition: object, deadline_s: float = LONG_S) -> None:
    ends_s = time.monotonic() + deadline_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < ends_s
        threading.Event().wait(0.001)


def test_nobody_waits_while_nothing_computes() -> None:
    slices = Slices(is_busy=lambda: False, patience_s=LONG_S)
    folder = Folder(slices, steps=1000)
    assert folder.is_done.wait(LONG_S)


def test_giving_costs_nothing_when_nobody_wants_a_turn() -> None:
    slices = Slices(is_busy=lambda: True, turn_s=LONG_S)
    started_s = time.monotonic()
    for _ in range(10_000):
        slices.give()
    assert time.monotonic() - started_s < LONG_S / 10


def test_beside_a_run_work_goes_on_in_the_turns_it_is_given() -> None:
    slices = Slices(is_busy=lambda: True, turn_s=LONG_S, patience_s=LONG_S)
    folder = Folder(slices, steps=100)
    until(lambda: slices._is_wanted)
    assert folder.steps_done == 0
    slices.give()  # returns when the work is done, long before the turn's end
    assert folder.steps_done == 100
    assert folder.is_done.wait(LONG_S)


def test_a_turn_ends_when_its_time_is_up() -> None:
    now_s = [0.0]
    slices = Slices(is_busy=lambda: True, turn_s=1.0, patience_s=LONG_S, clock=lambda: now_s[0])
    turns: list[int] = []

    def fold() -> None:
        for _ in range(6):
            slices.take()
            turns.append(int(now_s[0]))
            now_s[0] += 0.5
        slices.end()

    thread = threading.Thread(target=fold, daemon=True)
    thread.start()
    for turn in range(3):
        until(lambda: slices._is_wanted)
        slices.give()
        assert len(turns) == 2 * (turn + 1)
    thread.join(LONG_S)
    assert turns == [0, 0, 1, 1, 2, 2]


def test_who_waits_in_vain_goes_on_beside() -> None:
    slices = Slices(is_busy=lambda: True, patience_s=0.001)
    folder = Folder(slices, steps=20)
    assert folder.is_done.wait(LONG_S)


def test_a_run_goes_on_when_the_one_with_the_turn_hangs() -> None:
    slices = Slices(is_busy=lambda: True, turn_s=0.01, patience_s=LONG_S)
    hangs = threading.Event()

    def fold() -> None:
        slices.take()
        hangs.wait(LONG_S)

    thread = threading.Thread(target=fold, daemon=True)
    thread.start()
    until(lambda: slices._is_wanted)
    slices.give()
    assert thread.is_alive()
    hangs.set()
    thread.join(LONG_S)

"""The baton on its own: who gets it, who waits, who is woken."""

import threading
from collections.abc import Callable

from understudyd.stage.baton import Baton, Turn

DEADLINE_S = 30.0


class Taker:
    """A thread that takes a turn; `taken` is None while it waits."""

    def __init__(self, turn: Turn) -> None:
        self.taken: bool | None = None
        self._done = threading.Event()
        self._turn = turn
        self._thread = threading.Thread(target=self._take)
        self._thread.start()

    def wait(self) -> bool:
        assert self._done.wait(DEADLINE_S)
        self._thread.join()
        assert self.taken is not None
        return self.taken

    def _take(self) -> None:
        self.taken = self._turn.take()
        self._done.set()


def until(is_so: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(int(DEADLINE_S / 0.001)):
        if is_so():
            return
        pause.wait(0.001)
    raise AssertionError("never came")


def test_the_first_turn_holds_the_baton_at_once() -> None:
    turn = Baton().draw()
    assert turn.take()
    assert turn.leave() is None


def test_turns_are_granted_in_the_order_they_were_drawn() -> None:
    baton = Baton()
    first, second, third = (baton.draw() for _ in range(3))
    late = Taker(third)  # arrives before the second
    until(baton.someone_waits)
    assert first.leave() is None, "the second has not arrived: nobody to wait for"
    assert second.take()
    assert second.leave() is third
    assert late.wait()


def test_the_leaving_thread_waits_until_its_successor_has_begun() -> None:
    baton = Baton()
    first, second = baton.draw(), baton.draw()
    taker = Taker(second)
    until(baton.someone_waits)
    successor = first.leave()
    assert successor is second and second.is_awaited
    assert taker.wait()
    waiting = threading.Thread(target=successor.wait_begun)
    waiting.start()
    assert waiting.is_alive()
    second.begin()
    waiting.join(DEADLINE_S)
    assert not waiting.is_alive()


def test_a_woken_turn_did_not_get_the_baton_and_its_leaving_frees_nobody() -> None:
    baton = Baton()
    first, second, third = (baton.draw() for _ in range(3))
    taker = Taker(second)
    until(baton.someone_waits)
    second.wake()
    assert not taker.wait()
    assert second.leave() is None
    assert not third.is_granted
    first.leave()
    assert third.is_granted


def test_a_wake_that_comes_first_is_not_lost() -> None:
    baton = Baton()
    baton.draw()
    second = baton.draw()
    second.wake()
    assert not second.take()


def test_a_granted_turn_that_leaves_unused_passes_the_baton_on() -> None:
    baton = Baton()
    first, second, third = (baton.draw() for _ in range(3))
    first.leave()
    assert second.is_granted
    second.leave()
    assert third.is_granted
    second.wait_begun()  # returns: leaving counts as having begun

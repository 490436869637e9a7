"""What other threads tell the event loop arrives whole, in order, and in one turn what comes in a row."""

import asyncio
import threading

from understudyd.shell.arrivals import Arrivals

THREADS, EACH = 4, 500


def test_nothing_is_lost_and_each_threads_order_stays() -> None:
    taken: list[list[tuple[int, int]]] = []

    async def run() -> None:
        arrivals = Arrivals(asyncio.get_running_loop(), taken.append)
        threads = [
            threading.Thread(target=lambda who=who: [arrivals.put((who, n)) for n in range(EACH)])  # type: ignore[misc]
            for who in range(THREADS)
        ]
        for thread in threads:
            thread.start()
        async with asyncio.timeout(30):
            while sum(map(len, taken)) < THREADS * EACH:
                await asyncio.sleep(0)
        for thread in threads:
            thread.join()

    asyncio.run(run())
    told = [item for items in taken for item in items]
    assert sorted(told) == [(who, n) for who in range(THREADS) for n in range(EACH)]
    for who in range(THREADS):
        assert [n for other, n in told if other == who] == list(range(EACH))


def test_what_comes_in_a_row_is_taken_together() -> None:
    taken: list[list[int]] = []

    async def run() -> None:
        arrivals = Arrivals(asyncio.get_running_loop(), taken.append)
        for n in range(3):
            arrivals.put(n)
        await asyncio.sleep(0)
        arrivals.put(3)
        await asyncio.sleep(0)

    asyncio.run(run())
    assert taken == [[0, 1, 2], [3]]


def test_who_tells_something_while_the_last_is_taken_is_heard() -> None:
    taken: list[list[str]] = []

    async def run() -> None:
        def take(items: list[str]) -> None:
            taken.append(items)
            if items == ["first"]:
                arrivals.put("second")

        arrivals: Arrivals[str] = Arrivals(asyncio.get_running_loop(), take)
        arrivals.put("first")
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    asyncio.run(run())
    assert taken == [["first"], ["second"]]

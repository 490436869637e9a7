"""How long the core machine takes for one event; run by hand: `python tests/core_timing.py`.

Closed loop: 1,000 requests always wait, Zipf popularity over 1,000 models of three blobs, 64 families
of which share the VAE, room for a tenth. Virtual time; only `handle` and `next_deadline_s` are on the
clock, which counts this thread's CPU time: on a shared machine others would be measured too.
"""

import argparse
import gc
import heapq
import itertools
import json
import random
from collections import defaultdict
from time import thread_time_ns

from core_kit import PAGE, blob, model
from understudyd.core import actions as ac
from understudyd.core import events as ev
from understudyd.core.machine import Machine
from understudyd.core.policy import PolicySettings
from understudyd.core.types import Outcome, RequestInfo


def measure(
    models: int, waiting: int, events: int, order: str, prefetch: bool, pool: float, seed: int
) -> dict[str, object]:
    """Microseconds of `handle` over all events, by quantile, and the slowest kinds."""
    dice = random.Random(seed)
    policy = PolicySettings(order=order, prefetch=prefetch, max_wait_s=1e9 if order == "fcfs" else 600.0)
    arena_bytes = models // 10 * 70 * PAGE
    machine = Machine(arena_bytes, pool_bytes=int(pool * arena_bytes), policy=policy, max_waiting=waiting + 1)
    names = [f"m{i}" for i in range(models)]
    weights = [1.0 / (i + 1) for i in range(models)]
    agenda: list[tuple[float, int, ev.Event]] = []
    order_of, ids, now_s = itertools.count(), itertools.count(), 0.0
    took: dict[str, list[int]] = defaultdict(list)
    deadline: list[int] = []

    def later(after_s: float, event: ev.Event) -> None:
        heapq.heappush(agenda, (now_s + after_s, next(order_of), event))

    def ask() -> ev.RequestReceived:
        name = dice.choices(names, weights)[0]
        return ev.RequestReceived(
            RequestInfo(f"r{next(ids)}", "c", name, dice.choice([0, 0, 0, 1]), now_s + 3600)
        )

    def tell(event: ev.Event) -> None:
        start = thread_time_ns()
        actions = machine.handle(event, now_s)
        middle = thread_time_ns()
        due_s = machine.next_deadline_s(now_s)
        end = thread_time_ns()
        took[type(event).__name__].append(middle - start)
        deadline.append(end - middle)
        for action in actions:
            perform(action)
        if due_s is not None and due_s <= now_s:
            tell(ev.Ticked())

    def perform(action: ac.Action) -> None:
        match action:
            case ac.StartLoad(load_id=load_id, from_pool=from_pool):
                under_way.add(load_id)
                later(action.size_bytes / PAGE * (0.002 if from_pool else 0.02), ev.LoadFinished(load_id))
            case ac.CancelLoad(load_id=load_id):
                if load_id in under_way:
                    later(0.01, ev.LoadCancelled(load_id))
            case ac.BuildViews():
                later(0.01, ev.ViewsBuilt(action.blob, action.generation))
            case ac.PrepareModel():
                later(0.2, ev.ModelPrepared(action.key))
            case ac.PutOnDeck(request_id=request_id):
                decks.append(request_id)
                go()
            case ac.AnswerRequest():
                later(0.0, ask())

    under_way: set[int] = set()
    decks: list[str] = []
    running: list[str] = []

    def go() -> None:
        if decks and not running:
            running.append(decks.pop())
            later(0.0, ev.RunStarted(running[0]))
            later(2.0, ev.RunEnded(running[0], Outcome.FINISHED))

    for i, name in enumerate(names):
        machine.handle(ev.ModelAdded(model(name, blob(f"vae{i % 64}", 5), 10 + i % 3, 50 + i % 10)), now_s)
    for loader_id in range(2):
        tell(ev.LoaderReady(loader_id))
    for _ in range(waiting):
        tell(ask())
    warm = 5 * waiting
    for step in range(warm + events):
        if step == warm:
            took.clear()
            deadline.clear()
            gc.collect()
        now_s, _, event = heapq.heappop(agenda)
        if isinstance(event, ev.LoadFinished | ev.LoadCancelled):
            if event.load_id not in under_way:
                continue  # it was cancelled, or finished before it could be
            under_way.remove(event.load_id)
        tell(event)
        if isinstance(event, ev.RunEnded):
            running.clear()
            later(0.001, ev.LeaseEnded(event.request_id))
            later(0.1, ev.ImagesEncoded(event.request_id))
            go()
    every = sorted(t for times in took.values() for t in times)

    def us(times: list[int], share: float) -> float:
        return round(sorted(times)[min(len(times) - 1, int(len(times) * share))] / 1000, 1)

    return {
        "order": order,
        "prefetch": prefetch,
        "pool": pool,
        "events": len(every),
        "waiting": len(machine.queue),
        "evictions": machine.residency.evictions,
        "handle_us": {"p50": us(every, 0.5), "p99": us(every, 0.99), "max": us(every, 1.0)},
        "next_deadline_us": {"p50": us(deadline, 0.5), "p99": us(deadline, 0.99)},
        "by_event_us": {k: [len(v), us(v, 0.5), us(v, 0.99)] for k, v in sorted(took.items())},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=1000)
    parser.add_argument("--waiting", type=int, default=1000)
    parser.add_argument("--events", type=int, default=20_000)
    chosen = parser.parse_args()
    for order, prefetch, pool in (
        ("resident_first", True, 0.0),
        ("resident_first", True, 3.0),
        ("fcfs", False, 0.0),
    ):
        numbers = measure(chosen.models, chosen.waiting, chosen.events, order, prefetch, pool, seed=1)
        print(json.dumps(numbers))


if __name__ == "__main__":
    main()

"""Percentiles and the figures that the demo and the benchmark report about the same kind of run."""

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from understudy.trace import Span


def percentile(values: Iterable[float], percent: float) -> float | None:
    """The smallest value that `percent` of the values do not exceed (nearest rank); None without values."""
    ordered = sorted(values)
    if not ordered:
        return None
    return ordered[max(1, math.ceil(len(ordered) * percent / 100)) - 1]


def switch_share(models: Sequence[str]) -> float:
    """The share of consecutive served requests that want another model; 0 below two requests."""
    if len(models) < 2:
        return 0.0
    return sum(a != b for a, b in pairwise(models)) / (len(models) - 1)


def gap_closed(ours: float, all_resident: float, on_demand: float) -> float:
    """How much of the way from `on_demand` to `all_resident` is covered: 0 none, 1 all of it.

    Raises `ValueError` when everything resident is no better: then there is no gap to speak of.
    """
    if all_resident <= on_demand:
        raise ValueError(
            f"all resident ({all_resident:.2f}/s) is not faster than on demand ({on_demand:.2f}/s); "
            "slow the loads down or quieten the machine"
        )
    return (ours - on_demand) / (all_resident - on_demand)


@dataclass(frozen=True, slots=True)
class Served:
    """One answered request as the caller saw it, monotonic seconds; `tier` is its model's on receipt."""

    index: int
    model: str
    tier: str
    sent_s: float
    ended_s: float


@dataclass(frozen=True, slots=True)
class Turn:
    """One request's turn on stage.

    `waited_s` is how long the stage stood idle before it although work had been sent: the visible switch
    time when the model `switched`. It includes everything: the wait for a load, the bind, and where the
    stage had nothing to do, the request's way to it.
    """

    served: Served
    span: Span
    switched: bool
    waited_s: float


def turns(served: Sequence[Served], stage: Sequence[Span]) -> list[Turn]:
    """Join what the callers saw with what the stage did, in the stage's order.

    Nothing here relies on a program's own word about its switches: the stage's spans say when it computed,
    the callers' clocks when work was there. Requests of one model are served in the order they were sent.
    """
    matched = _match(served, stage)
    turns_, oldest_s = [], math.inf
    for number in reversed(range(len(matched))):
        one, span = matched[number]
        oldest_s = min(oldest_s, one.sent_s)  # the first that was sent of all that had not begun yet
        before = matched[number - 1][1] if number else None
        free_s = before.end_s if before else -math.inf
        waited_s = max(0.0, span.start_s - max(free_s, oldest_s))
        turns_.append(Turn(one, span, before is None or before.name != span.name, waited_s))
    return turns_[::-1]


def _match(served: Sequence[Served], stage: Sequence[Span]) -> list[tuple[Served, Span]]:
    waiting: defaultdict[str, deque[Served]] = defaultdict(deque)
    for one in sorted(served, key=lambda one: one.sent_s):
        waiting[one.model].append(one)
    matched = []
    for span in sorted(stage, key=lambda span: span.start_s):
        line = waiting[span.name]
        if line and line[0].sent_s <= span.start_s:
            matched.append((line.popleft(), span))
    return matched


@dataclass(frozen=True, slots=True)
class Figures:
    """What a run comes to. Times in milliseconds unless named otherwise; percent of the stage's busy time."""

    requests: int
    models: int
    switches: int
    switch_share: float
    switch_ms_p50: float | None
    switch_ms_p99: float | None
    idle_while_waiting_percent: float
    throughput_per_s: float
    image_ms: float
    latency_s_p50: float
    latency_s_p99: float


def figures(taken: Sequence[Turn], elapsed_s: float | None = None) -> Figures:
    """Sum a run up. Throughput counts over `elapsed_s`: the first request sent to the last answer if None.

    Raises `ValueError` for a run without a single image.
    """
    if not taken:
        raise ValueError("no request was served, so there is nothing to measure")
    served = [turn.served for turn in taken]
    models = [one.model for one in served]
    busy_s = sum(turn.span.end_s - turn.span.start_s for turn in taken)
    if elapsed_s is None:
        elapsed_s = max(one.ended_s for one in served) - min(one.sent_s for one in served)
    latencies_s = [one.ended_s - one.sent_s for one in served]
    switches_s = visible_switches_s(taken)
    return Figures(
        requests=len(taken),
        models=len(set(models)),
        switches=sum(a != b for a, b in pairwise(models)),
        switch_share=switch_share(models),
        switch_ms_p50=_ms(percentile(switches_s, 50)),
        switch_ms_p99=_ms(percentile(switches_s, 99)),
        idle_while_waiting_percent=100 * sum(turn.waited_s for turn in taken) / busy_s,
        throughput_per_s=len(taken) / elapsed_s,
        image_ms=1e3 * busy_s / len(taken),
        latency_s_p50=percentile(latencies_s, 50) or 0.0,
        latency_s_p99=percentile(latencies_s, 99) or 0.0,
    )


def visible_switches_s(taken: Sequence[Turn], tier: str | None = None) -> list[float]:
    """The visible switch times, of requests whose model was in this tier when they came, or of all."""
    return [t.waited_s for t in taken if t.switched and (tier is None or t.served.tier == tier)]


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds

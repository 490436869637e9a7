"""A recording in the Trace Event Format, for ui.perfetto.dev and chrome://tracing.

After the format's description ("Trace Event Format", Google): complete events "X" with their duration, which
must nest in each thread; counters "C"; "b" and "e" for what overlaps, matched by category and id; "M" for the
names of processes and threads. Times are in microseconds.
"""

from collections.abc import Iterator
from typing import Any

import msgspec

from understudy.trace import QUEUE, REQUESTS, Recording, Span, by_lane

_PID = 1
_FACTS = ("size_bytes", "route", "outcome", "request", "tier")


def chrome_trace(recording: Recording) -> dict[str, Any]:
    """The document to be written as JSON. Time 0 is where the recording begins."""
    events = [*_metadata("process_name", 0, name="understudyd"), *_lanes(recording)]
    for number, span in enumerate(recording.spans):
        if span.lane == QUEUE:
            at_us = _us(recording, span.start_s)
            events.append(_event("C", "requests", at_us, 0, args={span.name: span.value or 0}))
        elif span.lane == REQUESTS:
            events += _request(recording, span, number)
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"began_at_monotonic_s": recording.begin_s, "is_cut": recording.is_cut},
    }


def written(recording: Recording) -> bytes:
    """The document as JSON."""
    return msgspec.json.encode(chrome_trace(recording))


def _lanes(recording: Recording) -> Iterator[dict[str, Any]]:
    """One thread for each row of each lane."""
    tid = 0
    for lane, rows in by_lane(recording.spans).items():
        for number, row in enumerate(rows):
            tid += 1
            yield from _metadata("thread_name", tid, name=lane if not number else f"{lane} ({number + 1})")
            yield from _metadata("thread_sort_index", tid, sort_index=tid)
            for span in row:
                yield from _work(recording, span, tid)


def _work(recording: Recording, span: Span, tid: int) -> Iterator[dict[str, Any]]:
    """A span, and in it the steps of a run, each from the end of the one before."""
    begin_us, end_us = _us(recording, span.start_s), _us(recording, span.end_s)
    name = f"{span.name} ({span.outcome})" if span.outcome else span.name
    yield _event("X", name, begin_us, tid, dur=end_us - begin_us, cat=span.lane, args=_facts(span))
    for number, ended_s in enumerate(span.steps_s, 1):
        step_end_us = min(_us(recording, ended_s), end_us)
        if not step_end_us:
            continue  # before the recording began
        yield _event("X", f"step {number}", begin_us, tid, dur=step_end_us - begin_us, cat="step")
        begin_us = step_end_us


def _request(recording: Recording, span: Span, number: int) -> Iterator[dict[str, Any]]:
    """From receipt to answer."""
    more = {"cat": "request", "id": f"{number:#x}"}
    yield _event("b", span.name, _us(recording, span.start_s), 0, args=_facts(span), **more)
    yield _event("e", span.name, _us(recording, span.end_s), 0, **more)


def _facts(span: Span) -> dict[str, Any]:
    return {name: value for name in _FACTS if (value := getattr(span, name))}


def _us(recording: Recording, moment_s: float) -> float:
    """Nothing begins before the recording does: viewers take negative times ill."""
    return round(1e6 * max(0.0, moment_s - recording.begin_s), 3)


def _event(phase: str, name: str, at_us: float, tid: int, **more: Any) -> dict[str, Any]:
    return {"ph": phase, "name": name, "ts": at_us, "pid": _PID, "tid": tid} | more


def _metadata(what: str, tid: int, **args: Any) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "name": what, "pid": _PID, "tid": tid, "args": args}

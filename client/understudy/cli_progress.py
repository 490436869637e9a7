"""What `understudy generate` shows on stderr while it waits. Imported when there is something to wait for."""

import contextlib
from collections.abc import Generator, Iterable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from understudy.errors import UnderstudyError
from understudy.render import duration
from understudy.request import Request, parts_of
from understudy.results import Hint, Result
from understudy.sync import Client
from understudy.wire import Accepted

_IN_FLIGHT = 8


def follow(client: Client, requests: list[Request], quiet: bool) -> Generator[Result, None, None]:
    """One result for each request, in order, with a progress bar on stderr."""
    if len(requests) > 1:
        with contextlib.closing(
            client.generate_many(requests, in_flight=_IN_FLIGHT, ordered=True)
        ) as results:
            yield from _counted(results, len(requests), quiet)
        return
    model, prompt, fields = parts_of(requests[0])
    with contextlib.closing(client.stream(model, prompt, **fields)) as events:
        yield _last(events) if quiet else _watch(events, model)


def _bars(quiet: bool = False) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=quiet,
    )


def _counted(results: Iterable[Result | UnderstudyError], count: int, quiet: bool) -> Iterator[Result]:
    with _bars(quiet) as bars:
        bar = bars.add_task("requests", total=count)
        for result in results:
            assert isinstance(result, Result)  # errors are raised
            bars.advance(bar)
            yield result


def _watch(events: Iterable[Hint | Result], model: str) -> Result:
    """Follow a request with a progress bar on stderr."""
    with _bars() as bars:
        bar = bars.add_task(f"{model}: asking the daemon", total=None)
        for event in events:
            if isinstance(event, Result):
                return event
            if isinstance(event, Accepted):
                bars.update(bar, description=f"{model}: {_place(event)}, model on {event.tier}")
            else:
                bars.update(bar, description=f"{model}: steps", completed=event.step, total=event.steps)
    raise AssertionError("a stream ends with a result or an error")


def _place(event: Accepted) -> str:
    place = "next" if event.position == 0 else f"{event.position} before it"
    wait_s = event.estimated_wait_s
    return place if wait_s is None or wait_s < 1.0 else f"{place}, in about {duration(wait_s)}"


def _last(events: Iterable[Hint | Result]) -> Result:
    *_, result = events
    assert isinstance(result, Result)
    return result

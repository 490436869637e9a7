"""What watching costs and shows: `python -m benchmarks.observe [--json] [--quick] [--document FILE]`.

Serves a bursty workload over the demo's small models, with room for a quarter of them, while the timeline is
on, as it always is, and the metrics are scraped ten times a second. In the last line:

* `span_ns`: one entry of the timeline, made and kept, the median of five rounds
* `spans_per_image`: how many of them an image comes with, loads and all
* `timeline_percent`: the two together, in percent of the time that the stage computed: under 1
* `scrape_ms_p50`, `scrape_ms_p99`: a whole scrape over the Unix socket, while the stage computes
* `scrape_kib`: how much text that is
* `trace_ms`: to fetch all that the timeline remembers of it, for `understudyctl trace`

With `--document` the example scrape of docs/observability.md is written anew from this run, between the marks
that it has there, and its picture beside it.
"""

import argparse
import asyncio
import http.client
import re
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.kit import DaemonSettings, json_line, percentile, running_daemon, say, show_table, timed
from understudy.paths import METRICS_SOCKET
from understudy.trace import STAGE, Recording, Span, fetch, lane
from understudy_demo import traffic
from understudy_demo.baseline import image_time_s
from understudy_demo.painted import make_family
from understudy_demo.serving import rate_for, short_runtime_dir
from understudy_demo.stocking import own_bytes, room_for, stock
from understudy_demo.workload import PROMPTS, Request, Shape, make_workload
from understudyd.shell.timeline import Timeline

SCRAPE_EVERY_S = 0.1
SHOWN_S = 12.0
PICTURE = "observability.png"
_BEGIN, _END = "<!-- scrape: begin -->", "<!-- scrape: end -->"
_STEPS, _SIZE, _LOAD_SHARE = 4, 64, 0.7


class NoMarks(Exception):
    """The document has no place for the scrape."""


def span_ns(rounds: int = 5, spans: int = 50_000) -> float:
    """The median time to make and keep one."""
    record = Timeline().record
    found = []
    for _ in range(rounds):
        began_ns = time.perf_counter_ns()
        for number in range(spans):
            record(Span(STAGE, "model", 1.0, 2.0, request="client/1", size_bytes=number))
        found.append((time.perf_counter_ns() - began_ns) / spans)
    return statistics.median(found)


@dataclass(slots=True)
class Scraper:
    """Scrapes until the block ends; `text` is the last scrape."""

    path: Path
    times_s: list[float] = field(default_factory=list)
    text: str = ""

    @contextmanager
    def running(self) -> Iterator[None]:
        """At work while the block runs, on a thread."""
        is_over = threading.Event()
        thread = threading.Thread(target=self._work, args=(is_over,))
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

    def _work(self, is_over: threading.Event) -> None:
        while not is_over.wait(SCRAPE_EVERY_S):
            began_s = time.monotonic()
            self.text = scrape(self.path)
            self.times_s.append(time.monotonic() - began_s)


def scrape(path: Path) -> str:
    """The metrics as text."""
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.sock.connect(str(path))
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()
    finally:
        connection.close()


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen of a run."""

    figures: dict[str, float]
    text: str
    recording: Recording


def watch(folder: Path, *, models: int, requests: int) -> Seen:
    """Make the models, serve, look."""
    members = make_family(folder / "family", models, 0, lambda _: None)
    records = stock(folder / "store", members, lambda _: None)
    image_s = image_time_s(members[0].path, _sample(members[0].name))
    load_bytes = statistics.mean(own_bytes(records).values())
    settings = DaemonSettings(
        store=folder / "store",
        runtime_dir=short_runtime_dir(folder / "run"),
        arena_bytes=room_for(records, max(2, models // 4)),
        rate_limit_bytes_per_s=rate_for(load_bytes, _LOAD_SHARE * image_s),
    )
    shape = Shape(
        requests=requests, clients=4, rate_per_s=1.1 / image_s, exponent=0.8, burst=1.6, spread_s=image_s,
        variants=len(PROMPTS), steps=(_STEPS,), size=_SIZE,
    )  # fmt: skip
    workload = make_workload([member.name for member in members], shape, 0)
    with running_daemon(settings, folder / "daemon") as daemon:
        scraper = Scraper(settings.runtime_dir / METRICS_SOCKET)
        with timed(f"{requests} requests"), scraper.running():
            asyncio.run(traffic.send(daemon.endpoint, workload, lambda _: None))
        began_s = time.monotonic()
        whole = fetch(daemon.ask, 3600.0)
        trace_s = time.monotonic() - began_s
        shown = fetch(daemon.ask, SHOWN_S)
        text = scrape(scraper.path)
    return Seen(_figures(whole, scraper, requests, trace_s), text, shown)


def _figures(whole: Recording, scraper: Scraper, requests: int, trace_s: float) -> dict[str, float]:
    busy_s = sum(span.end_s - span.start_s for span in lane(whole.spans, STAGE))
    each_ns, count = span_ns(), len(whole.spans)
    return {
        "span_ns": each_ns,
        "spans_per_image": count / requests,
        "timeline_percent": 100 * count * each_ns * 1e-9 / busy_s,
        "scrape_ms_p50": 1e3 * (percentile(scraper.times_s, 50) or 0.0),
        "scrape_ms_p99": 1e3 * (percentile(scraper.times_s, 99) or 0.0),
        "scrape_kib": len(scraper.text) / 1024,
        "trace_ms": 1e3 * trace_s,
    }


def _sample(model: str) -> Request:
    return Request(0, 0, model, PROMPTS[0], 1_000, _STEPS, _SIZE, _SIZE, 0.0)


# -- the document ----------------------------------------------------------------------------------


def brief(text: str) -> str:
    """A scrape for people: of each histogram the buckets that add something, and no process metrics."""
    lines: list[str] = []
    before: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith(("process_", "# HELP process_", "# TYPE process_")):
            continue
        if (bucket := re.fullmatch(r'(\w+_bucket)\{(?:.*,)?le="[^"]+"(.*)\} (\S+)', line)) is not None:
            series = re.sub(r'le="[^"]+",?', "", line.rpartition(" ")[0])
            is_new = before.get(series, "0.0") != bucket[3]
            before[series] = bucket[3]
            if not is_new and "+Inf" not in line:
                continue
        lines.append(line)
    return "\n".join(lines)


def with_scrape(document: str, text: str) -> str:
    """The document with this scrape in place of its old one. Raises `NoMarks`."""
    head, begin, rest = document.partition(_BEGIN)
    _, end, tail = rest.partition(_END)
    if not (begin and end):
        raise NoMarks(f"the document lacks {_BEGIN} and {_END}")
    return f"{head}{begin}\n\n```\n{brief(text)}\n```\n\n{end}{tail}"


def write_document(path: Path, seen: Seen) -> None:
    """The example and its picture. Raises `NoMarks`, `OSError`."""
    from understudy.trace_plot import draw

    path.write_text(with_scrape(path.read_text(), seen.text))
    draw(seen.recording, path.with_name(PICTURE))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--quick", action="store_true", help="few models and requests, for tests")
    parser.add_argument("--document", type=Path, help="docs/observability.md, to be written anew")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        models, requests = (4, 8) if options.quick else (12, 80)
        with timed("all"):
            seen = watch(Path(folder), models=models, requests=requests)
    if options.document is not None:
        write_document(options.document, seen)
        say(f"written: {options.document} and {options.document.with_name(PICTURE)}")
    rows = [[key, f"{value:.4g}"] for key, value in seen.figures.items()]
    show_table("what watching costs", ["", "figure"], rows)
    if options.json:
        json_line(seen.figures)


if __name__ == "__main__":
    main()

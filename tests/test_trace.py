"""The timeline: the ring, its pages, the Chrome trace that is written of it, the picture, what it costs."""

import builtins
import json
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from understudy import ctl_trace
from understudy.admin import Trace
from understudy.chrome_trace import chrome_trace, written
from understudy.ctl import main
from understudy.trace import Recording, Span, by_lane, fetch
from understudy.trace_plot import FONT, draw, fitting, short_names
from understudyd.shell.timeline import Timeline

ALARM = (0xD1, 0x49, 0x5B)


def run(name: str, start_s: float, end_s: float, **more: Any) -> Span:
    return Span("stage", name, start_s, end_s, **more)


SPANS = [
    Span("start-up", "import", 8.0, 9.5),
    Span("requests", "a", 9.0, 12.6, request="c/1", tier="disk"),
    Span("queue", "waiting", 9.0, 9.0, value=1),
    Span("loader 0", "a unet", 9.1, 9.9, 1000, route="disk > arena"),
    Span("switch", "a", 9.0, 10.0),
    Span("bind", "a", 9.999, 10.0),
    run("a", 10.0, 12.5, steps_s=(11.0, 12.0), request="c/1"),
    Span("queue", "waiting", 10.0, 10.0, value=0),
    Span("encode", "a", 12.5, 12.6),
    Span("encode", "b", 12.55, 12.65),
    Span("loader 1", "b unet", 11.0, 11.5, 1000, route="host > arena", outcome="lost"),
]
RECORDING = Recording(SPANS, seconds=60.0, now_s=13.0)


class Asked:
    """A daemon with this timeline, as far as `trace` asks it."""

    def __init__(self, timeline: Timeline, most: int = 8192) -> None:
        self.timeline, self.most, self.pages = timeline, most, 0

    def __call__(self, command: Any) -> Any:
        assert isinstance(command, Trace)
        self.pages += 1
        page = self.timeline.page(command.seconds, command.start, self.most)
        return msgspec.json.decode(msgspec.json.encode(page))


# -- the ring --------------------------------------------------------------------------------------


def test_the_ring_keeps_the_latest_and_says_when_some_are_gone() -> None:
    timeline = Timeline(capacity=3, clock=lambda: 10.0)
    ask = Asked(timeline)
    assert fetch(ask, 60).spans == []
    for start_s in (1.0, 9.5, 8.0):
        timeline.record(run("m", start_s, start_s + 0.4))
    assert not fetch(ask, 60).is_cut
    timeline.record(run("m", 9.0, 9.4))
    recording = fetch(ask, 60)
    assert [span.start_s for span in recording.spans] == [8.0, 9.0, 9.5]
    assert recording.is_cut and recording.begin_s == 8.0
    assert [span.start_s for span in fetch(ask, 1.0).spans] == [9.0, 9.5]
    assert fetch(ask, 1.0).is_cut, "the oldest that is left is within it, so there may have been more"
    assert fetch(ask, 0.5).begin_s == 9.5 and not fetch(ask, 0.05).spans


def test_pages_hold_everything_once_while_more_is_recorded() -> None:
    timeline = Timeline(capacity=10_000, clock=lambda: 1e6)
    for number in range(5000):
        timeline.record(run(str(number), number, 1e6, steps_s=(1.0,) * (number % 3)))
    ask = Asked(timeline, most=100)
    recording = fetch(ask, 60)
    assert [span.name for span in recording.spans] == [str(number) for number in range(5000)]
    assert ask.pages > 5000 // 100, "steps count as well"


def test_old_spans_are_skipped_a_page_at_a_time() -> None:
    timeline = Timeline(capacity=100_000, clock=lambda: 100.0)
    for number in range(80_000):
        timeline.record(run("m", 0.0, 100.0 if number == 79_999 else 1.0))
    ask = Asked(timeline)
    assert len(fetch(ask, 10).spans) == 1 and ask.pages == 3


def test_threads_lose_nothing() -> None:
    timeline = Timeline(capacity=40_000)

    def record(name: str) -> None:
        for number in range(5000):
            timeline.record(Span(name, str(number), 0.0, time.monotonic()))

    threads = [threading.Thread(target=record, args=(f"lane {i}",)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found: dict[str, list[str]] = defaultdict(list)
    page = timeline.page(1e9, most=10**9)
    for span in page.spans:
        found[span.lane].append(span.name)
    assert len(found) == 6 and page.next is None
    assert all(names == [str(n) for n in range(5000)] for names in found.values())


def test_a_span_costs_next_to_nothing() -> None:
    """An image comes with a dozen spans: under 1 % even of one that takes a millisecond and a half."""
    timeline, rounds = Timeline(), 20_000
    record = timeline.record

    def each_s() -> float:
        began_s = time.thread_time()
        for _ in range(rounds):
            record(Span("stage", "model", 1.0, 2.0, request="client/1", outcome=""))
        return (time.thread_time() - began_s) / rounds

    assert min(each_s() for _ in range(5)) < 1.2e-6


# -- the Chrome trace ------------------------------------------------------------------------------


def check_format(document: dict[str, Any]) -> None:
    """What the format's description demands of the phases that we write."""
    names: dict[int, str] = {}
    open_requests: dict[tuple[str, str], float] = {}
    threads: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for event in document["traceEvents"]:
        assert isinstance(event["name"], str) and event["pid"] == 1 and isinstance(event["tid"], int)
        match event["ph"]:
            case "M":
                assert event["name"] in ("process_name", "thread_name", "thread_sort_index")
                if event["name"] == "thread_name":
                    assert event["tid"] not in names
                    names[event["tid"]] = event["args"]["name"]
            case "X":
                assert event["ts"] >= 0 and event["dur"] >= 0 and event["cat"]
                threads[event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
            case "C":
                assert event["ts"] >= 0 and all(isinstance(v, int) for v in event["args"].values())
            case "b":
                key = (event["cat"], event["id"])
                assert key not in open_requests
                open_requests[key] = event["ts"]
            case "e":
                assert event["ts"] >= open_requests.pop((event["cat"], event["id"])) >= 0
            case phase:
                raise AssertionError(phase)
    assert not open_requests and threads.keys() == names.keys()
    assert len(set(names.values())) == len(names)
    for spans in threads.values():
        check_nesting(spans)


def check_nesting(spans: list[tuple[float, float]]) -> None:
    """Of two on a thread one contains the other, or they do not overlap; to a thousandth of a microsecond."""
    around: list[tuple[float, float]] = []
    for begin, end in sorted(spans, key=lambda span: (span[0], -span[1])):
        while around and around[-1][1] <= begin + 0.002:
            around.pop()
        assert not around or end <= around[-1][1] + 0.002
        around.append((begin, end))


def test_what_is_written_for_viewers() -> None:
    document = json.loads(written(RECORDING))
    check_format(document)
    events = document["traceEvents"]
    lanes = [e["args"]["name"] for e in events if e["name"] == "thread_name"]
    assert lanes == ["start-up", "stage", "bind", "switch", "loader 0", "loader 1", "encode", "encode (2)"]
    (whole,) = (e for e in events if e.get("cat") == "stage")
    assert (whole["name"], whole["ts"], whole["dur"]) == ("a", 2e6, 2.5e6)
    steps = [(e["name"], e["ts"], e["dur"]) for e in events if e.get("cat") == "step"]
    assert steps == [("step 1", 2e6, 1e6), ("step 2", 3e6, 1e6)]
    (lost,) = (e for e in events if e["name"] == "b unet (lost)")
    assert lost["args"] == {"size_bytes": 1000, "route": "host > arena", "outcome": "lost"}
    assert [(e["ts"], e["args"]["waiting"]) for e in events if e["ph"] == "C"] == [(1e6, 1), (2e6, 0)]
    assert [e["ts"] for e in events if e["ph"] in "be"] == [1e6, 4.6e6]


LANES = st.sampled_from(["stage", "loader 0", "encode", "requests", "queue", "something new"])
MOMENTS = st.floats(0, 100, allow_nan=False)


@given(st.lists(st.tuples(LANES, MOMENTS, MOMENTS, st.lists(MOMENTS, max_size=3))), st.floats(0.1, 100))
def test_any_spans_make_a_valid_trace(
    drawn: list[tuple[str, float, float, list[float]]], seconds: float
) -> None:
    spans = [
        Span(lane, "m", min(a, b), max(a, b), steps_s=tuple(sorted(max(a, b, s) for s in steps)), value=1)
        for lane, a, b, steps in drawn
    ]
    check_format(chrome_trace(Recording(spans, seconds, now_s=100.0)))
    shown = [span for rows in by_lane(spans).values() for row in rows for span in row]
    assert len(shown) == sum(span.lane not in ("requests", "queue") for span in spans)


# -- the picture -----------------------------------------------------------------------------------


def alarms(path: Path) -> int:
    with Image.open(path) as image:
        assert image.format == "PNG" and image.width > 1200
        colours = image.convert("RGB").getcolors(1 << 24) or ()
    return sum(count for count, colour in colours if colour == ALARM)


def test_a_picture_marks_visible_switches(tmp_path: Path) -> None:
    calm = [span for span in SPANS if span.lane != "switch" and not span.outcome]
    legend = alarms(draw(Recording(calm, 60.0, 13.0), tmp_path / "calm.png"))
    marked = alarms(draw(Recording([*calm, *SPANS[4:5]], 60.0, 13.0), tmp_path / "marked.png"))
    assert legend > 0 and marked > legend + 200


@pytest.mark.parametrize("text", ["m-1", "WWWWWWWW", "sdxl+pixel-art@0.8", "a_model_whose_name_is_long"])
@pytest.mark.parametrize("room_inches", [0.0, 0.2, 0.5, 1.0, 4.0])
def test_a_label_stays_on_its_span(text: str, room_inches: float) -> None:
    shown = fitting(text, room_inches)
    figure = Figure(dpi=100)
    drawn = figure.text(0, 0, shown or " ", fontsize=8.5, fontweight="bold", family=FONT)
    width = drawn.get_window_extent(FigureCanvasAgg(figure).get_renderer()).width / 100
    assert not shown or width <= room_inches
    if shown != text and shown:
        assert shown.count("…") == 1 and text.startswith(shown[0]) and text.endswith(shown[-1])
    assert shown == text or room_inches < 4.0


def test_numbers_stand_for_models_only_where_they_tell_them_apart() -> None:
    assert short_names(["m-1", "m-22", "plain"]) == {"m-1": "1", "m-22": "22", "plain": "plain"}
    assert short_names(["sd-1", "xl-1"]) == {"sd-1": "sd-1", "xl-1": "xl-1"}


@pytest.mark.parametrize("is_cut", [False, True])
def test_a_picture_of_nothing(tmp_path: Path, is_cut: bool) -> None:
    alarms(draw(Recording([], 10.0, 5.0, is_cut=is_cut), tmp_path / "nothing.png"))


def test_many_spans_are_drawn_in_reasonable_time(tmp_path: Path) -> None:
    spans = [run(f"m-{i % 40}", i / 100, i / 100 + 0.009) for i in range(20_000)]
    began_s = time.process_time()
    draw(Recording(spans, 300.0, 200.0), tmp_path / "many.png")
    assert time.process_time() - began_s < 20


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def timeline(monkeypatch: pytest.MonkeyPatch) -> Timeline:
    timeline = Timeline(clock=lambda: 13.0)
    for span in SPANS:
        timeline.record(span)
    asked = Asked(timeline, most=3)
    monkeypatch.setattr(ctl_trace, "ask", lambda _path, command: asked(command))
    return timeline


def ctl(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["--socket", "/nowhere", "trace", *arguments])


def test_written_and_drawn(timeline: Timeline, tmp_path: Path) -> None:
    out, plot = tmp_path / "trace.json", tmp_path / "trace.png"
    told = ctl("--seconds", "30", "-o", str(out), "--plot", str(plot))
    assert told.exit_code == 0 and "11 spans of 5.0 s" in told.stdout and "perfetto" in told.stdout
    check_format(json.loads(out.read_bytes()))
    assert alarms(plot)
    shown = ctl("--seconds", "30", "-o", "-")
    assert json.loads(shown.stdout) == json.loads(out.read_bytes())


def test_only_a_picture(timeline: Timeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ctl("--plot", "p.png").exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["p.png"]
    assert ctl().exit_code == 0 and (tmp_path / "trace.json").exists()


def test_waiting_first(timeline: Timeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    naps: list[float] = []
    monkeypatch.setattr(ctl_trace.time, "sleep", naps.append)
    assert ctl("--wait", "--seconds", "4", "-o", str(tmp_path / "t")).exit_code == 0
    assert naps == [4.0]


def test_without_matplotlib_it_says_what_to_install(
    timeline: Timeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError("no matplotlib", name=name)
        return real(name, *rest, **more)

    monkeypatch.delitem(sys.modules, "understudy.trace_plot")
    monkeypatch.setattr(builtins, "__import__", missing)
    failed = ctl("--plot", str(tmp_path / "p.png"))
    assert failed.exit_code == 1 and "pip install 'understudy[plot]'" in failed.stderr
    assert ctl("-o", str(tmp_path / "t.json")).exit_code == 0, "only pictures need it"


def test_a_file_that_cannot_be_written(timeline: Timeline, tmp_path: Path) -> None:
    for option in ("-o", "--plot"):
        failed = ctl(option, str(tmp_path / "nowhere" / "t"))
        assert failed.exit_code == 1 and "cannot write" in failed.stderr

"""Traces: what is read, what is refused and where, and the made-up ones."""

import gzip
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from understudyd.recorded import TraceRequest, log_line
from understudyd.simulate import commands, synthetic, trace
from understudyd.simulate.trace import TraceError

REQUESTS = [
    TraceRequest(0.0, "a", "c1", "L1:0.5", "text-to-image", 4, 30, 32.0),
    TraceRequest(4.5, "b", "c2", "", "inpaint", 1, 20, 9.0),
]
CSV = (
    "arrival_s,client,model,loras,task,images,steps,duration_s\n"
    "0,c1,a,L1:0.5,text-to-image,4,30,32\n4.5,c2,b,,inpaint,1,20,9\n"
)


def test_csv_request_log_and_gzip_say_the_same(tmp_path: Path) -> None:
    log = b"".join(map(log_line, REQUESTS))
    for name, content in (("a.csv", CSV.encode()), ("a.jsonl", log)):
        (tmp_path / name).write_bytes(content)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
        assert list(trace.read(tmp_path / name)) == REQUESTS
        assert list(trace.read(tmp_path / f"{name}.gz")) == REQUESTS


def test_other_columns_are_optional_in_any_order_and_strange_ones_left_out(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("colour,model,arrival_s,steps\nred,a,1,\nblue,b,2,7\n")
    assert list(trace.read(tmp_path / "t")) == [TraceRequest(1.0, "a"), TraceRequest(2.0, "b", steps=7)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("client,model\nc,a\n", "arrival_s"),
        ("arrival_s,model\n1,a\nsoon,b\n", "request 2.*soon"),
        ("arrival_s,model\n2,a\n1,b\n", "request 2.*sort by arrival_s"),
        ("arrival_s,model\nnan,a\n", "request 1"),
        ("arrival_s,model,images\n1,a,0\n", "request 1.*at least 1"),
        ("arrival_s,model,images\n1,a\n", "request 1"),
        ('{"arrival_s": 1, "model": "a"}\n{"arrival_s": 2}\n', "request 2.*model"),
        ('{"arrival_s": 1, "model": "a"}\n{broken\n', "request 2"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "t").write_text(text)
    with pytest.raises(TraceError, match=says):
        list(trace.read(tmp_path / "t"))


def test_a_file_that_cannot_be_read_is_an_error_of_the_trace(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot read"):
        list(trace.read(tmp_path / "none"))
    (tmp_path / "cut.gz").write_bytes(gzip.compress(CSV.encode())[:-20])
    with pytest.raises(TraceError, match="cannot read"):
        list(trace.read(tmp_path / "cut.gz"))


def test_a_trace_is_read_as_a_stream(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("arrival_s,model\n1,a\nsoon,b\n")
    requests = trace.read(tmp_path / "t")
    assert next(requests).model == "a"  # what is wrong further down is not known yet


def test_a_survey_adds_up(tmp_path: Path) -> None:
    (tmp_path / "t").write_text(CSV)
    found = trace.survey(tmp_path / "t")
    assert (found.models, found.requests, found.span_s) == (("a", "b"), 2, 4.5)
    assert (found.images, found.image_steps) == (5, 4 * 30 + 20)
    (tmp_path / "empty").write_text("arrival_s,model\n")
    with pytest.raises(TraceError, match="no requests"):
        trace.survey(tmp_path / "empty")


# -- made-up traces -------------------------------------------------------------------------------------


def test_the_shipped_example_is_what_the_generator_makes() -> None:
    lines = synthetic.csv_lines(synthetic.generate(3000))
    with gzip.open(Path(trace.__file__).parent / "example.csv.gz", "rt") as file:
        assert file.readlines() == list(lines)


def test_a_made_up_trace_is_shaped_like_a_real_one(tmp_path: Path) -> None:
    """Skewed, bursty, and three of four requests change the model though clients stay with theirs."""
    commands.write(tmp_path / "t.gz", synthetic.csv_lines(synthetic.generate(6000)))
    requests = list(trace.read(tmp_path / "t.gz"))
    changes = sum(a.model != b.model for a, b in pairwise(requests)) / len(requests)
    assert 0.65 < changes < 0.85
    last: dict[str, str] = {}
    stays = sum(last.get(r.client) == r.model or bool(last.update({r.client: r.model})) for r in requests)
    assert stays / len(requests) > 0.4
    counts = sorted((sum(r.model == m for r in requests) for m in {r.model for r in requests}), reverse=True)
    assert sum(counts[:5]) > 0.4 * len(requests) and len(counts) > 30
    gaps = sorted(b.arrival_s - a.arrival_s for a, b in pairwise(requests))
    assert gaps[len(gaps) // 2] < 0.4 * sum(gaps) / len(gaps)  # a Poisson process has 0.69


def test_the_same_seed_makes_the_same_file(tmp_path: Path) -> None:
    for name in ("one.gz", "two.gz"):
        commands.write(tmp_path / name, synthetic.csv_lines(synthetic.generate(50)))
    assert (tmp_path / "one.gz").read_bytes() == (tmp_path / "two.gz").read_bytes()
    other = list(synthetic.generate(50, synthetic.Shape(seed=2)))
    assert other != list(synthetic.generate(50))


def test_a_line_of_the_request_log_is_one_json_object() -> None:
    line = log_line(REQUESTS[0])
    assert line.endswith(b"}\n") and line.count(b"\n") == 1
    assert msgspec.json.decode(line)["loras"] == "L1:0.5"

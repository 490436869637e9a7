"""What goes to stderr: text for people, JSON for programs, priorities for the journal."""

import io
import json
import logging
import os
from collections.abc import Iterator

import pytest

from understudyd import logs


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[logging.Logger]:
    """As it was, afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    logging.captureWarnings(capture=False)
    root.handlers[:], root.level = handlers, level


@pytest.mark.parametrize(
    ("kind", "stream", "is_json"),
    [
        ("auto", Terminal(), False),
        ("auto", io.StringIO(), True),
        ("text", io.StringIO(), False),
        ("json", Terminal(), True),
    ],
)
def test_people_sit_at_terminals(kind: str, stream: io.StringIO, is_json: bool) -> None:
    assert logs.configure("info", kind, stream, {}) is is_json
    logging.getLogger("a.b").info("hello %s", "you")
    line = stream.getvalue()
    assert line.startswith("{") is is_json and "hello you" in line


def test_a_line_has_everything_a_collector_asks_for() -> None:
    stream = io.StringIO()
    logs.configure("info", "json", stream, {})
    try:
        raise ValueError('two\nlines and "quotes"')
    except ValueError:
        logging.getLogger("a.b").exception("it failed")
    logging.getLogger("a.b").debug("too little")
    (line,) = stream.getvalue().splitlines()
    document = json.loads(line)
    assert document["level"] == "error" and document["logger"] == "a.b"
    assert document["message"] == "it failed" and "ValueError: two\nlines" in document["error"]
    assert document["time"].endswith("Z") and document["time"][10] == "T"


def test_the_journal_gets_priorities() -> None:
    reading, writing = os.pipe()
    status = os.fstat(writing)
    with os.fdopen(writing, "w") as stream, os.fdopen(reading) as journal:
        environ = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        logs.configure("debug", "auto", stream, environ)
        for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL):
            logging.getLogger("a").log(level, "x")
        said = [journal.readline() for _ in range(5)]
    assert [line[:3] for line in said] == ["<7>", "<6>", "<4>", "<3>", "<2>"]
    assert all(json.loads(line[3:])["message"] == "x" for line in said)


def test_somebody_else_s_journal_is_none() -> None:
    stream = io.StringIO()
    logs.configure("info", "auto", stream, {"JOURNAL_STREAM": "1:2"})
    logging.getLogger("a").info("x")
    assert stream.getvalue().startswith("{")


def test_the_level_changes_at_once() -> None:
    stream = io.StringIO()
    logs.configure("warning", "text", stream, {})
    logging.getLogger("a").info("before")
    logs.set_level("info")
    logging.getLogger("a").info("after")
    assert "after" in stream.getvalue() and "before" not in stream.getvalue()

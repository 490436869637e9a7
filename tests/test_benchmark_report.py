"""`make bench`: benchmarks that fail or hang, what is kept, and that nothing of a place is published."""

import os
import platform
import re
from pathlib import Path

import msgspec
import pytest
from benchmarks.report import __main__ as report
from benchmarks.report.cases import cases
from benchmarks.report.machine import describe_machine, host_of, revision
from benchmarks.report.publishing import without_places
from benchmarks.report.results import Run, read_all, read_results, write_results
from benchmarks.report.running import Case, Clock, run_all

from report_kit import MACHINE, results, run

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "benchmarks" / "results"


def case(name: str, program: str, limit_s: float = 60.0, repeats: int = 1) -> Case:
    return Case(name, ("-c", program), limit_s, repeats)


def play(tmp_path: Path, *chosen: Case, budget_s: float = 120.0) -> dict[str, list[Run]]:
    kept: dict[str, list[Run]] = {}
    run_all(chosen, Clock(budget_s), "abc", tmp_path, lambda name, one: kept.setdefault(name, []).append(one))
    return kept


def test_one_that_fails_hangs_or_says_nothing_ends_no_other(tmp_path: Path) -> None:
    kept = play(
        tmp_path,
        case("raises", "raise ValueError('no /home/somebody/secret/file.bin here')"),
        case("hangs", "import signal; print('{}', flush=True); signal.pause()", limit_s=0.5),
        case("silent", "print('no figures')"),
        case("wrong", "print('{\"lost\": 1}'); raise SystemExit(3)"),
        case("good", 'print(\'a table\'); print(\'{"p50_ms": 0.123456, "inner": {"n": 2}}\')'),
        case("lines", "print('{\\n \"n\": 1\\n}')"),
    )
    failures = {name: runs[0].failure for name, runs in kept.items()}
    assert failures["raises"] == "ended with status 1: ValueError: no file.bin here"
    assert failures["hangs"] == "took longer than 0 s" and kept["hangs"][0].figures is None
    assert failures["silent"] == "printed no figures"
    assert failures["wrong"].startswith("ended with status 3") and kept["wrong"][0].figures == {"lost": 1}
    assert failures["good"] == failures["lines"] == ""
    assert kept["good"][0].figures == {"p50_ms": 0.1235, "inner": {"n": 2}}
    assert kept["lines"][0].figures == {"n": 1}


def test_what_hangs_is_gone_afterwards(tmp_path: Path) -> None:
    program = "import os, signal; open(os.environ['PID_FILE'], 'w').write(str(os.getpid())); signal.pause()"
    pid_file = tmp_path / "pid"
    os.environ["PID_FILE"] = str(pid_file)
    try:
        play(tmp_path, case("hangs", program, limit_s=5.0))
    finally:
        del os.environ["PID_FILE"]
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


def test_repetitions_come_after_all_cases_and_only_of_what_works(tmp_path: Path) -> None:
    order: list[str] = []
    chosen = [case("a", "print('{}')", repeats=3), case("b", "print('{}')"), case("c", "", repeats=2)]
    run_all(chosen, Clock(120.0), "abc", tmp_path, lambda name, one: order.append(name))
    assert order == ["a", "b", "c", "a", "a"]


def test_without_time_left_it_says_so(tmp_path: Path) -> None:
    kept = play(tmp_path, case("late", "print('{}')", repeats=2), budget_s=0.0)
    assert [one.failure for one in kept["late"]] == ["no time left of 0 s"]


def test_only_replaces_what_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_LOGS", tmp_path / "logs")
    chosen = [case("a", "print('{\"n\": 1}')"), case("b", "print('{\"n\": 1}')")]
    report.measure(chosen, tmp_path, 60.0, keep_others=False)
    again = [case("b", "print('{\"n\": 2}')")]
    found = report.measure(again, tmp_path, 60.0, keep_others=True)
    assert {name: [one.figures for one in runs] for name, runs in found.runs.items()} == {
        "a": [{"n": 1}],
        "b": [{"n": 2}],
    }
    (path,) = tmp_path.glob("*.json")
    assert read_results(path) == msgspec.structs.replace(found, wall_s=read_results(path).wall_s)
    assert path.stem == host_of(describe_machine()) == found.host


def test_what_is_kept_has_a_schema(tmp_path: Path) -> None:
    path = tmp_path / "new" / "example.json"
    write_results(path, results(wire=run({"p50_ms": 0.5})))
    assert read_results(path) == results(wire=run({"p50_ms": 0.5}))
    path.write_text(path.read_text().replace('"budget_s"', '"budget"'))
    with pytest.raises(msgspec.ValidationError, match=r"example\.json: .*budget"):
        read_all(path.parent)


def test_the_hardware_names_the_file() -> None:
    assert host_of(MACHINE) == "example-2-cores"
    intel = msgspec.structs.replace(MACHINE, cpu="Intel(R) Xeon(R) Platinum 8480 CPU @ 2.00GHz", cores=16)
    assert host_of(intel) == "intel-xeon-platinum-8480-16-cores"
    assert re.fullmatch(r"[a-z0-9-]+-\d+-cores", host_of(describe_machine()))


def test_paths_are_not_told() -> None:
    assert without_places("in /home/me/x/understudy.log, line 3") == "in understudy.log, line 3"
    assert without_places("File '/usr/lib/a.py'") == "File 'a.py'"
    assert without_places("1/2 of a/b, 3 GB/s, https://example.com/a/b") == (
        "1/2 of a/b, 3 GB/s, https://example.com/a/b"
    )
    (load,) = [one for one in cases(Path("/some/where/python")) if one.name == "load"]
    assert "/some/where/python" in load.hidden and load.command.endswith("--peers-python PYTHON")


def test_a_benchmark_that_there_is_not_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--only", "wire", "nosuch", "--results", str(tmp_path), "--root", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("no nosuch; there are load,")
    assert not list(tmp_path.iterdir())


def test_sources_outside_a_repository_have_no_revision(tmp_path: Path) -> None:
    assert revision(tmp_path) == "unknown"


@pytest.mark.parametrize("one", cases(), ids=lambda one: one.name)
def test_a_short_form_uses_options_that_there_are(one: Case) -> None:
    module = one.arguments[1]
    if not module.startswith("benchmarks."):
        return
    source = (ROOT / (module.replace(".", "/") + ".py")).read_text()
    options = [argument for argument in one.arguments[2:] if argument.startswith("--")]
    assert [option for option in options if f'"{option.replace("--no-", "--")}"' not in source] == []
    assert one.limit_s <= 300


@pytest.mark.parametrize("path", sorted(KEPT.glob("*.json")), ids=lambda path: path.stem)
def test_what_is_committed_is_small_and_names_no_place(path: Path) -> None:
    text = path.read_text()
    assert len(text) < 200_000
    assert not re.findall(r'"[^"]*(?<![\w.])/(?:home|root|tmp|usr|work|mnt|opt|var)\b[^"]*"', text)
    assert platform.node() not in text

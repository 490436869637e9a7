"""docs/observability.md against what the daemon really says, and the benchmark that writes its example."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from benchmarks import observe

from metrics_kit import Scrape
from test_metrics import FakeNvml, gpu_scrape, reader
from understudyd.shell.meter import LoadMeter, Meter

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "observability.md").read_text()
EXAMPLE = PAGE.partition("<!-- scrape: begin -->")[2].partition("<!-- scrape: end -->")[0].strip().strip("`")


def known_metrics() -> set[str]:
    """Every name that a sample of the daemon can have."""
    names = set()
    for family in reader(Meter(), LoadMeter()).read():
        match family.type:
            case "counter":
                names.add(f"{family.name}_total")
            case "histogram":
                names |= {f"{family.name}_{part}" for part in ("bucket", "sum", "count")}
            case _:
                names.add(family.name)
    return names | {sample.name for sample in gpu_scrape(FakeNvml()).samples}


def blocks(beginning: str) -> list[Any]:
    found = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
    return [block for block in found if next(iter(block)) == beginning]


def used_metrics(text: str) -> set[str]:
    return set(re.findall(r"\bunderstudy_[a-z_]+\b", text))


def test_the_page_names_no_metric_that_there_is_not() -> None:
    named = used_metrics(PAGE.replace(EXAMPLE, ""))
    assert len(named) > 15 and named <= known_metrics(), named - known_metrics()


def test_the_example_is_a_scrape_of_this_version() -> None:
    found = Scrape(EXAMPLE)
    assert found.value("understudy_requests_waiting") == 0
    assert found.sum("understudy_requests_total") == 80 == found.value("understudy_request_run_seconds_count")
    families = {family.name: family for family in reader(Meter(), LoadMeter()).read()}
    assert {name: f.documentation for name, f in found.families.items()} == {
        name: family.documentation for name, family in families.items()
    }, "written anew by `make docs-observability`"


def test_alert_rules_are_what_promtool_takes() -> None:
    """Its rulefmt: known keys, names of labels and metrics, durations, balanced expressions."""
    (rules,) = blocks("groups")
    assert rules.keys() == {"groups"}
    seen = set()
    for group in rules["groups"]:
        assert group.keys() == {"name", "rules"}
        for rule in group["rules"]:
            assert {"alert", "expr"} <= rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
            assert re.fullmatch(r"[A-Za-z_]\w*", rule["alert"]) and rule["alert"] not in seen
            seen.add(rule["alert"])
            assert re.fullmatch(r"\d+[smh]", rule.get("for", "0s"))
            for table in (rule.get("labels", {}), rule.get("annotations", {})):
                assert all(re.fullmatch(r"[A-Za-z_]\w*", k) and isinstance(v, str) for k, v in table.items())
            expression = rule["expr"]
            for pair in ("()", "{}", "[]"):
                assert expression.count(pair[0]) == expression.count(pair[1])
            assert all(re.fullmatch(r"\d+[smhd]", span) for span in re.findall(r"\[(.*?)\]", expression))
            assert used_metrics(expression) <= known_metrics()
    assert len(seen) >= 6


def test_the_scaler_asks_for_what_waits() -> None:
    (scaled,) = blocks("apiVersion")
    assert scaled["kind"] == "ScaledObject"
    (trigger,) = scaled["spec"]["triggers"]
    assert trigger["type"] == "prometheus"
    assert used_metrics(trigger["metadata"]["query"]) == {"understudy_requests_waiting"}
    assert isinstance(trigger["metadata"]["threshold"], str), "KEDA takes texts only"


def test_a_brief_scrape_is_still_one() -> None:
    lines = [
        "# TYPE h histogram",
        *(
            f'h_bucket{{le="{le}",tier="a"}} {n}.0'
            for le, n in [("1.0", 0), ("2.0", 3), ("3.0", 3), ("+Inf", 3)]
        ),
        'h_count{tier="a"} 3.0',
        "# HELP process_x y",
        "process_x 1.0",
    ]
    brief = observe.brief("\n".join(lines)).splitlines()
    assert [line.partition("le=")[2][:5] for line in brief if "bucket" in line] == ['"2.0"', '"+Inf']
    assert brief[-1] == 'h_count{tier="a"} 3.0'
    page = "before <!-- scrape: begin --> old <!-- scrape: end --> after"
    new = observe.with_scrape(page, "m 1.0")
    assert new.startswith("before <!--") and new.endswith("--> after") and "old" not in new and "m 1.0" in new
    with pytest.raises(observe.NoMarks):
        observe.with_scrape("nothing", "m 1.0")


@pytest.mark.timeout(600)
def test_the_benchmark_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = tmp_path / "page.md"
    document.write_text("<!-- scrape: begin --><!-- scrape: end -->")
    observe.main(["--quick", "--json", "--document", str(document)])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(figures) == {
        "span_ns", "spans_per_image", "timeline_percent", "scrape_ms_p50", "scrape_ms_p99", "scrape_kib",
        "trace_ms",
    }  # fmt: skip
    assert 0 < figures["timeline_percent"] < 1 and figures["spans_per_image"] > 3
    assert 'outcome="finished"' in document.read_text()
    assert (tmp_path / observe.PICTURE).read_bytes().startswith(b"\x89PNG")

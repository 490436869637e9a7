"""docs/benchmarks.md and the README's figures: from results alone, honest about what is missed or missing."""

import re
from pathlib import Path

import pytest
from benchmarks.report import __main__ as report
from benchmarks.report.goals import GOALS, GPU, Goal, goals, verdict
from benchmarks.report.page import found_in, page
from benchmarks.report.picking import Found, Spread, at, number
from benchmarks.report.readme import NoMarks, readme_figures, with_figures
from benchmarks.report.results import Kept, read_all
from benchmarks.report.versus import rivals, versus

from report_kit import gpu_check, results, run

ROOT = Path(__file__).parent.parent
KEPT = read_all(ROOT / "benchmarks" / "results")
PAGE = (ROOT / "docs" / "benchmarks.md").read_text()
NUMBER_IN_A_CELL = r"\| \**\d"


def rows(text: str, beginning: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith(f"| {beginning}")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


# -- what is committed ------------------------------------------------------------------------------


def test_the_page_is_what_the_results_give() -> None:
    assert page(KEPT) == PAGE, "written anew by `make docs-benchmarks`"


def test_it_begins_with_what_a_user_would_pick_today() -> None:
    first = next(line for line in PAGE.splitlines() if line.startswith("|"))
    assert "what a user would pick today" in first and "Understudy" in first
    assert PAGE.index(first) < PAGE.index("\n## ")


def test_the_readme_says_the_same() -> None:
    readme = (ROOT / "README.md").read_text()
    assert with_figures(readme, readme_figures(KEPT)) == readme, "written anew by `make docs-benchmarks`"


def test_its_pictures_are_there() -> None:
    pictures = re.findall(r"\]\((images/\S+\.png)\)", PAGE)
    assert pictures
    for picture in pictures:
        assert (ROOT / "docs" / picture).read_bytes().startswith(b"\x89PNG")


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([\w./-]+\.md)(?:#[\w-]+)?\)", PAGE):
        assert (ROOT / "docs" / link).exists(), link


@pytest.mark.parametrize(
    "goal", [goal for goal in GOALS if goal.benchmark != GPU], ids=lambda goal: goal.what
)
def test_a_benchmark_that_went_well_has_the_figures_of_its_goals(goal: Goal) -> None:
    found = found_in(KEPT.hosts[0])
    if any(one.figures is not None for one in found.runs(goal.benchmark)):
        assert found.spread(goal.benchmark, goal.pick) is not None


# -- how it is made ---------------------------------------------------------------------------------


def test_the_same_results_give_the_same_page_and_other_results_another() -> None:
    kept = Kept((results(wire=run({"p50_ms": 0.7})),))
    assert page(kept) == page(kept) != page(Kept((results(wire=run({"p50_ms": 0.8})),)))
    assert "0.700 ms" in page(kept)


def test_without_results_there_is_no_number() -> None:
    assert not re.search(NUMBER_IN_A_CELL, page(Kept()))
    empty = page(Kept((results(),)))
    assert not [
        line for line in empty.splitlines() if re.search(r"\d ms|/s \|", line) and "at most" not in line
    ]


def test_a_missed_goal_says_so() -> None:
    text = goals(found_in(results(wire=run({"p50_ms": 0.7, "p99_ms": 1.2}))))
    p50, p99 = rows(text, "request overhead")
    assert p50[1:4] == ["at most 0.5 ms", "0.700 ms", "**missed**"] and p99[3] == "met"
    (bind, *_) = rows(text, "bind, SD 1.5")
    assert bind[2:4] == ["-", "not measured"]


def test_a_repetition_that_disagrees_is_told() -> None:
    goal = Goal("x", "x", at("x"), 1.0)
    assert verdict(goal, Spread((0.9, 1.1, 0.8))) == "met, met in 2 of 3 runs"
    assert verdict(goal, Spread((1.2, 1.1, 0.8))) == "**missed**, met in 1 of 3 runs"
    assert verdict(Goal("x", "x", at("x"), 4.0, is_most=False), Spread((5.0,))) == "met"


def test_a_benchmark_that_failed_says_why() -> None:
    text = page(Kept((results(wire=run(None, "took longer than 9 s")),)))
    assert rows(text, "request overhead")[0][3] == "failed: took longer than 9 s"
    assert "Failed: took longer than 9 s." in text and "1 failed" in text


def test_advantages_are_of_the_same_run_and_worse_is_shown() -> None:
    runs = tuple(
        run({"per_switch": {"images_per_s": theirs}, "understudy": {"images_per_s": ours}})
        for theirs, ours in ((1.0, 2.0), (10.0, 5.0), (2.0, 3.0))
    )
    (row,) = [
        r for r in rows(versus(Found({"compare": runs})), "images per second") if "from_pretrained" in r[1]
    ]
    assert row[2:] == ["**1.50 (0.500 to 2)**", "2 /s (1 to 10)", "3 /s (2 to 5)"]
    worse = {"per_switch": {"switch_ms_p50": 1.0}, "understudy": {"switch_ms_p50": 4.0}}
    (row,) = rows(versus(Found({"compare": (run(worse),)})), "visible switch p50")
    assert row[2] == "0.250"


def test_a_peer_that_is_not_installed_says_so() -> None:
    figures = {
        "understudy_gbps": 9.0, "peers": {"safetensors": 3.0},
        "absent": {"tensorizer": "No module named 'tensorizer'", "fastsafetensors": "ended: oh"},
    }  # fmt: skip
    table = {
        row[1]: row for row in rows(versus(Found({"load": (run(figures),)})), "weights into memory, warm")
    }
    assert table["tensorizer"][3] == "not installed"
    assert table["fastsafetensors"][3] == "failed: ended: oh"
    assert table["`safetensors.load_file`, copied"][2] == "**3**"


def test_compiled_steps_join_when_they_are_measured() -> None:
    figures = {
        "eager_step_ms": 30.0, "compiled_step_ms": 20.0, "speed_up": 1.5, "compile_s": 60.0,
        "compile_warm_cache_s": 9.0, "recompiles": 0,
    }  # fmt: skip
    text = page(Kept((results(compile=run(figures)),)))
    assert "## Compiled steps" in text and rows(text, "a denoising step")[0][2] == "**1.50**"
    assert "Compiled steps" not in page(Kept((results(),)))


def test_a_gpu_check_is_a_section_and_decides_its_goals() -> None:
    check = gpu_check(
        rates={"pool_of_pinned": 0.95, "one_loader": {"pool_gbps": 45.0}, "targets": {"at_least_0.9": True}},
        switch_sd15={"gpu_idle_ms": {"p50": 1.5}, "targets": {"gpu_idle_under_1_ms": False}},
        upcast={"skipped": "no time left"},
        serving={"lru": {"images_per_s": 1.0}, "understudy": {"images_per_s": 4.0}},
        peers={"understudy_gbps": 9.0, "peers": {"safetensors": 3.0}},
        steps={"error": "broken"},
    )
    text = page(Kept((results(),), (check,)))
    assert "## On NVIDIA Example" in text and "No GPU has run" not in text
    on_gpu = text.partition("## On NVIDIA Example")[2]
    assert rows(on_gpu, "images per second")[0][2:] == ["**4**", "1 /s", "4 /s"]
    assert rows(on_gpu, "weights into memory, warm")[0][2] == "**3**"
    assert rows(text, "load, host pool to GPU")[0][2:4] == ["0.950", "met"]
    assert rows(text, "GPU idle between requests, SD 1.5")[0][3] == "**missed**"
    assert rows(text, "`rates` | `one_loader.pool_gbps`")[0][2] == "45"
    assert ["`steps`", "the section", "**failed**: broken"] in rows(text, "`steps`")
    assert "No GPU has run" in page(Kept((results(),)))


def test_a_gpu_checks_file_is_read_beside_the_hosts(tmp_path: Path) -> None:
    from benchmarks.report.results import write_results

    write_results(tmp_path / "example.json", results(wire=run({"p50_ms": 0.4})))
    (tmp_path / "gpu.json").write_text(
        '{"gpu": {"name": "NVIDIA Example"}, "device": "cuda", "size": "real", "machine": {},'
        ' "started_at": "2026-01-01", "failed": [], "sections": {"rates": {"pool_of_pinned": 0.8}}}'
    )
    (tmp_path / "README.md").write_text("before\n<!-- figures: begin --><!-- figures: end -->\nafter\n")
    (tmp_path / "docs" / "images").mkdir(parents=True)
    report.render(tmp_path, tmp_path)
    text = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "## On NVIDIA Example" in text and "0.400 ms" in text
    assert (tmp_path / "README.md").read_text().endswith("<!-- figures: end -->\nafter\n")


def test_other_hosts_follow_the_newest() -> None:
    new = results(wire=run({"p50_ms": 0.4}, began_at="2026-02-01"))
    old = results(cpu="Older CPU", wire=run({"p50_ms": 9.0}, began_at="2026-01-01"))
    text = page(Kept((new, old)))
    assert text.index("Example CPU") < text.index("## Also on Older CPU")
    assert rows(text, "request overhead")[0][2] == "0.400 ms"


def test_pictures_are_drawn_of_what_there_is(tmp_path: Path) -> None:
    from benchmarks.report.plots import draw_all

    program = {"images_per_s": 2.0, "switch_ms_p50": 1.0, "switch_ms_p95": 2.0, "switch_ms_p99": 0.0}
    compared = run({"understudy": program, "lru": program})
    loaded = run({"understudy_gbps": 9.0, "raw_gbps": 9.5, "peers": {"a": 3.0}, "cold": {"raw_gbps": 1.0}})
    found = Found({"compare": (compared, compared), "load": (loaded,), "lora": (run(None, "broken"),)})
    drawn = draw_all(found, tmp_path)
    assert [path.name for path in drawn] == ["bench-serving.png", "bench-load.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_numbers_have_three_figures() -> None:
    texts = {0.0: "0", 24.0: "24", 0.00094: "0.00094", 0.0949: "0.095", 1.234: "1.23", 12.34: "12.3"}
    assert {value: number(value) for value in texts} == texts
    assert number(88390.4) == "88,390"


def test_a_document_without_marks_is_refused() -> None:
    with pytest.raises(NoMarks):
        with_figures("nothing", "text")


def test_rivals_have_a_row_each() -> None:
    found = Found({})
    assert len(versus(found).splitlines()) == 2 + len(list(rivals(found)))

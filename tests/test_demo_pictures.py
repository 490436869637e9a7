"""The pictures are PNG files that show what they should; how they look is for people to judge."""

from pathlib import Path

import pytest
from PIL import Image

from understudy.trace import Span, lane
from understudy_demo.measure import Served, turns
from understudy_demo.pictures import Sheet, baseline_strip, contact_sheet, daemon_strip, timeline

ALARM = (0xD1, 0x49, 0x5B)


def trace(gap_s: float) -> list[Span]:
    """Ten images of three models, 0.1 s each, with this pause between them, and a load before each."""
    spans = []
    for i in range(10):
        start_s = 100 + i * (0.1 + gap_s)
        name = f"model-{i % 3}"
        spans += [
            Span(f"loader {i % 2}", f"{name} unet", start_s - 0.08, start_s - 0.01),
            Span("load", name, start_s - gap_s, start_s),
            Span("stage", name, start_s, start_s + 0.1),
        ]
    return spans


def draw(path: Path, gap_s: float) -> Image.Image:
    spans = trace(gap_s)
    stage = lane(spans, "stage")
    asked = [Served(i, s.name, "disk", 100.0, s.end_s) for i, s in enumerate(stage)]
    taken = turns(asked, stage)
    strips = [daemon_strip("ours", spans, taken), baseline_strip("theirs", spans, taken)]
    timeline(strips, path, title="a title", subtitle="figures", window_s=1.0)
    with Image.open(path) as image:
        assert image.format == "PNG"
        return image.convert("RGB")


def alarms(image: Image.Image) -> int:
    return sum(count for count, colour in image.getcolors(1 << 24) or () if colour == ALARM)


def test_a_timeline_marks_visible_switches(tmp_path: Path) -> None:
    calm, waiting = draw(tmp_path / "calm.png", 0.001), draw(tmp_path / "waiting.png", 0.04)
    assert calm.width > 1200 and calm.height > 500
    legend = alarms(calm)
    assert alarms(waiting) > 5 * legend > 0, "pauses of a millisecond are not marked, those of 40 are"


def test_a_timeline_of_nothing_is_still_a_picture(tmp_path: Path) -> None:
    path = timeline([daemon_strip("ours", [], [])], tmp_path / "empty.png", title="nothing happened")
    with Image.open(path) as image:
        assert image.format == "PNG"


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (4, 12)])
def test_a_contact_sheet_holds_every_picture(tmp_path: Path, rows: int, columns: int) -> None:
    red = Image.new("RGB", (64, 64), (255, 0, 0))
    sheet = Sheet(
        [f"prompt {i}" for i in range(rows)],
        [f"hue-grain-{i:02d}" for i in range(columns)],
        [[red] * columns for _ in range(rows)],
    )
    path = contact_sheet(sheet, tmp_path / "sheet.png", title="models", subtitle="prompts")
    with Image.open(path) as image:
        colours = image.convert("RGB").getcolors(1 << 24) or ()
        red_pixels = sum(count for count, colour in colours if colour == (255, 0, 0))
    assert red_pixels == pytest.approx(rows * columns * (1.08 * 120) ** 2, rel=0.05)


def test_a_long_subtitle_is_not_cut_off(tmp_path: Path) -> None:
    sheet = Sheet(["p"], ["m", "n"], [[None, None]])
    long = "trained from scratch: a base, its fine-tunes, its LoRAs; " * 4
    contact_sheet(sheet, tmp_path / "long.png", title="2 of 24 models, one daemon", subtitle=long)
    with Image.open(tmp_path / "long.png") as image:
        edge = image.convert("RGB").crop((image.width - 12, 0, image.width, image.height))
        assert edge.getcolors() == [(12 * image.height, (255, 255, 255))]


def test_a_missing_picture_leaves_its_place_empty(tmp_path: Path) -> None:
    contact_sheet(Sheet(["p"], ["m"], [[None]]), tmp_path / "gap.png", title="one is missing")
    with Image.open(tmp_path / "gap.png") as image:
        assert image.format == "PNG"

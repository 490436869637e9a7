"""What the README says between its marks, from results alone."""

from benchmarks.report.markdown import prose, table
from benchmarks.report.page import found_in, words
from benchmarks.report.picking import Found, at
from benchmarks.report.results import Kept

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
_SHORT = (
    ("weights from the page cache into memory, of the best peer", "load", "ratio_best_peer",
     "understudy_gbps", " GB/s"),
    ("weights from a cold disk into memory, of the best peer", "load", "cold.ratio_best_peer",
     "cold.understudy_gbps", " GB/s"),
    ("images per second, of the best baseline", "compare", "throughput_ratio",
     "understudy.images_per_s", " /s"),
    ("another LoRA from disk, of diffusers' change", "lora", "sd15_rank_16.ratio_cold",
     "sd15_rank_16.cold_ms", " ms"),
    ("another LoRA folded ahead, of the same", "lora", "sd15_rank_16.ratio_hot",
     "sd15_rank_16.visible_switch_ms_p50", " ms"),
)  # fmt: skip
_REST = """All figures, missed goals among them, are in [docs/benchmarks.md](docs/benchmarks.md), which
    `make bench` makes."""


class NoMarks(Exception):
    """The document has no place for the figures."""


def readme_figures(kept: Kept) -> str:
    """Switches, idle time, and a few lines of the page's first table."""
    if not kept.hosts:
        return "Nothing is measured yet: `make bench`."
    found = found_in(kept.hosts[0], kept.gpus)
    machine = words(kept.hosts[0].machine)
    said = [
        prose(f"Measured on {machine}; medians; real-size architectures, random weights, all components:"),
        _switches(found),
        _idle(found),
        "Beside what one would pick today, in the same run; under 1, ours is worse:",
        _short(found),
        prose(_REST),
    ]
    return "\n\n".join(part for part in said if part)


def with_figures(document: str, text: str) -> str:
    """The document with this text between its marks. Raises `NoMarks`."""
    head, begin, rest = document.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise NoMarks(f"the document lacks {BEGIN} and {END}")
    return f"{head}{begin}\n\n{text}\n\n{end}{tail}"


def _switches(found: Found) -> str:
    columns = (("tensors", ""), ("bind_ms_p50", " ms"), ("visible_ms_p50", " ms"))
    rows = [
        [name, *(found.text("switch", at(f"{key}.{column}"), unit) for column, unit in columns)]
        for key, name in (("sd15", "Stable Diffusion 1.5, fp16"), ("sdxl", "SDXL, fp16"))
    ]
    return table(["", "tensors", "bind", "visible switch"], rows)


def _idle(found: Found) -> str:
    ours, theirs = (
        found.spread("serve", at(f"idle_while_waiting_percent{whose}")) for whose in ("", "_on_demand")
    )
    if ours is None or theirs is None:
        return ""
    models, room = (found.text("serve", at(key)) for key in ("models", "resident"))
    return prose(
        f"""With {models} small models and room for {room}, loads slowed to most of an image's time, the stage
        idles {ours.text(" %")} of its time while work waits, against {theirs.text(" %")} for an LRU that
        loads on demand."""
    )


def _short(found: Found) -> str:
    rows = [
        [what, found.text(benchmark, at(ratio)), found.text(benchmark, at(ours), unit)]
        for what, benchmark, ratio, ours, unit in _SHORT
    ]
    return table(["", "times better", "Understudy"], rows)

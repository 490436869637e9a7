"""What a user would pick today, its figure, ours, in the same run: the table that the page begins with."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.report.markdown import table
from benchmarks.report.picking import NONE, Found, Pick, at, most, ratio

_BASELINES = {
    "lru": "an LRU of diffusers pipelines in process",
    "per_switch": "`from_pretrained` at every switch",
    "background_thread": "the LRU and a thread that loads ahead",
    "cpu_offload": "accelerate's CPU offload",
}
_PEERS = {
    "from_pretrained": "`from_pretrained`, copied",
    "safetensors": "`safetensors.load_file`, copied",
    "safetensors_pread": "safetensors' `pread` backend",
    "fastsafetensors": "fastsafetensors",
    "fastsafetensors_buffered": "fastsafetensors, buffered",
    "runai_model_streamer": "runai-model-streamer",
    "tensorizer": "tensorizer",
}


@dataclass(frozen=True, slots=True)
class Rival:
    """One row. `is_time`: less is better. `told` is the group that the row belongs to."""

    told: str
    today: str
    benchmark: str
    theirs: Pick
    ours: Pick
    unit: str
    is_time: bool

    @property
    def advantage(self) -> Pick:
        """How many times better ours is; under 1 it is worse."""
        return ratio(self.theirs, self.ours) if self.is_time else ratio(self.ours, self.theirs)


def versus(found: Found) -> str:
    """The table. A row without figures says why; rivals that are not installed say so."""
    return _table(found, list(rivals(found)))


def versus_of_what_there_is(found: Found) -> str:
    """The same without rows of benchmarks that were not run; nothing when none was."""
    there = [rival for rival in rivals(found) if found.spread(rival.benchmark, rival.advantage) is not None]
    return _table(found, there) if there else ""


def rivals(found: Found) -> Iterator[Rival]:
    """All rows, in order."""
    yield from _serving(found)
    yield from _loading(found)
    for rank in (16, 64):
        path = f"sd15_rank_{rank}"
        today = "diffusers: load, fuse, unfuse, unload"
        theirs = at(f"{path}.diffusers_load_fuse_unfuse_ms")
        yield Rival(
            f"another LoRA of rank {rank}, from disk",
            today,
            "lora",
            theirs,
            at(f"{path}.cold_ms"),
            " ms",
            True,
        )
        hot = at(f"{path}.visible_switch_ms_p50")
        yield Rival(f"another LoRA of rank {rank}, folded ahead", today, "lora", theirs, hot, " ms", True)
    on_demand = "the same daemon as an LRU, loads on demand"
    yield Rival(
        "images per second",
        on_demand,
        "serve",
        at("throughput_on_demand_lru"),
        at("throughput"),
        " /s",
        False,
    )
    yield Rival(
        "stage idle while work waits", on_demand, "serve", at("idle_while_waiting_percent_on_demand"),
        at("idle_while_waiting_percent"), " %", True,
    )  # fmt: skip
    yield Rival(
        "first image after `kill -9`", "weights read from disk again", "restart",
        at("cold_first_image_s"), at("warm_first_image_s"), " s", True,
    )  # fmt: skip
    if "compile" in found:
        yield Rival(
            "a denoising step",
            "eager modules",
            "compile",
            at("eager_step_ms"),
            at("compiled_step_ms"),
            " ms",
            True,
        )


def _serving(found: Found) -> Iterator[Rival]:
    for name, today in _BASELINES.items():
        if found.spread("compare", at(f"{name}.images_per_s")) is None and name == "cpu_offload":
            continue  # it means nothing without a GPU
        theirs, ours = at(f"{name}.images_per_s"), at("understudy.images_per_s")
        yield Rival("images per second", today, "compare", theirs, ours, " /s", False)
    for percent in (50, 95, 99):
        for name, today in _BASELINES.items():
            key = f"switch_ms_p{percent}"
            if found.spread("compare", at(f"{name}.{key}")) is not None:
                yield Rival(
                    f"visible switch p{percent}", today, "compare", at(f"{name}.{key}"),
                    at(f"understudy.{key}"), " ms", True,
                )  # fmt: skip


def _loading(found: Found) -> Iterator[Rival]:
    ours = at("understudy_gbps")
    for name, today in _PEERS.items():
        yield Rival("weights into memory, warm", today, "load", at(f"peers.{name}"), ours, " GB/s", False)
    yield Rival(
        "weights within reach, warm", "`from_pretrained` as it comes: they stay in the file", "load",
        at("mapped.from_pretrained_mapped"), ours, " GB/s", False,
    )  # fmt: skip
    yield Rival(
        "weights into memory, cold", "the best of these", "load", most("cold.peers"),
        at("cold.understudy_gbps"), " GB/s", False,
    )  # fmt: skip


def _table(found: Found, chosen: Sequence[Rival]) -> str:
    headings = ["", "what a user would pick today", "times better", "today", "Understudy"]
    return table(headings, [_row(found, rival) for rival in chosen], texts=2)


def _row(found: Found, rival: Rival) -> list[str]:
    theirs = found.text(rival.benchmark, rival.theirs, rival.unit)
    ours = found.text(rival.benchmark, rival.ours, rival.unit)
    if theirs == NONE:
        theirs = _why_missing(found, rival)
    advantage = found.spread(rival.benchmark, rival.advantage)
    better = (
        NONE
        if advantage is None
        else f"**{advantage.text()}**"
        if advantage.median >= 1
        else advantage.text()
    )
    return [rival.told, rival.today, better, theirs, ours]


def _why_missing(found: Found, rival: Rival) -> str:
    """A peer may be absent where its benchmark is not."""
    names = {today: name for name, today in _PEERS.items()}
    absent = found.word(rival.benchmark, f"absent.{names.get(rival.today, '')}")
    if absent is None:
        return found.why_not(rival.benchmark)
    return "not installed" if absent.startswith("No module named") else f"failed: {absent}"

"""The numbers that this project wants to hold, and whether it does."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.report.markdown import table
from benchmarks.report.picking import NONE, Found, Pick, Spread, at, number

GPU = "gpu"
"""The GPU check's sections, as if they were the figures of one benchmark."""
YES = "yes"


@dataclass(frozen=True, slots=True)
class Goal:
    """`is_most`: the figure is to be at most the bound, else at least. With the unit `YES` it is a truth."""

    what: str
    benchmark: str
    pick: Pick
    bound: float
    unit: str = ""
    is_most: bool = True

    @property
    def text(self) -> str:
        """Such as "at most 1 ms"."""
        if self.unit == YES:
            return YES
        if not self.bound and self.is_most:
            return "0"
        return f"at {'most' if self.is_most else 'least'} {self.bound:g}{self.unit}"

    def is_met_by(self, value: float) -> bool:
        """One figure."""
        return value <= self.bound if self.is_most else value >= self.bound


def _least(what: str, benchmark: str, path: str, bound: float, unit: str = "") -> Goal:
    return Goal(what, benchmark, at(path), bound, unit, is_most=False)


def _most(what: str, benchmark: str, path: str, bound: float, unit: str = "") -> Goal:
    return Goal(what, benchmark, at(path), bound, unit)


GOALS = (
    _most("bind, SD 1.5, p50", "switch", "sd15.bind_ms_p50", 1, " ms"),
    _most("bind, SDXL, p50", "switch", "sdxl.bind_ms_p50", 2, " ms"),
    _most("visible switch, model resident, SD 1.5, p50", "switch", "sd15.visible_ms_p50", 2, " ms"),
    _most("visible switch, model resident, SDXL, p50", "switch", "sdxl.visible_ms_p50", 3, " ms"),
    _most("the same beside the best published (PipeSwitch, small nets)", "switch",
          "sd15.visible_ms_p50", 3.6, " ms"),
    _most("GPU idle between requests, SD 1.5, p50", GPU, "switch_sd15.gpu_idle_ms.p50", 1, " ms"),
    _most("GPU idle between requests, SDXL, p50", GPU, "switch_sdxl.gpu_idle_ms.p50", 1, " ms"),
    _least("load, page cache to arena, of raw reads", "load", "ratio_raw", 0.85),
    _least("load, page cache to arena, of the best peer", "load", "ratio_best_peer", 2),
    _least("load, host pool to GPU, of a large pinned copy", GPU, "rates.pool_of_pinned", 0.9),
    _most("step beside a loader at full rate, p50, of alone", GPU, "steps.chunk_mib.16.p50_ratio", 1.03),
    _most("step beside a loader at full rate, p99, of alone", GPU, "steps.chunk_mib.16.p99_ratio", 1.10),
    _most("stage idle while work waits, production trace, simulated, 10 % of models resident", "simulate",
          "idle_while_waiting_percent", 1, " %"),
    _most("stage idle while work waits, end to end", "serve", "idle_while_waiting_percent", 1, " %"),
    _least("part of the way from an LRU on demand to everything resident, images per second", "serve",
           "gap_closed", 0.8),
    _most("change of a folded LoRA, SDXL on a GPU, p50", GPU,
          "adapters_sdxl.visible_switch_ms_p50", 10, " ms"),
    _least("change of LoRA on the CPU, from disk, times faster than diffusers, rank 16", "lora",
           "sd15_rank_16.ratio_cold", 4),
    _least("change of LoRA on the CPU, from disk, times faster than diffusers, rank 64", "lora",
           "sd15_rank_64.ratio_cold", 4),
    _most("base weights that a LoRA leaves changed", "lora", "sd15_rank_64.drift_tensors", 0),
    _most("request overhead, no-op pipeline, ipc, p50", "wire", "p50_ms", 0.5, " ms"),
    _most("request overhead, no-op pipeline, ipc, p99", "wire", "p99_ms", 1.5, " ms"),
    _most("step beside 500 requests/s and views being built, p50, of alone", "wire",
          "interference.step_p50_ratio", 1.05),
    _most("ping p99 meanwhile", "wire", "interference.ping_p99_ms", 10, " ms"),
    _least("restart after `kill -9`, blob files unreadable: images correct", "restart",
           "correct_without_blob_files", 1, YES),
    _most("requests lost by that restart", "restart", "requests_lost", 0),
    _most("first image after that restart, of one with nothing kept", "restart", "warm_ratio", 0.5),
    _most("loaders killed in mid-load: failed requests", "handover", "failed_requests", 0),
    _most("loaders killed in mid-load: leaked bytes", "handover", "leaked_bytes", 0),
    _most("a killed loader's successor at work", "handover", "respawn_ms", 1000, " ms"),
    _most("timeline, of the time that the stage computes", "observe", "timeline_percent", 1, " %"),
)  # fmt: skip


def goals(found: Found, chosen: Sequence[Goal] = GOALS) -> str:
    """The table: goal, figure, whether it is met, the command."""
    return table(["", "goal", "figure", "", "by"], [_row(found, goal) for goal in chosen], texts=5)


def _row(found: Found, goal: Goal) -> list[str]:
    runs = found.runs(goal.benchmark)
    command = f"`{runs[0].command}`" if runs else "`make gpu-check`" if goal.benchmark == GPU else NONE
    spread = found.spread(goal.benchmark, goal.pick)
    if spread is None:
        return [goal.what, goal.text, NONE, found.why_not(goal.benchmark), command]
    return [goal.what, goal.text, _figure(spread, goal.unit), verdict(goal, spread), command]


def _figure(spread: Spread, unit: str) -> str:
    if unit == YES:
        return YES if all(spread.values) else "no"
    return spread.text(unit)


def verdict(goal: Goal, spread: Spread) -> str:
    """The median decides; a repetition that says otherwise is told."""
    met = [goal.is_met_by(value) for value in spread.values]
    word = "met" if goal.is_met_by(spread.median) else "**missed**"
    return word if all(met) or not any(met) else f"{word}, met in {sum(met)} of {number(len(met))} runs"

"""What the check measures, in order. Each section is a function from `Bench` to a document."""

from functools import partial

from benchmarks.gpu.runner import Section
from benchmarks.gpu.sections.adapters import measure_adapters
from benchmarks.gpu.sections.blocks import measure_blocks
from benchmarks.gpu.sections.compare import compare, compare_in_short
from benchmarks.gpu.sections.compiled import measure_compiled
from benchmarks.gpu.sections.full_arena import open_full_arena
from benchmarks.gpu.sections.images import compare_images
from benchmarks.gpu.sections.killed_loader import kill_loaders
from benchmarks.gpu.sections.killed_parent import kill_parent
from benchmarks.gpu.sections.peers import compare_peers
from benchmarks.gpu.sections.rates import measure_rates
from benchmarks.gpu.sections.registering import register_memory
from benchmarks.gpu.sections.round_trip import make_round_trip
from benchmarks.gpu.sections.steps import measure_steps
from benchmarks.gpu.sections.switches import measure_switches
from benchmarks.gpu.sections.upcast import look_for_strays
from benchmarks.gpu.sections.weights import make_weights

SECTIONS = (
    Section("ipc", make_round_trip, 60.0),
    Section("full_arena", open_full_arena, 60.0),
    Section("registering", register_memory, 30.0),
    Section("rates", measure_rates, 90.0),
    Section("killed_loader", kill_loaders, 60.0),
    Section("killed_parent", kill_parent, 60.0),
    Section("weights", make_weights, 150.0),
    Section("images_sd15", partial(compare_images, kind="sd15"), 60.0),
    Section("images_sdxl", partial(compare_images, kind="sdxl"), 90.0),
    Section("switch_sd15", partial(measure_switches, kind="sd15"), 60.0),
    Section("switch_sdxl", partial(measure_switches, kind="sdxl"), 90.0),
    Section("steps", measure_steps, 120.0),
    Section("adapters_sdxl", measure_adapters, 90.0),
    Section("upcast", look_for_strays, 90.0),
    Section("compile", measure_compiled, 240.0),
    Section("peers", compare_peers, 90.0, least_s=45.0),
    Section("blocks_flux", measure_blocks, 90.0, least_s=45.0),
    Section("serving", compare_in_short, 240.0, least_s=150.0),
)

ON_DEMAND = (Section("compare", compare, 1500.0),)
"""Run when they are named only."""

"""What the page says of each benchmark: what it is, which figures, which picture."""

from benchmarks.report.layout import Section, figures, grid
from benchmarks.report.markdown import prose, table
from benchmarks.report.picking import Found, at

_PROGRAMS = {
    "understudy": "**Understudy**",
    "per_switch": "`from_pretrained` at every switch",
    "lru": "LRU of pipelines in process",
    "background_thread": "LRU and a loading thread",
    "cpu_offload": "accelerate's CPU offload",
}


def _loads(found: Found) -> list[tuple[str, str]]:
    keys = [("understudy_gbps", "**Understudy**"), ("raw_gbps", "raw reads, the limit")]
    for group, behind in (("peers", ""), ("mapped", " (stays in the file)")):
        keys += [(f"{group}.{name}", f"{name}{behind}") for name in found.names("load", group)]
    return keys


def _absent(found: Found) -> str:
    whys = {name: found.word("load", f"absent.{name}") for name in found.names("load", "absent")}
    return prose(f"Absent: {', '.join(f'{name} ({why})' for name, why in whys.items())}.") if whys else ""


def _load_tables(found: Found) -> str:
    rates = grid("load", [("warm, GB/s", "{row}"), ("cold, GB/s", "cold.{row}")], _loads)
    ratios = [
        [what, found.text("load", at(path)), found.text("load", at(f"cold.{path}"))]
        for what, path in (("of raw reads", "ratio_raw"), ("of the best peer", "ratio_best_peer"))
    ]
    parts = [table(["Understudy", "warm", "cold"], ratios), rates(found), _absent(found)]
    return "\n\n".join(part for part in parts if part)


def _programs(found: Found) -> list[tuple[str, str]]:
    return [(key, name) for key, name in _PROGRAMS.items() if found.names("compare", key)]


def _compare_tables(found: Found) -> str:
    head = figures(
        "compare",
        [
            ("throughput_ratio", "our images per second, of the best of the others'", ""),
            ("wrong_images", "images that are not, bit for bit, `from_pretrained`'s", ""),
            ("requests", "requests of each program", ""),
        ],
    )
    columns = [
        ("images/s", "{row}.images_per_s"),
        ("switch p50, ms", "{row}.switch_ms_p50"),
        ("p95", "{row}.switch_ms_p95"),
        ("p99", "{row}.switch_ms_p99"),
        ("image, ms", "{row}.image_ms"),
        ("beside a load", "{row}.step_inflation"),
        ("memory, MB", "{row}.memory_mb"),
        ("loads", "{row}.loads"),
    ]
    return head(found) + "\n\n" + grid("compare", columns, _programs)(found)


def _changes(found: Found) -> list[tuple[str, str]]:
    return [(key, key.replace("_", " ")) for key in found.names("lora", "") if "_rank_" in key]


_LORA = grid(
    "lora",
    [
        ("from disk, times faster", "{row}.ratio_cold"),
        ("folded ahead, times faster", "{row}.ratio_hot"),
        ("in processor time", "{row}.ratio_cold_cpu"),
        ("diffusers, ms", "{row}.diffusers_load_fuse_unfuse_ms"),
        ("from disk, ms", "{row}.cold_ms"),
        ("folded, ms", "{row}.visible_switch_ms_p50"),
        ("drift", "{row}.drift_tensors"),
        ("diffusers' drift", "{row}.diffusers_drift_tensors"),
    ],
    _changes,
)

_SWITCH = grid(
    "switch",
    [
        ("bind p50, ms", "{row}.bind_ms_p50"),
        ("bind p99", "{row}.bind_ms_p99"),
        ("visible p50, ms", "{row}.visible_ms_p50"),
        ("visible p99", "{row}.visible_ms_p99"),
        ("tensors", "{row}.tensors"),
        ("switches", "{row}.switches"),
    ],
    lambda found: [("sd15", "Stable Diffusion 1.5"), ("sdxl", "SDXL")],
)

_OVERHEAD = grid(
    "wire",
    [
        ("p50, ms", "{row}p50_ms"),
        ("p99", "{row}p99_ms"),
        ("plain pyzmq p50", "{row}raw_p50_ms"),
        ("plain p99", "{row}raw_p99_ms"),
        ("requests/s, 32 in flight", "{row}requests_per_s"),
        ("1 MB image p50, ms", "{row}image_1mb_p50_ms"),
        ("blocking client p50", "{row}blocking_client_p50_ms"),
    ],
    lambda found: [("", "ipc"), ("tcp.", "tcp, loopback")],
)

_INTERFERENCE = figures(
    "wire",
    [
        ("interference.step_p50_ratio", "step time beside the flood, of alone, p50", ""),
        ("interference.step_p99_ratio", "the same, p99", ""),
        ("interference.ping_p50_ms", "another client's pings meanwhile, p50", " ms"),
        ("interference.ping_p99_ms", "the same, p99", " ms"),
        ("interference.requests_per_s", "requests per second that came", ""),
        ("interference.models_loaded", "models whose views were built meanwhile", ""),
    ],
)

SECTIONS = (
    Section(
        "compare",
        "Comparison",
        """One bursty workload over many small models, room for a quarter of them, through the
        daemon and through what people run today; same arrivals, same bytes for weights, one
        thread each. A switch is how long nothing was painted before an image of another model,
        although something was wanted.""",
        _compare_tables,
        "bench-serving.png",
    ),
    Section(
        "load",
        "Load",
        """Random weights of a real-size UNet of Stable Diffusion 1.5 (fp16, 1.72 GB) into
        memory that stays, each arrival compared by checksum. Peers are set up as their own
        documentation says. Warm: the file is in the page cache; cold: it was dropped from it.""",
        _load_tables,
        "bench-load.png",
    ),
    Section(
        "lora",
        "LoRA",
        """Another adapter on a UNet of real size: read and folded beside the base, and by
        diffusers' load, fuse, unfuse and unload on the same weights. Every folded weight equals
        the fused one, bit for bit. Drift counts base weights whose bytes are others after one
        round.""",
        _LORA,
        "bench-lora.png",
    ),
    Section(
        "switch",
        "Switch",
        """Between two resident models of real size through the real stage, every component
        different, all bound tensors hashed.""",
        _SWITCH,
    ),
    Section(
        "wire",
        "Wire",
        """A pipeline that makes nothing, through client, front end, core, stage and back,
        beside plain pyzmq round trips in turns; then what the front end takes from a stage
        whose steps are mostly the interpreter's.""",
        lambda found: _OVERHEAD(found) + "\n\n" + _INTERFERENCE(found),
    ),
    Section(
        "serve",
        "Many models",
        """A closed loop over many small models with room for some, loads slowed to 0.8 of an
        image, between its two bounds: everything resident, and an LRU that loads on demand.""",
        figures(
            "serve",
            [
                ("gap_closed", "our part of the way from the lower bound to the upper", ""),
                ("throughput", "images per second", ""),
                ("throughput_all_resident", "the same, everything resident", ""),
                ("throughput_on_demand_lru", "the same, an LRU that loads on demand", ""),
                ("idle_while_waiting_percent", "stage idle while work waits, of its busy time", " %"),
                ("idle_while_waiting_percent_on_demand", "the same, the LRU", " %"),
                ("visible_switch_ms_p50", "visible switch, p50", " ms"),
                ("visible_switch_ms_p99", "the same, p99", " ms"),
                ("models", "models", ""),
                ("resident", "room for", ""),
                ("requests", "requests", ""),
                ("lost", "requests without their answer, all three runs", ""),
                ("wrong_image", "images that are not diffusers', all three runs", ""),
            ],
        ),
    ),
    Section(
        "simulate",
        "Production trace, simulated",
        """The daemon's own policy plays the shipped example trace in virtual time, compressed
        until runs alone would keep the stage busy for 85 % of it; an A100's costs as published.""",
        figures(
            "simulate",
            [
                ("idle_while_waiting_percent", "stage idle while work waits, of its busy time", " %"),
                ("idle_while_waiting_percent_lru_on_demand", "the same, an LRU that loads on demand", " %"),
                ("models", "models", ""),
                ("resident", "room for", ""),
                ("miss_percent", "requests whose model was not resident", " %"),
                ("visible_switch_p95_ms", "visible switch, p95", " ms"),
                ("decision_us_p50", "a decision of the core, p50", " µs"),
                ("decision_us_p99", "the same, p99", " µs"),
            ],
        ),
    ),
    Section(
        "compile",
        "Compiled steps",
        """One denoising step, eager and compiled; one graph serves every fine-tune of an
        architecture.""",
        figures(
            "compile",
            [
                ("speed_up", "an eager step, in times of a compiled one", ""),
                ("eager_step_ms", "an eager step", " ms"),
                ("compiled_step_ms", "a compiled step", " ms"),
                ("compile_s", "to compile, nothing cached", " s"),
                ("compile_warm_cache_s", "to compile after a restart, with inductor's cache", " s"),
                ("recompiles", "recompiles after the warm-up", ""),
                ("max_relative_error", "largest difference from eager, relative", ""),
            ],
        ),
    ),
    Section(
        "handover",
        "Hand-over",
        """A real-size UNet by one loader process beside plain reads in alternation; loaders
        killed in mid-load, alone and under a daemon that serves.""",
        figures(
            "handover",
            [
                ("ratio_raw", "a load, of plain reads", ""),
                ("load_gbps", "file in the page cache to arena", " GB/s"),
                ("raw_gbps", "plain reads", " GB/s"),
                ("host_tier_gbps", "host pool to arena", " GB/s"),
                ("respawn_ms", "SIGKILL of a loader to its successor at work", " ms"),
                ("failed_requests", "requests that failed meanwhile", ""),
                ("leaked_bytes", "bytes of arena and host pool that were not there again", ""),
            ],
        ),
    ),
    Section(
        "restart",
        "Restart",
        """`kill -9` with requests open and the page cache dropped; started with nothing kept,
        and with the host pool that a service manager keeps, the blob files made unreadable.
        Stable Diffusion 1.5 in fp32.""",
        figures(
            "restart",
            [
                ("warm_ratio", "warm, of cold", ""),
                ("cold_first_image_s", "kill to first image, from disk", " s"),
                ("warm_first_image_s", "the same, from memory alone", " s"),
                ("cold_until_bound_s", "kill to bound on stage, from disk", " s"),
                ("warm_until_bound_s", "the same, from memory alone", " s"),
                ("warm_import_s", "import of torch and diffusers, in both", " s"),
                ("warm_image_s", "the image's own computing, in both", " s"),
                ("disk_gbps", "rate of the cold start's loads", " GB/s"),
                ("correct_without_blob_files", "every image right (1)", ""),
                ("requests_lost", "requests without an image", ""),
                ("answers_duplicated", "second answers", ""),
            ],
        ),
    ),
    Section(
        "coldstart",
        "Cold start",
        """The daemon on one real-size Stable Diffusion 1.5 in the page cache: start of the
        process to the first image; medians of three starts.""",
        figures(
            "coldstart",
            [
                ("first_image_s", "start to first image", " s"),
                ("import_s", "torch, diffusers, the stage", " s"),
                ("device_s", "loaders up, arena standing", " s"),
                ("weights_s", "first load's start to last load's end", " s"),
                ("warmup_s", "one request per architecture", " s"),
                ("overlapped_s", "work done beside other work", " s"),
            ],
        ),
    ),
    Section(
        "observe",
        "Watching",
        """What the timeline, which is always on, and ten scrapes a second cost while the stage
        computes.""",
        figures(
            "observe",
            [
                ("timeline_percent", "the timeline, of the time that the stage computes", " %"),
                ("span_ns", "one entry of it", " ns"),
                ("spans_per_image", "entries with an image", ""),
                ("scrape_ms_p50", "a scrape, p50", " ms"),
                ("scrape_ms_p99", "the same, p99", " ms"),
                ("scrape_kib", "its size", " KiB"),
                ("trace_ms", "to fetch all that the timeline has", " ms"),
            ],
        ),
    ),
)

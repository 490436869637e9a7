"""Cost profiles for the simulator from what the GPU check has measured."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from understudyd.simulate import profiles
from understudyd.simulate.profiles import Figure, Profile

KINDS = ("sd15", "sdxl")
_TEMPLATE = "h100-{kind}"


def write_profiles(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """One TOML file for each architecture whose switches were measured; without a GPU none."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for profile in measured_profiles(document):
        path = folder / f"{profile.name}.toml"
        path.write_text(profiles.to_toml(profile), encoding="utf-8")
        written.append(path)
    return written


def measured_profiles(document: Mapping[str, Any]) -> Iterator[Profile]:
    """What was measured in the place of published figures; what was not keeps its published source."""
    if (gpu := document["gpu"]) is None:
        return
    sections, name = document["sections"], gpu["name"]
    short_name = re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia ")).strip("-")
    for kind in KINDS:
        switches = sections.get(f"switch_{kind}", {})
        if "bind_ms" not in switches:
            continue
        figures = {"bind_s": _figure(switches["bind_ms"]["p50"] / 1e3, name, f"switch_{kind}, bind p50")}
        if "pinned_copy_gbps" in (rates := sections.get("rates", {})):
            figures |= _rates(rates, name)
        if kind == "sd15" and (chunks := sections.get("steps", {}).get("chunk_mib")):
            resting_ms = min(chunk["resting_ms_p50"] for chunk in chunks.values())
            figures["step_s"] = _figure(resting_ms / 1e3, name, "steps, p50 while loaders rest")
        template = profiles.load(_TEMPLATE.format(kind=kind))
        yield msgspec.structs.replace(
            template,
            name=f"{short_name}-{kind}",
            about=f"{template.about}; partly measured: {name}",
            **figures,
        )


def _rates(rates: Mapping[str, Any], name: str) -> dict[str, Figure]:
    from_pool_gbps = rates["one_loader"]["pool_gbps"]
    from_disk_gbps = max(rates[loaders]["disk_gbps"] for loaders in ("one_loader", "two_loaders"))
    return {
        "bus_bytes_per_s": _figure(rates["pinned_copy_gbps"] * 1e9, name, "rates, one large pinned copy"),
        "loader_bytes_per_s": _figure(from_pool_gbps * 1e9, name, "rates, one loader from the host pool"),
        "disk_bytes_per_s": _figure(
            from_disk_gbps * 1e9, name, "rates, files in the page cache: put your disk's own rate here"
        ),
    }


def _figure(value: float, name: str, what: str) -> Figure:
    return Figure(value, f"measured by the GPU check on {name}: {what}")

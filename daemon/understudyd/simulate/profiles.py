"""What things cost on some hardware with some architecture: data files, every figure with its source.

A profile is a TOML file, one of those beside this module or anybody's own. A figure is a table with `value`
and `source`; its unit is in its name.
"""

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from understudyd.core.types import BlobInfo, ModelInfo
from understudyd.recorded import TraceRequest, derived_name
from understudyd.simulate.trace import Survey

FOLDER = Path(__file__).parent / "profiles"
GPUS = Path(__file__).parent / "gpus.toml"


class ProfileError(Exception):
    """The profile cannot be used; the message names the file and the key."""


Source = Annotated[str, msgspec.Meta(min_length=1)]


class Figure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A number and where it comes from."""

    value: Annotated[float, msgspec.Meta(ge=0)]
    source: Source


BATCH_FIXED_SHARE = Figure(
    (8 - 8 / 1.25) / 7,
    "published for diffusion: a batch of 8 gives 25 % more throughput, in 6.4 times the time of one image",
)


class Component(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Weights of one component, in order of first use. `is_shared`: all models have the same blob."""

    name: str
    size_bytes: Annotated[int, msgspec.Meta(ge=1)]
    source: Source
    is_shared: bool = False


class Overlay(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What adapters change of a component: the size of its folded weights."""

    component: str
    size_bytes: Annotated[int, msgspec.Meta(ge=1)]
    source: Source


class Loras(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What adapters cost. All have `adapter_bytes` and change the same.

    `fold_s` is what folding one adapter into all overlays of a model takes, for the stage to do beside a run.
    `change_s` is what today's practice takes to change adapters: load, fuse, and unfuse later.
    """

    adapter_bytes: Figure
    fold_s: Figure
    change_s: Figure
    overlays: Annotated[tuple[Overlay, ...], msgspec.Meta(min_length=1)]

    @property
    def overlay_bytes(self) -> int:
        """What one combination of adapters takes beside its model."""
        return sum(overlay.size_bytes for overlay in self.overlays)


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds and bytes of one architecture on one machine.

    A run takes `request_s + images * (steps * step_s + image_s)` of the stage; `bind_s` comes before it
    when another model ran last. Of a run that several requests share, `batch_fixed_share` of what one image
    takes is spent once, the rest for each. Loads share `disk_bytes_per_s` and `bus_bytes_per_s`, none is
    faster than `loader_bytes_per_s`, and each takes `load_s` besides its bytes. `views_s`, `prepare_s` (once
    per model) and `encode_s` (per image) pass off the stage.
    """

    name: str
    about: str
    components: Annotated[tuple[Component, ...], msgspec.Meta(min_length=1)]
    step_s: Figure
    image_s: Figure
    request_s: Figure
    bind_s: Figure
    bus_bytes_per_s: Figure
    disk_bytes_per_s: Figure
    loader_bytes_per_s: Figure
    load_s: Figure
    views_s: Figure
    prepare_s: Figure
    encode_s: Figure
    move_bytes_per_s: Figure
    batch_fixed_share: Figure = BATCH_FIXED_SHARE
    loras: Loras | None = None

    @property
    def model_bytes(self) -> int:
        """What one model takes alone."""
        return sum(component.size_bytes for component in self.components)

    @property
    def own_bytes(self) -> int:
        """What one more model takes where others are: shared components not counted."""
        return sum(c.size_bytes for c in self.components if not c.is_shared)

    def bytes_of(self, models: int) -> int:
        """Room for so many models, shared components counted once, a page of slack a component."""
        own = sum(-(-c.size_bytes // 4096) * 4096 for c in self.components if not c.is_shared)
        shared = sum(-(-c.size_bytes // 4096) * 4096 for c in self.components if c.is_shared)
        return models * own + shared

    def overlays_bytes(self, combinations: int, adapters: int) -> int:
        """Room for so many combinations of adapters, and for the adapters."""
        if self.loras is None:
            return 0
        overlays = sum(-(-overlay.size_bytes // 4096) * 4096 for overlay in self.loras.overlays)
        adapter = -(-int(self.loras.adapter_bytes.value) // 4096) * 4096
        return combinations * overlays + adapters * max(adapter, 4096)

    def model(self, name: str, max_batch: int = 1) -> ModelInfo:
        """A model of this architecture as the core sees it."""
        blobs = (
            BlobInfo(c.name if c.is_shared else f"{name}/{c.name}", c.size_bytes) for c in self.components
        )
        return ModelInfo(name, tuple(blobs), max_batch=max_batch)

    def derived(self, name: str, adapters: Sequence[tuple[str, float]], max_batch: int = 1) -> ModelInfo:
        """A model with adapters. Raises `ProfileError` without figures for them."""
        if self.loras is None:
            raise ProfileError(f"{self.name} does not say what adapters cost: it has no [loras]")
        base, combination = self.model(name), derived_name("", adapters)
        size_bytes = int(self.loras.adapter_bytes.value)
        sources = [BlobInfo(f"lora {adapter}", size_bytes) for adapter, _ in adapters]
        places = {component.name: place for place, component in enumerate(self.components)}
        overlays = []
        for overlay in self.loras.overlays:
            under = base.blobs[places[overlay.component]]
            made_of = (under, *dict.fromkeys(sources))
            overlays.append(BlobInfo(f"{under.key}{combination}", overlay.size_bytes, made_of))
        blobs = (*base.blobs, *overlays)
        return ModelInfo(derived_name(name, adapters), blobs, max_batch=max_batch, is_derived=True)

    def fold_s(self, overlay_bytes: int, adapters: int) -> float:
        """Seconds to make an overlay."""
        assert self.loras is not None
        return self.loras.fold_s.value * adapters * overlay_bytes / self.loras.overlay_bytes

    def run_s(self, request: TraceRequest) -> float:
        """Seconds on the stage, binding not included."""
        per_image_s = request.steps * self.step_s.value + self.image_s.value
        return self.request_s.value + request.images * per_image_s

    def shared_run_s(self, runs_s: Sequence[float], images: int) -> float:
        """Seconds of one run for requests that take `runs_s` each alone and make so many images in all."""
        if len(runs_s) == 1:
            return runs_s[0]
        once_s, fixed = self.request_s.value, self.batch_fixed_share.value
        alone_s = sum(run_s - once_s for run_s in runs_s)
        return once_s + alone_s * (fixed / images + 1.0 - fixed)

    def work_s(self, survey: Survey) -> float:
        """Seconds on the stage of a whole trace."""
        return (
            survey.requests * self.request_s.value
            + survey.image_steps * self.step_s.value
            + survey.images * self.image_s.value
        )

    def compression_for(self, survey: Survey, utilisation: float) -> float:
        """By how much to compress the trace's time so that the stage is busy this share of it (0 to 1)."""
        return utilisation * survey.span_s / self.work_s(survey)


class Gpu(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A GPU one can rent: its memory, what computing needs of it, and the profile to assume."""

    memory_bytes: int
    reserve_bytes: int
    profile: str
    source: Source

    @property
    def arena_bytes(self) -> int:
        """The largest arena."""
        return self.memory_bytes - self.reserve_bytes


def names() -> list[str]:
    """Profiles that come with Understudy."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name_or_path: str) -> Profile:
    """A profile by name, or from a file. Raises `ProfileError`."""
    path = FOLDER / f"{name_or_path}.toml" if name_or_path in names() else Path(name_or_path)
    if not path.is_file():
        raise ProfileError(f"no profile {name_or_path!r}; give a file, or one of {', '.join(names())}")
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        return check(msgspec.convert(document, Profile))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise ProfileError(f"{path}: {error}") from error


def check(profile: Profile) -> Profile:
    """Rates that time is divided by are not 0, components have names of their own. Raises `ProfileError`."""
    names = [component.name for component in profile.components]
    if len(set(names)) < len(names):
        raise ProfileError(f"{profile.name}: two components have one name; give each its own")
    for name in ("bus_bytes_per_s", "disk_bytes_per_s", "loader_bytes_per_s", "move_bytes_per_s", "step_s"):
        if getattr(profile, name).value == 0:
            raise ProfileError(f"{profile.name}: {name} must not be 0")
    if profile.batch_fixed_share.value > 1:
        raise ProfileError(f"{profile.name}: batch_fixed_share is a share, at most 1")
    if profile.loras is not None:
        names = [component.name for component in profile.components]
        for overlay in profile.loras.overlays:
            if overlay.component not in names:
                raise ProfileError(f"{profile.name}: no component {overlay.component!r} for an overlay")
    return profile


def to_toml(profile: Profile) -> str:
    """The profile as a file that `load` reads: what a measurement writes down."""
    lines = [f"name = {json.dumps(profile.name)}", f"about = {json.dumps(profile.about)}"]
    for component in profile.components:
        lines += ["", "[[components]]", *_lines(component)]
    for name in Profile.__struct_fields__:
        if isinstance(figure := getattr(profile, name), Figure):
            lines += ["", f"[{name}]", *_lines(figure)]
    if (loras := profile.loras) is not None:
        for name in ("adapter_bytes", "fold_s", "change_s"):
            lines += ["", f"[loras.{name}]", *_lines(getattr(loras, name))]
        for overlay in loras.overlays:
            lines += ["", "[[loras.overlays]]", *_lines(overlay)]
    return "\n".join(lines) + "\n"


def _lines(table: msgspec.Struct) -> list[str]:
    return [f"{key} = {json.dumps(value)}" for key, value in msgspec.structs.asdict(table).items()]


def gpu(name: str) -> Gpu:
    """A GPU by name. Raises `ProfileError`."""
    gpus = msgspec.convert(tomllib.loads(GPUS.read_text(encoding="utf-8")), dict[str, Gpu])
    if name not in gpus:
        raise ProfileError(f"no GPU {name!r}; one of {', '.join(sorted(gpus))}, or give --arena-up-to")
    return gpus[name]

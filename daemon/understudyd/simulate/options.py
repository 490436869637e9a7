"""What is typed on the command line: sizes, shares, policies and profiles, as the simulator takes them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from understudyd.config import ConfigError, parse_size
from understudyd.core.policy import PolicySettings
from understudyd.simulate import profiles
from understudyd.simulate.profiles import Profile
from understudyd.simulate.report import UNLIMITED, Scenario
from understudyd.simulate.trace import Survey

F = TypeVar("F", bound=Callable[..., Any])
DEFAULTS = PolicySettings()


class Size(click.ParamType[int | str]):
    """Bytes, "72GiB"; "all" where everything may be meant."""

    name = "size"

    def __init__(self, *, has_all: bool = False) -> None:
        self._has_all = has_all

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """See click."""
        if isinstance(value, int):
            return value
        if self._has_all and value == "all":
            return "all"
        try:
            return parse_size(value)
        except ConfigError as error:
            self.fail(str(error), param, ctx)


class Percent(click.ParamType[float]):
    """A share: "85%" is 0.85."""

    name = "percent"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """See click."""
        if isinstance(value, float):
            return value
        try:
            share = float(value.removesuffix("%")) / 100.0
        except ValueError:
            share = -1.0
        if not 0.0 < share < 1e6 or not value.endswith("%"):
            self.fail(f'{value!r} is no share; write it like "85%"', param, ctx)
        return share


_LOAD_OPTIONS = [
    click.argument("path", metavar="TRACE", type=click.Path(path_type=Path, dir_okay=False)),
    click.option(
        "--host-pool",
        type=Size(has_all=True),
        default="128GiB",
        show_default=True,
        help='Host memory for copies of weights; "all" has room for every model.',
    ),
    click.option("--compress", type=click.FloatRange(min=0, min_open=True), help="Divide time by this."),
    click.option("--utilisation", type=Percent(), help="Compress so that runs alone keep the stage so busy."),
    click.option("--loaders", type=click.IntRange(1, 32), default=2, show_default=True),
    click.option("--lookahead", type=click.IntRange(0), default=DEFAULTS.lookahead, show_default=True),
    click.option("--max-wait", type=float, default=DEFAULTS.max_wait_s, show_default=True, help="Seconds."),
    click.option("--max-skips", type=click.IntRange(1), default=DEFAULTS.max_skips, show_default=True),
    click.option("--max-waiting", type=click.IntRange(1), help="Refuse what comes when so many wait."),
    click.option(
        "--max-batch",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        help="Images that one run may make for several requests, of every model.",
    ),
    click.option("--prefetch/--no-prefetch", default=True, show_default=True),
    click.option("--json", "as_json", is_flag=True, help="Print JSON."),
]


def load_options(command: F) -> F:
    """How the trace is played, to what hardware: shared by the commands."""
    for option in reversed(_LOAD_OPTIONS):
        command = option(command)
    return command


def scenario(survey: Survey, profile: Profile, options: dict[str, Any]) -> Scenario:
    """What is common to the commands; the arena is still to be chosen. Raises `click.UsageError`."""
    if survey.combinations and profile.loras is None:
        raise click.UsageError(f"the trace has adapters; {profile.name} has no [loras] to say what they cost")
    compress, utilisation = options["compress"], options["utilisation"]
    if compress is not None and utilisation is not None:
        raise click.UsageError("give --compress or --utilisation, not both")
    if utilisation is not None:
        if not survey.span_s:
            raise click.UsageError("--utilisation needs requests that do not all come at once")
        compress = profile.compression_for(survey, utilisation)
    pool = options["host_pool"]
    return Scenario(
        survey=survey,
        profile=profile,
        arena_bytes=0,
        pool_bytes=profile.bytes_of(len(survey.models)) if pool == "all" else pool,
        slots=0,
        compress=compress or 1.0,
        loaders=options["loaders"],
        settings=PolicySettings(
            lookahead=options["lookahead"],
            max_wait_s=options["max_wait"],
            max_skips=options["max_skips"],
            prefetch=options["prefetch"],
        ),
        max_waiting=options["max_waiting"] or UNLIMITED,
        max_batch=options["max_batch"],
    )


def resident_models(text: str, models: int) -> int:
    """A number, or a share like "10%" of all; at least one. Raises `click.UsageError`."""
    try:
        count = float(text.removesuffix("%"))
    except ValueError:
        count = 0.0
    if text.endswith("%"):
        count = max(1.0, round(models * count / 100.0)) if count > 0 else 0.0
    if count < 1 or count != int(count):
        raise click.UsageError(f'--models-resident {text!r}: give a number, or a share like "10%"')
    return min(models, int(count))


def find_profile(name: str) -> Profile:
    """A profile by name or file. Raises `click.ClickException`."""
    try:
        return profiles.load(name)
    except profiles.ProfileError as error:
        raise click.ClickException(str(error)) from error

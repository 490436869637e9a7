"""`understudyd simulate`, `understudyd plan` and `understudyd synthesize`."""

import gzip
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import click
import msgspec

from understudyd.simulate import planning, plot, profiles, synthetic
from understudyd.simulate.options import (
    Percent,
    Size,
    find_profile,
    load_options,
    resident_models,
    scenario,
)
from understudyd.simulate.report import PolicyName, Report, simulate
from understudyd.simulate.show import plan_table, print_plan, print_report
from understudyd.simulate.trace import Survey, TraceError, survey

_PROFILES = f"One of {', '.join(profiles.names())}, or a file."


@click.command("simulate")
@load_options
@click.option("--profile", default="a100-sd15", show_default=True, help=_PROFILES)
@click.option("--arena", type=Size(), help="GPU memory for weights.")
@click.option("--models-resident", help='Arena for so many models: "7" or "10%".  [default: 10%]')
@click.option("--overlays-resident", type=click.IntRange(0), help="And for so many combinations of adapters.")
@click.option("--slots", type=click.IntRange(0), help="Compare misses with so many slots; 0: not.")
@click.option("--policy", type=click.Choice(get_args(PolicyName)), default="understudy", show_default=True)
@click.option("--plot", "picture", type=click.Path(path_type=Path, dir_okay=False), help="Draw a PNG.")
def simulate_command(
    path: Path,
    profile: str,
    arena: int | None,
    models_resident: str | None,
    overlays_resident: int | None,
    slots: int | None,
    policy: PolicyName,
    picture: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Say what a daemon would do with the requests of TRACE: CSV or a request log, plain or gzip.

    The daemon's own policy decides, in virtual time; --profile says what things cost.
    """
    found, costs = _survey(path), find_profile(profile)
    if arena is not None and models_resident is not None:
        raise click.UsageError("give --arena or --models-resident, not both")
    if arena is None:
        arena = costs.bytes_of(resident_models(models_resident or "10%", len(found.models)))
        arena += costs.overlays_bytes(overlays_resident or 0, overlays_resident or 0)
    asked = replace(scenario(found, costs, options), arena_bytes=arena, policy=policy)
    if asked.resident < 1:
        raise click.ClickException(
            f"a model of {costs.name} takes {costs.model_bytes} bytes, the arena has {arena}"
        )
    asked = replace(asked, slots=asked.resident if slots is None else slots)
    try:
        result = simulate(asked)
        if picture is not None:
            plot.draw_result(result, picture)
    except (TraceError, plot.NoMatplotlib) as error:
        raise click.ClickException(str(error)) from error
    _print_json(result.report) if as_json else print_report(result.report)


@click.command("plan")
@load_options
@click.option("--gpu", required=True, help="a100-40, a100-80, h100-80: memory and profile to assume.")
@click.option("--target-idle", type=Percent(), default="1%", show_default=True, help="Of busy time.")
@click.option("--profile", help=_PROFILES)
@click.option("--arena-up-to", type=Size(), help="Largest arena to look at, instead of the GPU's.")
@click.option("--plot", "picture", type=click.Path(path_type=Path, dir_okay=False), help="Draw a PNG.")
def plan_command(
    path: Path,
    gpu: str,
    target_idle: float,
    profile: str | None,
    arena_up_to: int | None,
    picture: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Say how much GPU memory the requests of TRACE need before users feel that models are switched."""
    try:
        card = profiles.gpu(gpu)
    except profiles.ProfileError as error:
        raise click.ClickException(str(error)) from error
    found, costs = _survey(path), find_profile(profile or card.profile)
    asked = scenario(found, costs, options)
    residents = planning.sizes(asked, arena_up_to or card.arena_bytes)
    if not residents:
        raise click.ClickException(
            f"a model of {costs.name} takes {costs.model_bytes} bytes, too much for {gpu}"
        )
    try:
        with plan_table(asked, gpu, is_quiet=as_json) as show:
            rows = [show(row) for row in planning.sweep(asked, residents)]
        plan = planning.conclude(rows, 100.0 * target_idle)
        if picture is not None:
            plot.draw_plan(plan, picture)
    except (TraceError, plot.NoMatplotlib) as error:
        raise click.ClickException(str(error)) from error
    _print_json(plan) if as_json else print_plan(plan, gpu)


@click.command("synthesize")
@click.argument("path", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--requests", type=click.IntRange(1), default=16_000, show_default=True)
@click.option("--models", type=click.IntRange(1), default=synthetic.Shape.models, show_default=True)
@click.option("--clients", type=click.IntRange(1), default=synthetic.Shape.clients, show_default=True)
@click.option("--skew", type=float, default=synthetic.Shape.skew, show_default=True, help="Of popularity.")
@click.option("--loras", type=click.IntRange(0), default=0, help="Adapters, dealt out to the models.")
@click.option("--seed", type=int, default=synthetic.Shape.seed, show_default=True)
def synthesize_command(
    path: Path, requests: int, models: int, clients: int, skew: float, loras: int, seed: int
) -> None:
    """Write made-up requests to PATH (CSV; gzip when it ends in .gz), shaped like real ones."""
    shape = synthetic.Shape(models=models, clients=clients, skew=skew, loras=loras, seed=seed)
    write(path, synthetic.csv_lines(synthetic.generate(requests, shape), with_loras=bool(loras)))


def write(path: Path, lines: Iterable[str]) -> None:
    """Write a trace; the same lines give the same file, whenever and whatever it is called."""
    with path.open("wb") as file:
        if path.suffix != ".gz":
            file.writelines(line.encode() for line in lines)
            return
        with gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
            packed.writelines(line.encode() for line in lines)


def _survey(path: Path) -> Survey:
    try:
        return survey(path)
    except TraceError as error:
        raise click.ClickException(str(error)) from error


def _print_json(what: Report | planning.Plan) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(what), indent=2).decode())

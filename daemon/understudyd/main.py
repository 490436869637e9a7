"""`understudyd`: the daemon's command line."""

import faulthandler
import gc
import logging
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import click

from understudyd import config as configuration
from understudyd import logs
from understudyd.simulate.commands import plan_command, simulate_command, synthesize_command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="understudy")
def main() -> None:
    """Serve hundreds of diffusion models from one GPU."""


@main.command()
@click.option(
    "--config", "path", type=click.Path(path_type=Path), help="TOML file; see `understudyd config`."
)
def serve(path: Path | None) -> None:
    """Serve until SIGTERM, which finishes what is open first."""

    def read() -> configuration.Config:
        return configuration.load(path or configuration.find())

    try:
        config = read()
    except configuration.ConfigError as error:
        raise click.ClickException(str(error)) from error
    is_json = logs.configure(config.log.level, config.log.format, sys.stderr, os.environ)
    if is_json:  # these have handlers of their own, which know no JSON
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    if not os.environ.get("TORCHINDUCTOR_CACHE_DIR"):  # torch reads it; its default does not outlive a boot
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(config.store.path / "compiled")
    faulthandler.enable()  # a watchdog's SIGABRT leaves every thread's traceback behind
    try:
        status = _serve(config, read)
    except click.ClickException as error:
        status = error.exit_code
        if is_json:
            logging.getLogger(__name__).critical("%s", error.message)
        else:
            error.show()
    _leave(status)


def _leave(status: int) -> NoReturn:
    """The interpreter's own end would crash a thread that is in the middle of importing torch."""
    if any(thread.daemon and thread is not threading.current_thread() for thread in threading.enumerate()):
        logging.shutdown()
        os._exit(status)
    raise SystemExit(status)


def _serve(config: configuration.Config, read: Callable[[], configuration.Config]) -> int:
    # What start-up makes is nearly all kept: the collector would walk it again and again, for seconds.
    gc.disable()
    try:
        import uvloop
    except ModuleNotFoundError as error:
        raise click.ClickException("this is the client alone: pip install 'understudy[daemon]'") from error

    from understudy.keys import KeyFileError
    from understudyd.shell.daemon import Daemon
    from understudyd.shell.endpoints import EndpointError
    from understudyd.shell.lock import AlreadyRunning
    from understudyd.shell.memory import ArenaError
    from understudyd.shell.notify import ServiceManager
    from understudyd.shell.socket_access import SocketAccessError
    from understudyd.store.errors import StoreError

    manager = ServiceManager.found(os.environ)

    async def life() -> int:
        return await Daemon(config, manager, read).serve()

    try:
        return int(uvloop.run(life()))
    except (AlreadyRunning, ArenaError, StoreError, EndpointError, KeyFileError, SocketAccessError) as error:
        raise click.ClickException(str(error)) from error


@main.command(
    context_settings={"ignore_unknown_options": True, "help_option_names": []}, add_help_option=False
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def ingest(arguments: tuple[str, ...]) -> None:
    """Add a model to a store without a daemon: --store DIR --name NAME --source FOLDER."""
    from understudyd.store.ingest import run_cli

    raise SystemExit(run_cli(list(arguments)))


@main.command(
    "ingest-lora",
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def ingest_lora(arguments: tuple[str, ...]) -> None:
    """Add LoRA adapters to a store without a daemon: --store DIR --source FILE [--base MODEL]."""
    from understudyd.store.adapters.cli import run

    raise SystemExit(run(list(arguments)))


@main.group()
def config() -> None:
    """Look at the configuration."""


@config.command()
@click.argument("path", type=click.Path(path_type=Path), required=False)
def check(path: Path | None) -> None:
    """Say whether a configuration file can be used."""
    raise SystemExit(configuration.main(["check", *([str(path)] if path else [])]))


main.add_command(simulate_command)
main.add_command(plan_command)
main.add_command(synthesize_command)


if __name__ == "__main__":
    main()

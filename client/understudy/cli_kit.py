"""What the subcommands of `understudy` share: where the daemon is, and exit codes by fault."""

import contextlib
import sys
from collections.abc import Iterator
from typing import NoReturn

import click

from understudy.errors import CapacityError, DaemonError, TransportError, UnderstudyError

EXIT_CALLER, EXIT_CAPACITY, EXIT_DAEMON, EXIT_TRANSPORT, EXIT_INTERRUPTED = 2, 3, 4, 5, 130

endpoint_option = click.option(
    "--endpoint",
    metavar="URL",
    help="Where the daemon listens: ipc:///path or tcp://host:port. "
    "Default: $UNDERSTUDY_ENDPOINT, else the socket in the runtime directory.",
)
wait_option = click.option(
    "--wait",
    "wait_s",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for a daemon that does not answer at all.",
)


@contextlib.contextmanager
def errors_as_exit_codes() -> Iterator[None]:
    """One line on stderr and the exit code of whose fault it was."""
    try:
        yield
    except KeyboardInterrupt:
        leave("cancelled", EXIT_INTERRUPTED)
    except CapacityError as error:
        leave(f"{error}{' (trying again later may help)' if error.retryable else ''}", EXIT_CAPACITY)
    except DaemonError as error:
        leave(f"the daemon failed: {error}", EXIT_DAEMON)
    except TransportError as error:
        leave(str(error), EXIT_TRANSPORT)
    except UnderstudyError as error:
        leave(str(error), EXIT_CALLER)


def leave(message: str, code: int) -> NoReturn:
    """Say why on stderr and exit."""
    click.echo(f"understudy: {message}", err=True)
    sys.exit(code)

"""What the subcommands of `understudy` share: where the daemon is, and exit codes by fault."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from understudy.errors import CapacityError, DaemonError, TransportError, UnderstudyError
from understudy.leaving import interrupted, leave_with
from understudy.paths import RECONNECT_S

if TYPE_CHECKING:
    from understudy.sync import Client

    Connect = Callable[[], Client]

EXIT_CALLER, EXIT_CAPACITY, EXIT_DAEMON, EXIT_TRANSPORT = 2, 3, 4, 5
_PROGRAM = "understudy"

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
    default=RECONNECT_S,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for a daemon that does not answer at all.",
)
_key_option = click.option(
    "--key",
    type=click.Path(path_type=Path),
    help="Your NAME.key, for a tcp:// endpoint that asks for keys. Default: $UNDERSTUDY_KEY.",
)
_server_key_option = click.option(
    "--server-key",
    type=click.Path(path_type=Path),
    help="The daemon's NAME.pub. Default: $UNDERSTUDY_SERVER_KEY.",
)


def connected(command: Callable[..., None]) -> Callable[..., None]:
    """Options that say where the daemon is; the command gets `connect`, which makes the client.

    `connect` raises `UnderstudyError`.
    """

    @_key_option
    @_server_key_option
    @wait_option
    @endpoint_option
    @functools.wraps(command)
    def with_options(
        *arguments: Any,
        endpoint: str | None,
        wait_s: float,
        key: Path | None,
        server_key: Path | None,
        **options: Any,
    ) -> None:
        def connect() -> "Client":
            from understudy.keys import Keys
            from understudy.sync import Client

            keys = Keys.read(key, server_key) if key is not None and server_key is not None else None
            return Client(endpoint, reconnect_s=wait_s, keys=keys)

        if (key is None) != (server_key is None):
            raise click.UsageError("--key and --server-key go together")
        command(*arguments, connect=connect, **options)

    return with_options


@contextlib.contextmanager
def errors_as_exit_codes() -> Iterator[None]:
    """One line on stderr and the exit code of whose fault it was."""
    try:
        yield
    except KeyboardInterrupt:
        interrupted(_PROGRAM, "cancelled")
    except CapacityError as error:
        hint = " (trying again later may help)" if error.retryable else ""
        leave(error.code, f"{error}{hint}", EXIT_CAPACITY)
    except DaemonError as error:
        leave(error.code, f"the daemon failed: {error}", EXIT_DAEMON)
    except TransportError as error:
        leave(error.code, str(error), EXIT_TRANSPORT)
    except UnderstudyError as error:
        leave(error.code, str(error), EXIT_CALLER)


def leave(code: str, message: str, exit_code: int) -> NoReturn:
    """Say on stderr what is wrong, with the error's code, and exit."""
    leave_with(_PROGRAM, code, message, exit_code)

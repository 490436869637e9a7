"""How the command lines end: `PROGRAM: error [CODE]: MESSAGE`, one line on stderr, and an exit code.

CODE is stable: the wire or admin protocol's, or this machine's own; docs/operations.md lists them.
"""

import sys
from typing import NoReturn

import click

CANNOT_WRITE, MISSING_PACKAGE = "cannot_write", "missing_package"


def leave_with(program: str, code: str, message: str, exit_code: int) -> NoReturn:
    """Say what is wrong and end the process."""
    click.echo(f"{program}: error [{code}]: {message}", err=True)
    sys.exit(exit_code)


def interrupted(program: str, message: str) -> NoReturn:
    """Ctrl-C is nobody's error."""
    click.echo(f"{program}: {message}", err=True)
    sys.exit(130)

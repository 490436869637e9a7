"""`understudy keygen`: a pair of keys for a daemon or a client that meet over TCP."""

from pathlib import Path

import click

from understudy.cli_kit import errors_as_exit_codes


@click.command()
@click.argument("name")
@click.option(
    "--out",
    "folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path(),
    metavar="DIR",
    help="Where the files go.  [default: here]",
)
def keygen(name: str, folder: Path) -> None:
    """Make NAME.key, which stays secret, and NAME.pub, which the other side needs.

    A daemon names its own .key and a file with the lines of its clients' .pub files in [curve]. A client
    names its own .key and the daemon's .pub with --key and --server-key.
    """
    with errors_as_exit_codes():
        from understudy.keys import write_pair

        secret, public = write_pair(name, folder)
    click.echo(f"{secret}: keep it secret")
    click.echo(f"{public}: give it to the other side; its line is")
    click.echo(public.read_text(encoding="ascii").rstrip())

"""Other users at a Unix socket: real processes that give up root before they connect."""

import grp
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be other users")

STRANGER = 54321
_ASK = """
import json, os, socket, sys
path, uid, gid, groups, line = json.loads(sys.argv[1])
os.setgroups(groups); os.setgid(gid); os.setuid(uid)
with socket.socket(socket.AF_UNIX) as sock:
    try:
        sock.connect(path)
    except PermissionError:
        print(json.dumps({"type": "shut out"}))
    else:
        sock.sendall(line.encode() + b"\\n")
        print(sock.makefile().readline())
"""


def ask_as(
    path: Path, line: dict[str, Any], *, uid: int, gid: int = STRANGER, groups: tuple[int, ...] = ()
) -> Any:
    """The answer to one line of JSON from a process of this user and these groups."""
    arguments = json.dumps([str(path), uid, gid, list(groups), json.dumps(line)])
    done = subprocess.run(
        [sys.executable, "-c", _ASK, arguments], capture_output=True, text=True, timeout=30, check=True
    )
    return json.loads(done.stdout)


def some_group() -> tuple[str, int]:
    """A group of this machine that is not our own."""
    entry = next(g for g in grp.getgrall() if g.gr_gid not in (0, os.getegid()))
    return entry.gr_name, entry.gr_gid


@contextmanager
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter, which pytest's are not."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)

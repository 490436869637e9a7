"""Who serves from a store: nothing that a daemon may still need is deleted under it."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from understudyd.store.errors import translated_write_errors


class Usage:
    """A lock file that every daemon on a store shares. One that is alone may delete what no model names."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None

    def begin(self) -> None:
        """Serve from here until `end`; waits while somebody deletes. Raises `StoreError`."""
        if self._fd is None:
            with translated_write_errors(f"cannot open {self._path}"):
                self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                fcntl.flock(self._fd, fcntl.LOCK_SH)

    def end(self) -> None:
        """Serve no more; harmless when it was not begun."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    @contextmanager
    def exclusive(self) -> Iterator[bool]:
        """Whether nobody else serves from here, which stays so until the end of the block."""
        if self._fd is not None:
            try:
                yield _is_locked(self._fd)
            finally:
                fcntl.flock(self._fd, fcntl.LOCK_SH)
            return
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            yield True  # no daemon was ever here
            return
        try:
            yield _is_locked(fd)
        finally:
            os.close(fd)


def _is_locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

"""Writing a small file so that it is the old one or the new one, whenever the machine loses power."""

import contextlib
import os
import threading
from pathlib import Path


def replace_file(path: Path, data: bytes) -> None:
    """In a thread: it waits for the disk. Raises `OSError`."""
    unfinished = path.with_name(f".{path.name}-{os.getpid()}-{threading.get_ident()}")
    try:
        with unfinished.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)

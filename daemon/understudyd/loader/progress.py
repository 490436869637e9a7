"""How far the load in hand is: written by the readers, read by the heart."""

import threading


class Progress:
    """One load at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._load_id: int | None = None
        self._bytes_done = 0

    def begin(self, load_id: int) -> None:
        """A load starts at nothing."""
        with self._lock:
            self._load_id, self._bytes_done = load_id, 0

    def add(self, size_bytes: int) -> None:
        """So many more bytes are read."""
        with self._lock:
            self._bytes_done += size_bytes

    def end(self) -> None:
        """No load is in hand."""
        with self._lock:
            self._load_id, self._bytes_done = None, 0

    def look(self) -> tuple[int | None, int]:
        """The load in hand and its bytes so far."""
        with self._lock:
            return self._load_id, self._bytes_done

"""What holds readers back: a rate limit and a pause, shared by all readers of one loader."""

import threading
import time

# The bucket holds this many seconds' worth, and one helping is half of it: smooth, and no idle arrears.
_BURST_S = 0.02
_SMALLEST_HELPING_BYTES = 4096


class Pacer:
    """A token bucket: lets `bytes_per_s` through on average; 0 means no limit."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._paid_until_s = 0.0

    def helping_bytes(self, chunk_bytes: int) -> int:
        """How much to read at once."""
        if self._bytes_per_s <= 0:
            return chunk_bytes
        smooth = int(self._bytes_per_s * _BURST_S / 2)
        return min(chunk_bytes, max(smooth, _SMALLEST_HELPING_BYTES))

    def spend(self, size_bytes: int, halt: threading.Event) -> None:
        """Wait until `size_bytes` more may be read, or until `halt` is set."""
        if self._bytes_per_s <= 0:
            return
        with self._lock:
            earliest_s = time.monotonic() - _BURST_S
            self._paid_until_s = max(self._paid_until_s, earliest_s) + size_bytes / self._bytes_per_s
            wait_s = self._paid_until_s - time.monotonic()
        if wait_s > 0:
            halt.wait(wait_s)


class Pause:
    """Ordered by one thread; the readers rest while it lasts."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._is_paused = False

    def order(self, is_paused: bool) -> None:
        """Have readers rest at their next piece, or go on."""
        with self._changed:
            self._is_paused = is_paused
            self._changed.notify_all()

    def halt(self, halt: threading.Event) -> None:
        """Set `halt` so that those who rest notice."""
        with self._changed:
            halt.set()
            self._changed.notify_all()

    def rest(self, halt: threading.Event) -> None:
        """Return when there is no pause or when `halt` was set by the method of that name."""
        with self._changed:
            self._changed.wait_for(lambda: halt.is_set() or not self._is_paused)

"""A rate limit for reading: a token bucket that all readers of one loader draw from."""

import threading
import time

# The bucket holds this many seconds' worth, and one helping is half of it: smooth, and no idle arrears.
_BURST_S = 0.02
_SMALLEST_HELPING_BYTES = 4096


class Pacer:
    """Lets `bytes_per_s` through on average; 0 means no limit."""

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

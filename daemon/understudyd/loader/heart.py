"""The heartbeat: a thread that does nothing else, so that a slow read is not taken for death."""

import threading
import time
from collections.abc import Callable

from understudyd.loader.progress import Progress
from understudyd.loader.wire import Heartbeat, Report


class Heart:
    """Beats once when it is started and then regularly until it is stopped."""

    def __init__(self, send: Callable[[Report], None], progress: Progress) -> None:
        self._send = send
        self._progress = progress
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, interval_s: float) -> None:
        """The first beat has been sent when this returns."""
        self._beat()
        self._thread = threading.Thread(target=self._run, args=(interval_s,), name="heart", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No beat follows. Nothing happens where none was started."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, interval_s: float) -> None:
        while not self._stopping.wait(interval_s):
            self._beat()

    def _beat(self) -> None:
        load_id, bytes_done = self._progress.look()
        self._send(Heartbeat(at_s=time.monotonic(), load_id=load_id, bytes_done=bytes_done))

"""The heartbeat: a thread that does nothing else, so that a slow read is not taken for death."""

import threading
import time
from collections.abc import Callable

from understudyd.loader.progress import Progress
from understudyd.loader.wire import Heartbeat, Report


class Heart:
    """Beats once when it is started and then every `interval_s`, until the process ends."""

    def __init__(self, send: Callable[[Report], None], progress: Progress, interval_s: float) -> None:
        self._send = send
        self._progress = progress
        self._interval_s = interval_s
        self._never = threading.Event()

    def start(self) -> None:
        """The first beat has been sent when this returns."""
        self._beat()
        threading.Thread(target=self._run, name="heart", daemon=True).start()

    def _run(self) -> None:
        while not self._never.wait(self._interval_s):
            self._beat()

    def _beat(self) -> None:
        load_id, bytes_done = self._progress.look()
        self._send(Heartbeat(at_s=time.monotonic(), load_id=load_id, bytes_done=bytes_done))

"""One loader as a thread of this process, for systems that refuse to share the arena with another process.

It runs the code of the loader processes over the same kind of socket pair. What it lacks is their isolation:
it shares the interpreter with the parent, and it cannot be killed.
"""

import contextlib
import logging
import os
import socket
import threading

from understudyd.loader.child import run
from understudyd.loader.faults import ENVIRONMENT_VARIABLE, CrashPoints
from understudyd.shell.loader_end import LoaderEnd

_log = logging.getLogger(__name__)


class LoaderThread(LoaderEnd):
    """A thread that ends when it is told to, or between two pieces once its socket is shut down.

    One that hangs in a system call is never reaped. Raises `OSError` when there is no thread to be had.
    """

    is_thread = True

    def __init__(self) -> None:
        super().__init__()
        self.pid = os.getpid()
        self._status = 1
        try:
            self.pidfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError:
            self._sock.close()
            self._theirs.close()
            raise
        # A daemon thread: one that hangs does not keep the process from ending.
        self._thread = threading.Thread(target=self._live, name="loader", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            self._sock.close()
            self._theirs.close()
            os.close(self.pidfd)
            raise OSError(str(error)) from error

    def _live(self) -> None:
        try:
            with self._theirs as theirs:
                self._status = run(theirs, CrashPoints(os.environ.get(ENVIRONMENT_VARIABLE, "")))
        except BaseException:  # noqa: BLE001 a thread's boundary: whatever it was, the loader has ended
            _log.exception("a loader thread broke")
        os.eventfd_write(self.pidfd, 1)

    def kill(self) -> None:
        """Shut its socket down: it winds up between two pieces."""
        with contextlib.suppress(OSError):  # it did so before
            self._sock.shutdown(socket.SHUT_RDWR)

    def reap(self) -> int:
        """See `LoaderEnd`."""
        self._thread.join()
        os.close(self.pidfd)
        self._sock.close()
        return self._status

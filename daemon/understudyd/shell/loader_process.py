"""One loader process: spawn, kill, reap."""

import os
import subprocess
from collections.abc import Sequence

from understudyd.shell.loader_end import LoaderEnd


class LoaderProcess(LoaderEnd):
    """A child process.

    Spawn it on a thread that lives as long as the daemon: the child dies with the thread that spawned it.
    Raises `OSError` when there is no process to be had.
    """

    is_thread = False

    def __init__(self, command: Sequence[str]) -> None:
        super().__init__()
        try:
            with self._theirs as theirs:
                self._popen = subprocess.Popen(
                    [*command, "--fd", str(theirs.fileno())],
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                )
            self.pid = self._popen.pid
            self.pidfd = self._open_pidfd()
        except BaseException:
            self._sock.close()
            raise

    def _open_pidfd(self) -> int:
        try:
            return os.pidfd_open(self.pid)
        except OSError:  # no descriptor to be had
            self._popen.kill()
            self._popen.wait()
            raise

    def kill(self) -> None:
        """SIGKILL, wherever it is."""
        self._popen.kill()

    def reap(self) -> int:
        """See `LoaderEnd`; negative: the signal."""
        status = self._popen.wait()
        os.close(self.pidfd)
        self._sock.close()
        return status

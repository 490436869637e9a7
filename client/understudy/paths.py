"""Where daemon and clients meet, and how long these wait for it. Standard library only.

The runtime directory is, in this order: ``$UNDERSTUDY_RUNTIME_DIR``; ``/run/understudy`` when it exists
(the systemd service makes it); ``$XDG_RUNTIME_DIR/understudy``; ``/tmp/understudy-<uid>``.
"""

import os
from pathlib import Path

SYSTEM_RUNTIME_DIR = Path("/run/understudy")
CLIENT_SOCKET = "understudy.sock"
ADMIN_SOCKET = "admin.sock"
METRICS_SOCKET = "metrics.sock"
RECONNECT_S = 30.0
"""Without a word from the daemon a client gives up after this, unless told otherwise: a restart fits in."""


def runtime_dir() -> Path:
    """`$UNDERSTUDY_RUNTIME_DIR`, else `/run/understudy` where there is one, else a directory of this user's.

    It holds the sockets, and may not exist yet.
    """
    if chosen := os.environ.get("UNDERSTUDY_RUNTIME_DIR"):
        return Path(chosen)
    if SYSTEM_RUNTIME_DIR.is_dir():
        return SYSTEM_RUNTIME_DIR
    if session := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(session) / "understudy"
    return Path(f"/tmp/understudy-{os.getuid()}")  # noqa: S108  the daemon makes it 0700 and checks its owner


def default_endpoint() -> str:
    """``$UNDERSTUDY_ENDPOINT``, else the client socket in the runtime directory."""
    return os.environ.get("UNDERSTUDY_ENDPOINT") or f"ipc://{runtime_dir() / CLIENT_SOCKET}"


def admin_socket() -> Path:
    """The admin socket in the runtime directory."""
    return runtime_dir() / ADMIN_SOCKET

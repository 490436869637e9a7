"""Tell the service manager how we are: the sd_notify protocol in a few lines (sd_notify(3))."""

import os
import socket


def notify(*assignments: str, address: str | None = None) -> bool:
    """Send `READY=1`, `STATUS=...`, ... to $NOTIFY_SOCKET; False where there is no service manager."""
    target = address if address is not None else os.environ.get("NOTIFY_SOCKET", "")
    if not target:
        return False
    if target.startswith("@"):
        target = "\0" + target[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto("\n".join(assignments).encode(), target)
        except OSError:
            return False  # the manager went away: no reason to stop serving
    return True

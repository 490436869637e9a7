"""Which endpoints may be served, and how."""

import ipaddress
import os

_IPC_PATH_BYTES = 107  # sun_path of a Unix socket, less its closing zero


class EndpointError(Exception):
    """An endpoint that cannot be served; the message says what to do."""


def check_endpoint(endpoint: str, *, has_keys: bool = False) -> None:
    """Raise `EndpointError` for an endpoint that is malformed or not safe to serve."""
    scheme, separator, address = endpoint.partition("://")
    if not separator or scheme not in ("ipc", "tcp") or not address:
        raise EndpointError(
            f"{endpoint!r} is no endpoint; write ipc:///path/to/socket or tcp://127.0.0.1:PORT"
        )
    if scheme == "tcp":
        host = address.rpartition(":")[0]
        if not has_keys and not is_loopback(host):
            raise EndpointError(
                f"{endpoint} can be reached from other machines: it needs keys. Make the daemon's and each "
                "client's with `understudy keygen NAME` and name them in [curve], or listen on "
                "tcp://127.0.0.1:PORT and forward the port (ssh -L)"
            )
    elif not address.startswith("/"):
        raise EndpointError(f"{endpoint!r}: an ipc endpoint is an absolute path, ipc:///path/to/socket")
    elif len(os.fsencode(address)) > _IPC_PATH_BYTES:
        raise EndpointError(f"{endpoint!r} is longer than a Unix socket's path may be; choose a shorter one")


def tcp_address(endpoint: str, *, allow_remote: bool = False) -> tuple[str, int]:
    """Host and port of a "tcp://HOST:PORT" that is served without keys. Raises `EndpointError`."""
    scheme, _, address = endpoint.partition("://")
    host, _, port = address.rpartition(":")
    if scheme != "tcp" or not host or not port.isdecimal() or int(port) > 65535:
        raise EndpointError(f"{endpoint!r} is no TCP endpoint; write it like tcp://127.0.0.1:9464")
    if not allow_remote and not is_loopback(host):
        raise EndpointError(
            f"{endpoint} can be reached from other machines, and all may read there: set allow_remote = true "
            "if that is wanted, or listen on tcp://127.0.0.1:PORT"
        )
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's alone; interfaces and wildcards are not."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"

"""The daemon's keys: its own, and those of clients that may connect (see `understudy.keys`)."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from understudy.keys import KeyFileError, read_public_keys, read_secret_key
from understudyd.config import CurveConfig

CREDENTIALS = "CREDENTIALS_DIRECTORY"
SECRET_CREDENTIAL, CLIENTS_CREDENTIAL = "curve-secret-key", "curve-client-keys"


@dataclass(frozen=True, slots=True)
class ServerKeys:
    """The daemon's `secret` key and the names of `clients` by public key, all in Z85."""

    secret: str = field(repr=False)
    clients: Mapping[str, str]


def load_keys(chosen: CurveConfig, environ: Mapping[str, str] = os.environ) -> ServerKeys | None:
    """The configured files, else the service manager's credentials (systemd.exec(5)); None without keys.

    Raises `KeyFileError`.
    """
    held = Path(environ[CREDENTIALS]) if environ.get(CREDENTIALS) else None
    secret, is_guarded = _choose(chosen.secret_key, held, SECRET_CREDENTIAL)
    clients, _ = _choose(chosen.client_keys, held, CLIENTS_CREDENTIAL)
    if secret is None and clients is None:
        return None
    if secret is None:
        raise KeyFileError(
            f"there are client keys ({clients}) but no [curve] secret_key: `understudy keygen`"
        )
    if clients is None:
        raise KeyFileError(
            f"there is a secret key ({secret}) but no [curve] client_keys: nobody could connect; put "
            "the lines of the clients' .pub files into one"
        )
    return ServerKeys(read_secret_key(secret, is_guarded=is_guarded), read_public_keys(clients))


def _choose(path: Path | None, held: Path | None, credential: str) -> tuple[Path | None, bool]:
    """The file, and whether the service manager guards it."""
    if path is not None:
        return path, held is not None and path.is_relative_to(held)
    if held is not None and (held / credential).exists():
        return held / credential, True
    return None, False

"""Keys for connections over TCP: CURVE, ZeroMQ's encryption and authentication (RFC 26/CurveZMQ).

A key is 40 characters of Z85 (RFC 32/Z85). A file of a secret key is that and nothing else, readable by its
owner alone. A file of public keys has a line `KEY NAME` for each; lines that begin with "# " are comments.
"""

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from understudy.errors import CallerError

KEY_VARIABLE, SERVER_KEY_VARIABLE = "UNDERSTUDY_KEY", "UNDERSTUDY_SERVER_KEY"

_Z85 = re.compile(r"[0-9A-Za-z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_MAX_BYTES = 1024 * 1024
NAME_RULE = "1 to 64 letters, digits, '.', '_', '@' or '-', the first a letter or digit"


class KeyFileError(CallerError):
    """A file of keys cannot be used; the message names it and says what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="bad_key")


@dataclass(frozen=True, slots=True)
class Keys:
    """A client's own `secret` key and the public key of the daemon that it means, in Z85."""

    secret: str = field(repr=False)
    server: str

    @classmethod
    def read(cls, secret: Path | str, server: Path | str) -> Self:
        """From the client's NAME.key and the daemon's NAME.pub. Raises `KeyFileError`."""
        known = read_public_keys(Path(server))
        if len(known) != 1:
            raise KeyFileError(f"{server} has {len(known)} keys; it must have one, the daemon's")
        return cls(read_secret_key(Path(secret)), next(iter(known)))

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Self | None:
        """From the files that $UNDERSTUDY_KEY and $UNDERSTUDY_SERVER_KEY name; None without either.

        Raises `KeyFileError`.
        """
        secret, server = environ.get(KEY_VARIABLE), environ.get(SERVER_KEY_VARIABLE)
        if not secret and not server:
            return None
        if not secret or not server:
            raise KeyFileError(f"set both {KEY_VARIABLE} and {SERVER_KEY_VARIABLE}, or neither")
        return cls.read(secret, server)


def public_key(secret: str) -> str:
    """The public half of a secret key."""
    import zmq

    return zmq.curve_public(secret.encode()).decode()


def read_secret_key(path: Path, *, is_guarded: bool = False) -> str:
    """The key in a file that nobody else may read or change. Raises `KeyFileError`.

    `is_guarded`: something else keeps others out, as the service manager does for its credentials.
    """
    text = _read(path, is_secret=not is_guarded).strip()
    if not _Z85.fullmatch(text):
        raise KeyFileError(f"{path} is no secret key: make one with `understudy keygen NAME`")
    return text


def read_public_keys(path: Path) -> dict[str, str]:
    """Names by public key; a file without any is an error. Raises `KeyFileError`."""
    names: dict[str, str] = {}
    for number, line in enumerate(_read(path, is_secret=False).splitlines(), 1):
        if not line.strip() or line.startswith("# "):
            continue
        key, _, name = line.strip().partition(" ")
        name = name.strip()
        if not _Z85.fullmatch(key) or not _NAME.fullmatch(name):
            raise KeyFileError(
                f"{path}, line {number}: no public key and name; put the line of a .pub file there, as "
                "`understudy keygen NAME` made it"
            )
        if key in names:
            raise KeyFileError(f"{path}, line {number}: the key of {names[key]} again; delete one of them")
        names[key] = name
    if not names:
        raise KeyFileError(f"{path} has no key; put the line of a .pub file there")
    return names


def write_pair(name: str, folder: Path) -> tuple[Path, Path]:
    """Make a pair of keys: NAME.key, which its owner alone may read, and NAME.pub. Raises `KeyFileError`."""
    import zmq

    if not _NAME.fullmatch(name):
        raise KeyFileError(f"{name!r:.80} cannot name a key: use {NAME_RULE}")
    public, secret = zmq.curve_keypair()
    files = (folder / f"{name}.key", folder / f"{name}.pub")
    for path in files:
        if path.exists():
            raise KeyFileError(f"{path} exists; delete it first, if nobody uses it any more")
    _write(files[0], f"{secret.decode()}\n", 0o600)
    _write(files[1], f"{public.decode()} {name}\n", 0o644)
    return files


def _write(path: Path, text: str, mode: int) -> None:
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
            file.write(text)
    except OSError as error:
        raise KeyFileError(f"cannot write {path}: {error.strerror}") from error


def _read(path: Path, *, is_secret: bool) -> str:
    try:
        with path.open("rb") as file:
            if is_secret:
                _check_owner_alone(path, os.fstat(file.fileno()))
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise KeyFileError(f"cannot read the key file {path}: {error.strerror}") from error
    if len(data) > _MAX_BYTES:
        raise KeyFileError(f"{path} is larger than {_MAX_BYTES} bytes: no file of keys")
    try:
        return data.decode("ascii")
    except UnicodeDecodeError as error:
        raise KeyFileError(f"{path} is no file of keys: {error}") from error


def _check_owner_alone(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise KeyFileError(f"{path} is no regular file")
    if found.st_mode & 0o077:
        mode = stat.S_IMODE(found.st_mode)
        raise KeyFileError(
            f"others may read the secret key {path} (mode {mode:04o}): chmod 600 {path}, and make "
            "a new key if others may have read it"
        )
    if os.geteuid() not in (0, found.st_uid) and found.st_uid != 0:
        raise KeyFileError(f"the secret key {path} belongs to uid {found.st_uid}: chown it to who uses it")

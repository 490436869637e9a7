"""What the daemon says on stderr: lines for people on a terminal, JSON for whoever collects logs elsewhere.

To the journal each line begins with its priority, which journald takes off (sd-daemon(3)).
"""

import logging
import os
import time
from collections.abc import Mapping
from typing import Any, TextIO

import msgspec

_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_DEBUG = 7


class JsonLines(logging.Formatter):
    """One JSON object a line: `time` (UTC), `level`, `logger`, `message`, and `error` with a traceback."""

    def __init__(self, *, to_journal: bool) -> None:
        super().__init__()
        self._to_journal = to_journal

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        document: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            document["error"] = self.formatException(record.exc_info)
        line = msgspec.json.encode(document).decode()
        return f"<{_priority(record.levelno)}>{line}" if self._to_journal else line


def configure(level: str, kind: str, stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Log to `stream`: `kind` is "text", "json", or "auto" for text on a terminal; whether it is JSON."""
    is_json = kind == "json" or (kind == "auto" and not stream.isatty())
    formatter: logging.Formatter = logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    if is_json:
        formatter = JsonLines(to_journal=_is_journal(stream, environ))
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(capture=is_json)
    return is_json


def set_level(level: str) -> None:
    """Log this and what is worse, from now on."""
    logging.getLogger().setLevel(level.upper())


def _is_journal(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """The service manager says which stream leads to the journal: $JOURNAL_STREAM, systemd.exec(5)."""
    try:
        status = os.fstat(stream.fileno())
    except OSError:
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def _priority(level: int) -> int:
    return next((priority for least, priority in _PRIORITIES if level >= least), _DEBUG)

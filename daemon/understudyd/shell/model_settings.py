"""What an operator has set for single models: a small file beside the writable store's models.

It goes by name: models of read-only stores can be set, and a model that is replaced keeps what was set. So
does one that is not served now because its store is away; `understudyctl remove` forgets it.
"""

import asyncio
import logging
from pathlib import Path
from typing import Annotated

import msgspec

from understudyd.shell.small_file import replace_file
from understudyd.shell.threads import in_daemon_thread

log = logging.getLogger(__name__)

NAME = "settings.json"


class ModelSetting(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One model's. `max_batch` images at most are made by one run for several requests; 1: none shares."""

    max_batch: Annotated[int, msgspec.Meta(ge=1)] = 1


_DEFAULT = ModelSetting()
_decoder = msgspec.json.Decoder(dict[str, ModelSetting])


class ModelSettings:
    """Reads and writes settings.json in `folder`; without one, nothing outlives the daemon.

    Only the event loop calls this; files are for threads.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._path = None if folder is None else folder / NAME
        self._of: dict[str, ModelSetting] = {}
        self._lock = asyncio.Lock()

    async def read(self) -> None:
        """Know what the file says; before any model is served. A damaged one is ignored with a warning."""
        if self._path is None:
            return
        try:
            self._of = _decoder.decode(await in_daemon_thread(self._path.read_bytes))
        except FileNotFoundError:
            pass
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            log.warning("%s is ignored, no model has settings of its own: %s", self._path, error)

    def of(self, name: str) -> ModelSetting:
        """What is set for a model; the defaults where nothing is."""
        return self._of.get(name, _DEFAULT)

    async def put(self, name: str, setting: ModelSetting) -> None:
        """Returns when it is on the disk. Raises `OSError`, and then nothing has changed."""
        async with self._lock:
            changed = {**self._of, name: setting}
            if setting == _DEFAULT:
                del changed[name]
            if changed != self._of:
                if self._path is not None:
                    await in_daemon_thread(replace_file, self._path, msgspec.json.encode(changed))
                self._of = changed

    async def forget(self, name: str) -> None:
        """The model is removed."""
        try:
            await self.put(name, _DEFAULT)
        except OSError as error:
            log.warning("%s still has settings of %s, which is removed: %s", self._path, name, error.strerror)

"""A new configuration for a running daemon: read and checked whole, then put into force as far as possible.

`LIVE` names what can be; the rest shapes memory, processes and doors that stand, and takes a restart.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec

from understudyd.config import Config
from understudyd.shell.threads import in_daemon_thread

log = logging.getLogger(__name__)

LIVE = {
    "log": {"level"},
    "policy": {"lookahead", "prefetch", "pause_priority"},
    "queue": {"max_waiting"},
    "server": {
        "max_pixels",
        "max_steps",
        "max_images",
        "max_prompt_chars",
        "max_connections",
        "max_open_per_client",
        "max_open_per_user",
        "max_open_pixels",
        "max_open_steps",
        "max_input_pixels",
        "max_input_bytes",
        "max_open_input_bytes",
        "max_all_input_bytes",
        "outbox_bytes",
        "answer_ttl_s",
        "client_timeout_s",
        "drain_s",
    },
    "stage": {"stalled_after_s"},
}


@dataclass(frozen=True, slots=True)
class Reloaded:
    """Keys, "section.key", that are in force now, and those whose change waits for a restart."""

    applied: tuple[str, ...]
    needs_restart: tuple[str, ...]

    def describe(self) -> str:
        """For people."""
        applied = f"in force now: {', '.join(self.applied)}" if self.applied else "nothing to apply"
        return applied + (f"; after a restart: {', '.join(self.needs_restart)}" if self.needs_restart else "")


class Reload:
    """`read` reads the configuration that the daemon was started with; `apply` puts one into force."""

    def __init__(self, config: Config, read: Callable[[], Config], apply: Callable[[Config], None]) -> None:
        self.config = config
        self._read = read
        self._apply = apply
        self._lock = asyncio.Lock()

    async def __call__(self) -> Reloaded:
        """Raises `ConfigError` for one that cannot be used; nothing has changed then."""
        async with self._lock:
            wanted: Config = await in_daemon_thread(self._read)
            changed = list(_differences(self.config, wanted))
            live = [(section, key) for section, key in changed if key in LIVE.get(section, ())]
            config = self.config
            for section, key in live:
                table = getattr(config, section)
                value = getattr(getattr(wanted, section), key)
                table = msgspec.structs.replace(table, **{key: value})
                config = msgspec.structs.replace(config, **{section: table})
            if live:
                self._apply(config)
            self.config = config
        reloaded = Reloaded(_names(live), _names([pair for pair in changed if pair not in live]))
        log.info("the configuration was read again; %s", reloaded.describe())
        return reloaded


def _differences(old: Config, new: Config) -> Iterator[tuple[str, str]]:
    for section in old.__struct_fields__:
        before, after = getattr(old, section), getattr(new, section)
        for key in before.__struct_fields__:
            if getattr(before, key) != getattr(after, key):
                yield section, key


def _names(pairs: list[tuple[str, str]]) -> tuple[str, ...]:
    return tuple(f"{section}.{key}" for section, key in pairs)

"""A daemon at rest: have it forget everything, wait until nothing is under way, and see what is missing."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from benchmarks.kit import DaemonProcess, say
from understudy import admin

SETTLED_WITHIN_S = 30.0
_POLL_S = 0.01


def leaked(before: Mapping[str, Any], after: Mapping[str, Any]) -> int:
    """Arena bytes that were free and are not, and host pool bytes that are neither free nor a copy at rest.

    `before` and `after` are status documents of a daemon that has nothing to do and nothing resident.
    """
    lost_bytes = before["arena"]["free_bytes"] - after["arena"]["free_bytes"]
    if (pool := after.get("host_pool")) is not None:
        lost_bytes += pool["size_bytes"] - pool["free_bytes"] - pool["ready_bytes"]
    return int(lost_bytes)


def evict_all(daemon: DaemonProcess) -> None:
    """Models, and models with adapters. What would be prefetched again must not be: turn that off before."""
    for model in [*daemon.ask(admin.Loras())["combinations"], *daemon.ask(admin.Models())]:
        poll(daemon, partial(_is_evicted, daemon, model["name"]), "nothing uses the model")


def _is_evicted(daemon: DaemonProcess, name: str) -> bool:
    try:
        daemon.ask(admin.Evict(name=name))
    except admin.AdminError as error:
        if error.code != "in_use":
            raise
        return False
    return True


def settled(daemon: DaemonProcess) -> dict[str, Any]:
    """The status once no load is under way and nothing is quarantined, or as it is when patience ends."""
    status: dict[str, Any] = {}

    def is_settled() -> bool:
        status.update(daemon.ask(admin.Status()))
        tiers = [status["arena"], status.get("host_pool") or {}]
        busy = sum(tier.get(f"{what}_bytes", 0) for tier in tiers for what in ("filling", "quarantined"))
        return not busy and all(row["state"] == "idle" for row in status["loaders"])

    try:
        poll(daemon, is_settled, "it has settled")
    except TimeoutError as error:
        say(f"  {error}: {status}")  # the figures will tell
    return status


def poll(daemon: DaemonProcess, condition: Callable[[], Any], what: str) -> Any:
    """What `condition` finds. Raises `TimeoutError`, and `DaemonFailed` when the daemon is gone."""
    deadline_s = time.monotonic() + SETTLED_WITHIN_S
    while time.monotonic() < deadline_s:
        if found := condition():
            return found
        daemon.check()
        time.sleep(_POLL_S)
    raise TimeoutError(f"not within {SETTLED_WITHIN_S:g} s: {what}")

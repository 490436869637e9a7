"""What the admin commands about adapters do; see `commands.py`."""

from collections.abc import Callable
from typing import Any

from understudy import admin as proto
from understudy.admin import AdminError
from understudyd.names import unknown
from understudyd.shell.admin import Notify
from understudyd.shell.ingesting import IngestFailed
from understudyd.shell.keeper import Keeper
from understudyd.shell.lora_views import LoraViews
from understudyd.shell.scanning import add_loras
from understudyd.store.errors import StoreError, StoreErrorCode


class LoraCommands:
    """Carries them out; each method returns a plain JSON document. Raises `AdminError`."""

    def __init__(self, keeper: Keeper, views: LoraViews, clock: Callable[[], float]) -> None:
        self._keeper = keeper
        self._adapters = keeper.adapters
        self._views = views
        self._clock = clock

    async def add(self, command: proto.AddLora, notify: Notify) -> dict[str, Any]:
        """Ingest and serve; what became of each file is in the results."""
        try:
            return {"results": await add_loras(self._keeper, command, notify)}
        except IngestFailed as error:
            raise AdminError(error.code, str(error)) from error

    def listing(self) -> dict[str, Any]:
        """All adapters and combinations."""
        return self._views.listing(self._clock())

    def show(self, name: str) -> dict[str, Any] | None:
        """An adapter or a combination that the core knows; None for a name that is neither's."""
        if name in self._adapters.book.found:
            return self._views.adapter(name, self._clock())
        known = self._adapters.name_of(name)
        return self._views.derived(known, self._clock()) if known in self._adapters.derived else None

    async def remove(self, name: str) -> dict[str, Any]:
        """Stop serving an adapter and delete it once nobody uses it."""
        if name not in self._adapters.book.found:
            names = self._adapters.book.found
            listing = "`understudyctl loras` lists them" if names else "there are none"
            raise AdminError("unknown_adapter", unknown("adapter", name, names, listing))
        try:
            freed_bytes = await self._adapters.remove(name)
        except StoreError as error:
            if error.code is StoreErrorCode.READ_ONLY:
                raise AdminError(error.code.value, error.message) from error
            raise AdminError(error.code.value, f"{name!r} is served no more, but: {error}") from error
        document = {"name": name, "freed_bytes": freed_bytes}
        return document if freed_bytes else document | {"kept": "another adapter or daemon has its weights"}

"""One overlay being made, beside whatever computes: it can be stopped between two steps."""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

from understudyd.core.events import FoldCancelled, FoldFailed, FoldFinished
from understudyd.core.types import ErrorCode
from understudyd.stage.device import Device
from understudyd.stage.errors import StageError
from understudyd.stage.fold_crew import FoldCrew
from understudyd.stage.folding import ArenaFoldMemory, NotFinite, fold_steps
from understudyd.stage.views import WeightArena
from understudyd.store.adapters.overlays import FoldedWeight, OverlayPlan

_log = logging.getLogger(__name__)

_MESSAGE_CHARS = 300


class FoldJob:
    """A fold that was asked for. `cancel` may come from any thread, `run` is called once."""

    def __init__(
        self,
        overlay: str,
        generation: int,
        offset: int,
        plan: OverlayPlan,
        sources: Sequence[tuple[str, int]],
    ) -> None:
        """`offset` and those of the `sources`, the base's blob and then the adapters', are the arena's."""
        self.overlay = overlay
        self.generation = generation
        self.plan = plan
        self._offset = offset
        self._sources = tuple(sources)
        self._cancelled = threading.Event()

    @property
    def label(self) -> str:
        """What people know it by: "pixel-art@0.8 unet"."""
        adapters = "+".join(f"{applied.record.name}@{applied.scale!r}" for applied in self.plan.adapters)
        return f"{adapters} {self.plan.component}"

    def cancel(self) -> None:
        """Stop before the next step."""
        self._cancelled.set()

    def run(
        self, arena: WeightArena, device: Device, breathe: Callable[[], None], crew: FoldCrew
    ) -> FoldFinished | FoldFailed | FoldCancelled:
        """Fold, with the crew's help, calling `breathe` between steps of the calling thread.

        Nothing writes to the extent after this has returned.
        """
        try:
            is_whole = self._fold(arena, device, breathe, crew)
        except NotFinite as error:
            return self._failed(error.code, str(error))
        except Exception as error:  # noqa: BLE001  a task's boundary: the stage goes on
            _log.exception("folding overlay %s failed", self.overlay)
            code = error.code if isinstance(error, StageError) else ErrorCode.INTERNAL
            code = ErrorCode.OUT_OF_MEMORY if device.is_out_of_memory(error) else code
            return self._failed(code, f"{type(error).__name__}: {error}")
        outcome = FoldFinished if is_whole else FoldCancelled
        return outcome(self.overlay, self.generation)

    def _fold(self, arena: WeightArena, device: Device, breathe: Callable[[], None], crew: FoldCrew) -> bool:
        memory = self._memory(arena)

        def fold(weights: Iterable[FoldedWeight]) -> Iterator[int]:
            return fold_steps(self.plan, memory, crew.products, weights)

        try:
            with crew.sharing(self.plan.weights, fold) as shared:
                for _ in fold(shared):
                    if self._cancelled.is_set():
                        return False
                    breathe()
            return not self._cancelled.is_set()
        finally:
            device.wait(device.mark_last_use())

    def _memory(self, arena: WeightArena) -> ArenaFoldMemory:
        """Adapters are found by their blobs: two of them may have the same one."""
        (_, base_offset), *_ = self._sources
        offsets = dict(self._sources)
        blobs = [applied.record.blob.sha256 for applied in self.plan.adapters]
        if missing := [blob[:12] for blob in blobs if blob not in offsets]:
            raise StageError(f"a fold was asked for without the blob {missing[0]} of its adapters")
        return ArenaFoldMemory(arena, base_offset, [offsets[blob] for blob in blobs], self._offset)

    def _failed(self, code: ErrorCode, message: str) -> FoldFailed:
        return FoldFailed(self.overlay, self.generation, code, message[:_MESSAGE_CHARS])

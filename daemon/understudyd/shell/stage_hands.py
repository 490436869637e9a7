"""Has the stage do what the core decides; while torch is being imported, its work is kept for it."""

from collections.abc import Callable, Sequence
from typing import assert_never

from understudy.wire import Generate
from understudyd.core import actions as ac
from understudyd.core import events as ev
from understudyd.shell.derived import DerivedModels
from understudyd.shell.ports import StageDoor

StageAction = (
    ac.BuildViews
    | ac.DropViews
    | ac.MoveExtent
    | ac.Fold
    | ac.CancelFold
    | ac.PrepareModel
    | ac.ForgetModel
    | ac.PutOnDeck
    | ac.CancelRun
)

Asked = tuple[Generate, Sequence[bytes]]
"""A request and its input images."""


class StageHands:
    """`asked` finds a request that has no answer yet by its id. Only the event loop's thread uses this.

    Adapters are folded and never bound: they have no views, and the core hears at once that these are built.
    """

    def __init__(
        self, derived: DerivedModels, asked: Callable[[str], Asked], emit: Callable[[ev.Event], None]
    ) -> None:
        self.stage: StageDoor | None = None
        self._derived = derived
        self._asked = asked
        self._emit = emit
        self._kept: list[Callable[[StageDoor], None]] = []

    def attach(self, stage: StageDoor) -> None:
        """The stage is built: have it do what it was to do meanwhile."""
        self.stage = stage
        kept, self._kept = self._kept, []
        for order in kept:
            order(stage)

    def perform(self, action: StageAction) -> None:
        """Now, or as soon as there is a stage."""
        if isinstance(action, ac.BuildViews) and self._derived.is_adapter(action.blob):
            self._emit(ev.ViewsBuilt(action.blob, action.generation))
            return
        order = self._order(action)
        if self.stage is None:
            self._kept.append(order)
        else:
            order(self.stage)

    def _order(self, action: StageAction) -> Callable[[StageDoor], None]:
        """What to do, with all it takes: who asked may be gone when it is done."""
        match action:
            case ac.BuildViews(blob=key, offset=offset, generation=generation):
                return lambda stage: stage.build_views(key, offset, generation)
            case ac.DropViews(blob=key, generation=generation):
                return lambda stage: stage.drop_views(key, generation)
            case ac.MoveExtent(blob=key, offset=offset, to_offset=to, size_bytes=size, generation=generation):
                return lambda stage: stage.move_extent(key, offset, to, size, generation)
            case ac.Fold(overlay=key, offset=offset, generation=generation, sources=sources):
                plan = self._derived.plan(key)
                return lambda stage: stage.fold(key, generation, offset, plan, sources)
            case ac.CancelFold(overlay=key, generation=generation):
                return lambda stage: stage.cancel_fold(key, generation)
            case ac.PrepareModel(key=key):
                return self._preparation(key)
            case ac.ForgetModel(key=key):
                return lambda stage: stage.forget_model(key)
            case ac.PutOnDeck(request_id=request_id, model=model):
                request, payload = self._asked(request_id)
                others = {other: self._asked(other)[0] for other in action.companions}
                return lambda stage: stage.put_on_deck(request_id, model, request, payload, others)
            case ac.CancelRun(request_id=request_id, code=code):
                return lambda stage: stage.cancel_run(request_id, code)
            case _:
                assert_never(action)

    def _preparation(self, key: str) -> Callable[[StageDoor], None]:
        derived = self._derived.editions.get(key)
        if derived is None:
            return lambda stage: stage.prepare_model(key)
        return lambda stage: stage.prepare_derived(key, derived.base_key, derived.overlays)

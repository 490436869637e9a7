"""The seams between the event loop's parts, as protocols: who calls whom, with what.

Only the event loop's thread calls these, except where a docstring says otherwise.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from understudy.wire import Generate, ImageInfo, ModelEntry, Reply, Timings
from understudyd.core.actions import StartLoad
from understudyd.core.events import Event
from understudyd.core.types import ErrorCode
from understudyd.store.adapters.overlays import OverlaidComponent, OverlayPlan
from understudyd.store.records import BlobRecord

Emit = Callable[[Event], None]
"""Give the core an event; callable from any thread."""


class RequestSink(Protocol):
    """What the front end hands requests to. The front end has checked sizes, limits and duplicates."""

    def submit(self, client: str, request: Generate, payload: Sequence[bytes] = ()) -> None:
        """A new request of this client, with its input images; the answer comes through `ReplySink.send`."""

    def cancel(self, client: str, request_id: str) -> None:
        """The client takes its request back; unknown ids are ignored."""

    def client_gone(self, client: str) -> None:
        """The client cannot be reached or has expired."""

    def together(self) -> AbstractContextManager[None]:
        """What it is told meanwhile came at once: what follows from it may wait until this ends."""

    def models(self) -> list[ModelEntry]:
        """What may be asked for."""


class ReplySink(Protocol):
    """What the runtime answers through: the front end."""

    def send(self, client: str, reply: Reply, payload: Sequence[bytes] = ()) -> None:
        """Queue a reply for this client. Never blocks; a client that is gone is ignored."""


class LoadRunner(Protocol):
    """What performs loads: the loader pool."""

    def start_load(self, order: StartLoad, label: str, path: Path, blob: BlobRecord) -> None:
        """Have the loader `order.loader_id` fill the extent; `label` names the load in the timeline."""

    def pause_loads(self, is_paused: bool) -> None:
        """Have every loader rest between two pieces, or go on; those that come later too."""

    def cancel_load(self, load_id: int) -> None:
        """Stop it between two chunks."""


class RunResult(Protocol):
    """What a finished run left: encoded images and how long everything took."""

    @property
    def images(self) -> Sequence[bytes]:
        """One encoded image each."""

    @property
    def infos(self) -> Sequence[ImageInfo]:
        """What each of them is."""

    @property
    def timings(self) -> Timings:
        """Durations in seconds, as the client sees them."""

    @property
    def switched(self) -> bool:
        """Some component's weights had to be bound for it."""


class StageDoor(Protocol):
    """What the runtime has the stage do. Nothing here blocks; core events tell how it went."""

    def prepare_model(self, name: str) -> None:
        """Build the model's small parts."""

    def prepare_derived(self, key: str, base_key: str, overlays: Mapping[str, OverlaidComponent]) -> None:
        """Build a derived model's: its base's, with overlays over components. Ends as `prepare_model`."""

    def forget_model(self, name: str) -> None:
        """Drop them."""

    def build_views(self, blob: str, offset: int, generation: int) -> None:
        """Prebuild the blob's tensors."""

    def drop_views(self, blob: str, generation: int) -> None:
        """Forget them, before this returns."""

    def fold(
        self,
        overlay: str,
        generation: int,
        offset: int,
        plan: OverlayPlan,
        sources: Sequence[tuple[str, int]],
    ) -> None:
        """Make an overlay at `offset` out of resident blobs; `core.actions.Fold` names its events."""

    def cancel_fold(self, overlay: str, generation: int) -> None:
        """Stop it between two steps; too late or unknown is no error."""

    def move_extent(self, blob: str, offset: int, to_offset: int, size_bytes: int, generation: int) -> None:
        """Move a blob without views to a lower place of the arena, which may overlap its old one."""

    def put_on_deck(
        self,
        request_id: str,
        model: str,
        request: Generate,
        payload: Sequence[bytes],
        companions: Mapping[str, Generate],
    ) -> None:
        """Run the request, with its input images, when the stage is free, and its `companions`, by id."""

    def cancel_run(self, request_id: str, code: ErrorCode) -> None:
        """End it at its next checkpoint."""

    def take_result(self, request_id: str, received_at_s: float) -> RunResult:
        """The finished run's result, once; its timings count from `received_at_s`."""

    def tasks(self, name: str) -> list[str]:
        """What a prepared model can be asked for by name beside its own pipeline."""

    def strays(self) -> list[str]:
        """Tensors of bound components that lie outside the arena."""

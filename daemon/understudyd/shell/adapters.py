"""Fits the loader pool and the stage to the runtime's ports. Records become arguments here only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from understudy.wire import Generate, ImageInfo, Timings
from understudyd.core.actions import StartLoad
from understudyd.shell.loading import LoadTask
from understudyd.shell.supervisor import LoaderPool
from understudyd.store.adapters.overlays import OverlaidComponent, OverlayPlan
from understudyd.store.records import BlobRecord

if TYPE_CHECKING:
    from understudyd.stage.run import RunParams, RunTimings
    from understudyd.stage.stage import Stage


class PoolAdapter:
    """`LoadRunner` over the loader pool."""

    def __init__(self, pool: LoaderPool) -> None:
        self._pool = pool

    def start_load(self, order: StartLoad, label: str, path: Path, blob: BlobRecord) -> None:
        """See `LoadRunner`."""
        task = LoadTask(
            load_id=order.load_id,
            name=label,
            path=str(path),
            file_offset=blob.data_start_bytes,
            size_bytes=order.size_bytes,
            arena_offset=order.offset,
            pool_offset=order.pool_offset,
            from_pool=order.from_pool,
            must_verify=order.must_verify,
            checksum_chunk_bytes=blob.chunk_bytes,
            xxh3=blob.xxh3,
        )
        self._pool.start_load(order.loader_id, task)

    def pause_loads(self, is_paused: bool) -> None:
        """See `LoadRunner`."""
        self._pool.pause(is_paused)

    def cancel_load(self, load_id: int) -> None:
        """See `LoadRunner`."""
        self._pool.cancel_load(load_id)


@dataclass(frozen=True, slots=True)
class Answer:
    """`RunResult` of the ports."""

    images: Sequence[bytes]
    infos: Sequence[ImageInfo]
    timings: Timings
    switched: bool


class StageAdapter:
    """`StageDoor` over the stage. This module imports no torch: the stage is given."""

    def __init__(self, stage: "Stage") -> None:
        self._stage = stage
        self.prepare_model = stage.prepare_model
        self.forget_model = stage.forget_model
        self.build_views = stage.build_views
        self.drop_views = stage.drop_views
        self.move_extent = stage.move_extent
        self.cancel_run = stage.cancel_run
        self.strays = stage.strays
        self.tasks = stage.tasks
        self.compile_report = stage.compile_report
        self.wait_compiled = stage.wait_compiled
        self.close = stage.close

    def prepare_derived(self, key: str, base_key: str, overlays: Mapping[str, OverlaidComponent]) -> None:
        """See `StageDoor`."""
        self._stage.prepare_derived(key, base_key, overlays)

    def fold(
        self,
        overlay: str,
        generation: int,
        offset: int,
        plan: OverlayPlan,
        sources: Sequence[tuple[str, int]],
    ) -> None:
        """See `StageDoor`."""
        self._stage.fold(overlay, generation, offset, plan, sources)

    def cancel_fold(self, overlay: str, generation: int) -> None:
        """See `StageDoor`."""
        self._stage.cancel_fold(overlay, generation)

    def put_on_deck(
        self,
        request_id: str,
        model: str,
        request: Generate,
        payload: Sequence[bytes],
        companions: Mapping[str, Generate],
    ) -> None:
        """See `StageDoor`."""
        others = {other: run_params(theirs, ()) for other, theirs in companions.items()}
        self._stage.put_on_deck(request_id, model, run_params(request, payload), others)

    def take_result(self, request_id: str, received_at_s: float) -> Answer:
        """See `StageDoor`."""
        result = self._stage.take_result(request_id)
        timings = timings_since(received_at_s, result.timings)
        return Answer(result.images, result.infos, timings, switched=bool(result.components_bound))


def run_params(request: Generate, payload: Sequence[bytes]) -> "RunParams":
    """What a client asked for, as the stage takes it."""
    from understudyd.stage.run import RunParams  # imported by whoever made the stage

    return RunParams(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        seed=request.seed,
        width=request.width,
        height=request.height,
        steps=request.steps,
        guidance=request.guidance,
        images=request.images,
        task=request.task,
        scheduler=request.scheduler,
        options=request.options,
        inputs=tuple(zip(request.inputs, payload, strict=True)),
        format=request.format,
        quality=request.quality,
    )


def timings_since(received_at_s: float, moments: "RunTimings") -> Timings:
    """Moments on the clock as the durations that a client sees; the first four add up to the total, exactly.

    Whatever happened between two moments is in the one duration between them: waiting behind others and for
    loads in `queued_s`, second tries and the other requests of a shared run in `run_s`.

    The gap counts from when the stage was free *and* this request was there: a load that was waited for is
    part of it, which the stage alone could not tell.
    """
    waiting_since_s = max(received_at_s, moments.previous_ended_at_s or received_at_s)
    queued_s = moments.free_at_s - received_at_s
    switch_s = moments.first_op_at_s - moments.free_at_s
    run_s = moments.run_ended_at_s - moments.first_op_at_s
    encode_s = moments.encoded_at_s - moments.run_ended_at_s
    return Timings(
        queued_s=queued_s,
        switch_s=switch_s,
        run_s=run_s,
        encode_s=encode_s,
        total_s=queued_s + switch_s + run_s + encode_s,  # not a difference, which rounds in another way
        bind_s=moments.bind_s,
        gap_s=moments.first_op_at_s - waiting_since_s,
    )

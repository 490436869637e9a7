"""Requests on their way over the stage: what was asked, what has happened so far, what came out."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from understudy.trace import CANCELLED, FAILED, STAGE, Span
from understudy.wire import ImageInfo, InputInfo
from understudyd.core.events import RunEnded
from understudyd.core.types import ErrorCode, Outcome
from understudyd.stage.baton import Turn
from understudyd.stage.errors import RunCancelled
from understudyd.stage.pictures import Made

_STEPS_SHOWN = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class RunParams:
    """What the client asked for, as `understudy.wire.Generate` defines it.

    None means the pipeline's own default; sizes are pixels. `inputs` pairs each description with its bytes.
    """

    prompt: str = ""
    negative_prompt: str | None = None
    seed: int
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    images: int = 1
    task: str | None = None
    scheduler: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[tuple[InputInfo, bytes], ...] = ()
    format: str = "png"
    quality: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTimings:
    """Moments on the monotonic clock, in the order they come.

    `deck_at_s` put on deck; `free_at_s` the stage was free for it; `first_op_at_s` its first stage operation;
    `run_ended_at_s` the end of its last; `encoded_at_s` its images are bytes. `bind_s` is a duration.
    `gap_s` is the visible switch, from the previous run's last stage operation to this one's first;
    None when the stage was idle before this request was on deck. `previous_ended_at_s` is the end of the run
    before, None for the first.
    """

    deck_at_s: float
    free_at_s: float
    first_op_at_s: float
    run_ended_at_s: float
    encoded_at_s: float
    bind_s: float
    gap_s: float | None
    previous_ended_at_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What a finished run made for one request.

    `components_bound` names the components whose weights had to be switched; of several requests in one run
    the first has them.
    """

    images: tuple[bytes, ...]
    infos: tuple[ImageInfo, ...]
    timings: RunTimings
    components_bound: tuple[str, ...]


class Member:
    """One request of a run. In the end it has `made` something, or `failed` so, or was cancelled.

    `has_ended`: the core has been told already, while the run goes on for others.
    """

    def __init__(self, request_id: str, params: RunParams) -> None:
        self.request_id = request_id
        self.params = params
        self.cancel_code: ErrorCode | None = None
        self.has_ended = False
        self.made: Made | None = None
        self.failed: tuple[ErrorCode, str] | None = None
        self.error: Exception | None = None

    @property
    def is_open(self) -> bool:
        """Nothing has become of it yet."""
        return not self.has_ended and self.made is None and self.failed is None

    def outcome(self) -> RunEnded:
        """What became of it."""
        if self.made is not None:
            return RunEnded(self.request_id, Outcome.FINISHED)
        if self.failed is not None:
            return RunEnded(self.request_id, Outcome.FAILED, *self.failed)
        return RunEnded(self.request_id, Outcome.CANCELLED, self.cancel_code, "cancelled")


class Run:
    """The mutable side, owned by one worker thread; `cancel` comes from another.

    Its `members` are on deck together. The present call of the pipeline is for those `playing`: for all, or
    for one after the other.
    """

    def __init__(self, model: str, members: Sequence[Member], turn: Turn, deck_at_s: float) -> None:
        self.model = model
        self.members = tuple(members)
        self.playing = self.members
        self.turn = turn
        self.is_on_stage = False
        self.steps_done = 0
        self.components_bound: tuple[str, ...] = ()
        self.deck_at_s = deck_at_s
        self.previous_ended_at_s: float | None = None
        self.first_op_at_s = 0.0
        self.ended_at_s = 0.0
        self.bind_s = 0.0
        self._steps_s: list[float] = []

    @property
    def params(self) -> RunParams:
        """What is being played; of several requests the first one's."""
        return self.playing[0].params

    @property
    def label(self) -> str:
        """Whom the present call is for, in messages."""
        return ", ".join(member.request_id for member in self.playing)

    def cancel(self, request_id: str, code: ErrorCode) -> None:
        """End the request at its next checkpoint. Any thread; never blocks."""
        for member in self.members:
            if member.request_id == request_id and member.cancel_code is None:
                member.cancel_code = code
        self.turn.wake()

    def check_cancelled(self) -> None:
        """A checkpoint. Raises `RunCancelled` when nobody wants any more what is being played."""
        if all(member.cancel_code is not None for member in self.playing):
            raise RunCancelled

    def note_step(self, now_s: float) -> None:
        """A step has ended, for the timeline; of very many the first ones are enough."""
        if len(self._steps_s) < _STEPS_SHOWN:
            self._steps_s.append(now_s)

    def span(self) -> Span:
        """A run that has ended, for the timeline: one entry for all its steps and requests."""
        names = ", ".join(member.request_id for member in self.members)
        outcome = ""
        if not any(member.made is not None for member in self.members):
            outcome = FAILED if any(member.failed is not None for member in self.members) else CANCELLED
        return Span(
            STAGE,
            self.model,
            self.first_op_at_s,
            self.ended_at_s,
            outcome=outcome,
            request=names,
            steps_s=tuple(self._steps_s),
        )

    def timings(self, encoded_at_s: float) -> RunTimings:
        """The moments of a finished run."""
        waited_for = self.previous_ended_at_s
        waited = waited_for is not None and waited_for > self.deck_at_s
        return RunTimings(
            deck_at_s=self.deck_at_s,
            free_at_s=waited_for if waited and waited_for is not None else self.deck_at_s,
            first_op_at_s=self.first_op_at_s,
            run_ended_at_s=self.ended_at_s,
            encoded_at_s=encoded_at_s,
            bind_s=self.bind_s,
            gap_s=self.first_op_at_s - waited_for if waited and waited_for is not None else None,
            previous_ended_at_s=waited_for,
        )


def watch_steps(scheduler: Any, before: Callable[[], None], after: Callable[[int], None]) -> None:
    """Call `before()` and `after(total_steps)` around the scheduler's steps.

    On the instance, with the signature kept: pipelines inspect it. `unwatch_steps` ends it.
    """
    name = _step_name(scheduler)
    step = getattr(scheduler, name)

    @functools.wraps(step)
    def watched(*args: Any, **kwargs: Any) -> Any:
        before()
        result = step(*args, **kwargs)
        after(_total_steps(scheduler))
        return result

    setattr(scheduler, name, watched)


def unwatch_steps(scheduler: Any) -> None:
    """Break the reference cycle, which would keep the last latents until the next garbage collection."""
    vars(scheduler).pop(_step_name(scheduler), None)


def _step_name(scheduler: Any) -> str:
    """Predictor and corrector schedulers have no `step`; each prediction is one."""
    return "step" if hasattr(scheduler, "step") else "step_pred"


def _total_steps(scheduler: Any) -> int:
    """How many steps there will be. Image to image begins in the middle of the schedule."""
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None:
        return 0
    return len(timesteps) - (getattr(scheduler, "begin_index", None) or 0)

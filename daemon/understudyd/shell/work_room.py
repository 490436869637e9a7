"""How much work one client may have open: pixels to be made and denoising steps to be taken. Pure.

Requests are bounded one by one; this bounds what many of them come to. Both are summed over all images of a
request, and over all frames where it asks for video by the usual name.
"""

from collections import defaultdict
from dataclasses import dataclass

from understudy.wire import Generate
from understudyd.recorded import USUAL_STEPS

USUAL_PIXELS = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Work:
    """Of one request, or of several."""

    pixels: int = 0
    steps: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.pixels + other.pixels, self.steps + other.steps)

    def __sub__(self, other: "Work") -> "Work":
        return Work(self.pixels - other.pixels, self.steps - other.steps)


def work_asked(request: Generate) -> Work:
    """What is not named counts as usual; so does a width or height without the other."""
    size = USUAL_PIXELS
    if request.width is not None and request.height is not None:
        size = request.width * request.height
    frames = request.options.get("num_frames")
    pictures = request.images * (frames if isinstance(frames, int) and frames > 1 else 1)
    steps = USUAL_STEPS if request.steps is None else request.steps
    return Work(size * pictures, steps * request.images)


class WorkRoom:
    """Books by client and request."""

    def __init__(self, most: Work) -> None:
        self.most = most
        self._held: defaultdict[str, dict[str, Work]] = defaultdict(dict)
        self._sums: defaultdict[str, Work] = defaultdict(Work)

    def take(self, client: str, request_id: str, work: Work) -> str | None:
        """Book a request's work; or book nothing and say why it must wait."""
        total = self._sums.get(client, Work()) + work
        if message := exceeded(total, self.most):
            return f"{message} in this client's open requests; wait for answers"
        self._held[client][request_id] = work
        self._sums[client] = total
        return None

    def give_back(self, client: str, request_id: str) -> None:
        """The request was answered."""
        held = self._held.get(client, {})
        if (work := held.pop(request_id, None)) is not None:
            self._sums[client] -= work
        if not held:
            self.forget(client)

    def forget(self, client: str) -> None:
        """The client is gone, and its requests with it."""
        self._held.pop(client, None)
        self._sums.pop(client, None)


def exceeded(work: Work, most: Work) -> str | None:
    """Which limit it breaks, if any."""
    if work.pixels > most.pixels:
        return f"{work.pixels} pixels are more than the limit of {most.pixels}"
    if work.steps > most.steps:
        return f"{work.steps} steps are more than the limit of {most.steps}"
    return None

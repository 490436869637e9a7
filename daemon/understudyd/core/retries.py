"""When a load that went wrong is tried again, and when a blob is given up."""

from collections.abc import Iterator

from understudyd.core.entities import Blob, Model
from understudyd.core.states import BlobState
from understudyd.core.types import ErrorCode

MAX_ATTEMPTS = 3
MAX_CORRUPT_READS = 2
RETRY_AFTER_S = (0.1, 0.4)
REST_S, MAX_REST_S = 30.0, 3600.0


class Retries:
    """Sets `Blob.retry_at_s`, before which nobody loads the blob.

    Wrong bytes get one second chance (a bad read), an overlay that cannot be made none; then the blob is
    DAMAGED until a model that has it is added anew. Anything else is tried `MAX_ATTEMPTS` times with growing
    pauses; then it rests, longer each time, so that pins and prefetching do not wear the loaders out. Whoever
    asks for the model ends the rest.
    """

    def __init__(self) -> None:
        self._pausing: set[Blob] = set()

    @property
    def pauses(self) -> int:
        """How many blobs wait for another attempt."""
        return len(self._pausing)

    def failed(self, blob: Blob, code: ErrorCode, message: str, now_s: float) -> bool:
        """Count a load, or a fold, that did not end well; True when the blob is given up for now."""
        blob.failures += 1
        blob.corrupt_reads += code is ErrorCode.MODEL_CORRUPT
        if code is ErrorCode.BAD_REQUEST or blob.corrupt_reads >= MAX_CORRUPT_READS:
            blob.life.to(BlobState.DAMAGED, now_s, message)
            self.start_anew(blob)
            return True
        is_given_up = blob.failures >= MAX_ATTEMPTS
        if is_given_up:
            pause_s = min(REST_S * 2.0**blob.give_ups, MAX_REST_S)
            blob.failures, blob.corrupt_reads, blob.give_ups = 0, 0, min(blob.give_ups + 1, 10)
        else:
            pause_s = RETRY_AFTER_S[blob.failures - 1]
        blob.retry_at_s = now_s + pause_s
        self._pausing.add(blob)
        return is_given_up

    def start_anew(self, blob: Blob) -> None:
        """What was is forgiven."""
        blob.failures = blob.corrupt_reads = blob.give_ups = 0
        blob.retry_at_s = 0.0

    def end_rest(self, model: Model) -> None:
        """Somebody asks for the model: blobs that were given up are tried again at once."""
        for blob in model.all_blobs:
            if blob.failures == 0:
                blob.retry_at_s = 0.0

    def pass_time(self, now_s: float) -> None:
        """Forget pauses that are over."""
        if self._pausing:
            self._pausing = {blob for blob in self._pausing if blob.retry_at_s > now_s}

    def deadlines(self) -> Iterator[float]:
        """When pauses are over."""
        return (blob.retry_at_s for blob in self._pausing)

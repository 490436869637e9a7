"""What the stage can say went wrong; `code` is what the request is answered with."""

from understudyd.core.types import ErrorCode


class StageError(Exception):
    """Base of the stage's own errors."""

    code = ErrorCode.INTERNAL


class BadRequest(StageError):
    """The caller asked for what the pipeline cannot do; the message says what to change."""

    code = ErrorCode.BAD_REQUEST


class UnknownClass(StageError):
    """A record names a class that is not on the allow-list or that this installation lacks."""


class SkeletonMismatch(StageError):
    """A signature and the module built from it disagree: a tensor would stay without weights."""


class PipelineFailed(StageError):
    """An installed custom pipeline broke its contract; the message names it."""


class NotPrepared(StageError):
    """A request came for a model whose small parts are not at hand."""


class NotResident(StageError):
    """A request came on stage while one of its blobs has no views."""


class RunCancelled(BaseException):
    """Unwinds a pipeline at a checkpoint. No `Exception`: no pipeline may swallow it."""

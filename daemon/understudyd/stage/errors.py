"""What the stage can say went wrong; `code` is what the request is answered with."""

import re

from understudyd.core.types import ErrorCode
from understudyd.pipelines.installed import PipelineUnavailable

_QUOTED_PATH = re.compile(r"""(['"`])/[^'"`]*?([^/'"`]*)\1""")
_PATH = re.compile(r"""(?<![\w.:/])/(?:[^\s/'"`,;:()]+/)+([^\s/'"`,;:()]*)""")


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


def told_of_preparation(error: Exception) -> str:
    """Why a model cannot be prepared, for whoever asks for it, who may be far away: without places of ours.

    What we and the authors of custom pipelines say is said. A library's error is about files, and in the log.
    """
    kind = type(error).__name__
    if isinstance(error, StageError | PipelineUnavailable):
        return f"{kind}: {without_paths(str(error))}"
    return f"{kind}, which the daemon's log has in full; add the model again with --replace"


def without_paths(text: str) -> str:
    """The text with each absolute path reduced to its last part."""
    return _PATH.sub(r"\1", _QUOTED_PATH.sub(r"\1\2\1", text))

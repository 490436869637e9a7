"""What the two `generate_many` have in common."""

from typing import Protocol

from understudy.errors import CallerError, UnderstudyError
from understudy.results import Result


class _Done(Protocol):
    def result(self) -> Result: ...


def check_in_flight(in_flight: int) -> None:
    """Raise `CallerError` for a window that nothing fits."""
    if in_flight < 1:
        raise CallerError(f"in_flight is {in_flight}; it must be at least 1", code="bad_request")


def outcome(done: _Done, return_errors: bool) -> Result | UnderstudyError:
    """The result of a finished future, or its error: returned or raised."""
    try:
        return done.result()
    except UnderstudyError as error:
        if return_errors:
            return error
        raise

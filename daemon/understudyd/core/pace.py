"""A bound on what one event sets off, so that nobody waits long for the machine, however much it holds.

Some things take long where there is much of them: going over who is overtaken, filing anew whose place may
have changed, looking for what to evict. An event does one of them where there is much; what is left follows
at the next event, and that is due at once: between the two, the loop that drives the machine may take in a
message or hand out an answer.
"""

MUCH = 128
"""Requests or extents: from so many on they take more than some twenty microseconds to go over."""
FILING = 12
"""To file one blob anew takes as long as to go over so many."""


class Pace:
    """`has_more`: something was left for the next event, which takes that back."""

    def __init__(self, much: int) -> None:
        self.has_more = False
        self._much = much
        self._is_spent = False

    def recover(self) -> None:
        """The event has been handled."""
        self._is_spent = False

    def went_over(self, count: int) -> None:
        """So many were gone over."""
        self._is_spent |= count >= self._much

    def may_go_on(self) -> bool:
        """Something may be begun that may take long; else it is left for the next event."""
        self.has_more |= self._is_spent
        return not self._is_spent

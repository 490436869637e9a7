"""Single views of what comes next. Each gives names shares that add up to about 1; `forecast.py` mixes them.

A request brings several names at once, its model and the blobs of it, and each is predicted like a model.

Each can be copied, written down and restored (`forecast.py`). A document holds names as places in a list, and
no moments: the next life's clock is another one.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, Self

from understudyd.core.remembered import (
    ROUNDING,
    DamagedDocument,
    field,
    named,
    number,
    rows,
    significant,
)

_MOST_HALF_LIVES = 500.0
_LEAST = 1e-30
_FOLLOWERS = 16
_GROWTH = math.pow(2.0, 1.0 / 34.0)
"""Half of what counts for a model's followers are the last 34."""
_MOST_WORTH = 1e30


class Predictor(Protocol):
    """What all of them can do besides learning from a request."""

    def share(self, name: str) -> float:
        """The part of the next requests that is expected to ask for `name`, 0 to 1."""

    def inherit(self, name: str, source: str) -> None:
        """A new name for what `source` was asked for."""

    def forget(self, name: str) -> None:
        """Count on this name no more."""

    def copy(self) -> Self:
        """As it stands now, for `document` on another thread."""

    def document(self, places: Mapping[str, int]) -> dict[str, Any]:
        """What it has learned, in JSON's types; only of these names."""

    def restore(self, document: Any, names: Sequence[str], now: float) -> None:
        """Take over what a new one of the same kind is to know; the last request came at `now`.

        `names` has "" for what is not known any more. Raises `DamagedDocument`.
        """


class Popularity:
    """Counts that decay with a half-life, in requests or in seconds (LRFU: Lee et al., 2001).

    A short one sees bursts, a long one lasting popularity. In requests a quiet night forgets nothing, in
    seconds it does.

    Nothing is ever decayed: a later request counts for more instead, and only what is counted at the same
    time is compared (forward decay: Cormode, Shkapenyuk, Srivastava and Xu, ICDE 2009).
    """

    def __init__(self, half_life: float) -> None:
        self._half_life = half_life
        self._origin = 0.0  # when a request counted for 1
        self._now = 0.0
        self._total = 0.0
        self._counts: dict[str, float] = {}

    def saw(self, names: Iterable[str], now: float) -> None:
        """A request; `now` is in the unit of the half-life and never goes back."""
        self._now = now
        if now - self._origin > _MOST_HALF_LIVES * self._half_life:
            self._begin_anew()
        worth, counts = self._worth(), self._counts
        self._total += worth
        for name in names:
            counts[name] = counts.get(name, 0.0) + worth

    def share(self, name: str) -> float:
        """The name's share of the requests that still count."""
        count = self._counts.get(name)
        return 0.0 if count is None else count / self._total

    def inherit(self, name: str, source: str) -> None:
        """A new name for what `source` was asked for."""
        if source in self._counts:
            self._counts[name] = self._counts[source]

    def forget(self, name: str) -> None:
        """Count on this name no more."""
        self._counts.pop(name, None)

    def copy(self) -> "Popularity":
        """As it stands now."""
        made = Popularity(self._half_life)
        made._origin, made._now, made._total = self._origin, self._now, self._total
        made._counts = dict(self._counts)
        return made

    def document(self, places: Mapping[str, int]) -> dict[str, Any]:
        """Each name's count, in requests that had come just now."""
        worth = self._worth()
        counts = [
            [places[name], significant(count / worth)]
            for name, count in self._counts.items()
            if name in places
        ]
        return {"half_life": self._half_life, "total": significant(self._total / worth), "counts": counts}

    def restore(self, document: Any, names: Sequence[str], now: float) -> None:
        """The counts of names that are known. Raises `DamagedDocument`."""
        if field(document, "half_life") != self._half_life:
            raise DamagedDocument("other half-lives")
        self._origin = self._now = now
        self._total = total = number(field(document, "total"), "total")
        for row in rows(field(document, "counts"), "counts"):
            place, count = rows(row, "a count", 2)
            count = number(count, "a count", least=_LEAST)
            if total < 0.5 or count > total * (1.0 + ROUNDING):
                raise DamagedDocument("a count is more than all together")
            if name := named(place, names, "the name of a count"):
                self._counts[name] = count

    def _worth(self) -> float:
        """What a request counts for that comes now."""
        return math.pow(2.0, (self._now - self._origin) / self._half_life)

    def _begin_anew(self) -> None:
        """A request counts for 1 again, before numbers become too large; what was long ago is forgotten."""
        faded = math.pow(0.5, (self._now - self._origin) / self._half_life)
        self._origin = self._now
        self._total *= faded
        counts = ((name, count * faded) for name, count in self._counts.items())
        self._counts = {name: count for name, count in counts if count >= _LEAST}


class Succession:
    """Which names come right after which model: a few followers each, the recent ones first.

    Counted as `Popularity` does: the later a request, the more it counts for.
    """

    def __init__(self) -> None:
        self._last = ""
        self._worth: dict[str, float] = {}  # what the next one that follows counts for
        self._after: dict[str, dict[str, float]] = {}

    def saw(self, names: tuple[str, ...]) -> None:
        """A request; its first name stands for it."""
        last = self._last
        self._last = names[0]
        if not last:
            return
        followers = self._after.setdefault(last, {})
        worth = self._worth.get(last, 1.0)
        if worth > _MOST_WORTH:
            followers = self._after[last] = {name: count / worth for name, count in followers.items()}
            worth = 1.0
        for name in ("", *names):  # "" counts them all
            followers[name] = followers.get(name, 0.0) + worth
        if len(followers) > _FOLLOWERS * len(names):
            del followers[min(followers, key=followers.__getitem__)]
        self._worth[last] = worth * _GROWTH

    def share(self, name: str) -> float:
        """How often it came after what came last."""
        followers = self._after.get(self._last)
        return followers.get(name, 0.0) / followers[""] if followers else 0.0

    def inherit(self, name: str, source: str) -> None:
        """A new name for what `source` was asked for."""
        for followers in self._after.values():
            if source in followers:
                followers[name] = followers[source]

    def forget(self, name: str) -> None:
        """Count on this name no more."""
        self._after.pop(name, None)
        self._worth.pop(name, None)
        for followers in self._after.values():
            followers.pop(name, None)

    def copy(self) -> "Succession":
        """As it stands now."""
        made = Succession()
        made._last, made._worth = self._last, dict(self._worth)
        made._after = {model: dict(followers) for model, followers in self._after.items()}
        return made

    def document(self, places: Mapping[str, int]) -> dict[str, Any]:
        """Of each model its place, how many followed, and each follower's place and weight."""
        after = []
        for model, followers in self._after.items():
            if model in places:
                worth = self._worth[model]
                kept = [
                    [places[name], significant(count / worth)]
                    for name, count in followers.items()
                    if name in places
                ]
                after.append([places[model], significant(followers[""] / worth), kept])
        return {"last": places.get(self._last), "after": after}

    def restore(self, document: Any, names: Sequence[str], now: float) -> None:
        """Who followed whom, of those that are known. Raises `DamagedDocument`."""
        last = field(document, "last")
        self._last = "" if last is None else named(last, names, "who came last")
        for row in rows(field(document, "after"), "after"):
            place, total, kept = rows(row, "followers", 3)
            followers = {"": number(total, "followers", least=ROUNDING)}
            for follower in rows(kept, "followers"):
                name = named(rows(follower, "a follower", 2)[0], names, "a follower")
                weight = number(follower[1], "a follower", most=followers[""] * (1.0 + ROUNDING))
                if name:
                    followers[name] = weight
            if model := named(place, names, "whom others followed"):
                self._after[model], self._worth[model] = followers, 1.0

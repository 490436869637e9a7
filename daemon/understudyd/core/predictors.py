"""Single views of what comes next. Each gives names shares that add up to about 1; `forecast.py` mixes them.

A request brings several names at once, its model and the blobs of it, and each is predicted like a model.

Each can be copied, written down and restored (`forecast.py`). A document holds names as places in a list, and
ages instead of moments: the next life's clock is another one.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, Self

from understudyd.core.remembered import DIGITS, ROUNDING, DamagedDocument, field, named, number, rows

_FOLLOWERS = 16
_FOLLOWER_HALF_LIFE = 34.0


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
    """

    def __init__(self, half_life: float) -> None:
        self._half_life = half_life
        self._total = 0.0
        self._total_at = 0.0
        self._counts: dict[str, tuple[float, float]] = {}  # as it stood, and when that was

    def saw(self, names: Iterable[str], now: float) -> None:
        """A request; `now` is in the unit of the half-life and never goes back."""
        self._total = self._total * self._fade(now - self._total_at) + 1.0
        self._total_at = now
        for name in names:
            count, at = self._counts.get(name, (0.0, now))
            self._counts[name] = (count * self._fade(now - at) + 1.0, now)

    def share(self, name: str) -> float:
        """The name's share of the requests that still count."""
        known = self._counts.get(name)
        if known is None:
            return 0.0
        count, at = known
        return count * self._fade(self._total_at - at) / self._total  # both fade alike since then

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
        made._total, made._total_at, made._counts = self._total, self._total_at, dict(self._counts)
        return made

    def document(self, places: Mapping[str, int]) -> dict[str, Any]:
        """Each name's count, and how long ago it stood so."""
        counts = [
            [places[name], round(count, DIGITS), round(self._total_at - at, DIGITS)]
            for name, (count, at) in self._counts.items()
            if name in places
        ]
        return {"half_life": self._half_life, "total": round(self._total, DIGITS), "counts": counts}

    def restore(self, document: Any, names: Sequence[str], now: float) -> None:
        """The counts of names that are known. Raises `DamagedDocument`."""
        if field(document, "half_life") != self._half_life:
            raise DamagedDocument("other half-lives")
        self._total_at = now
        self._total = total = number(field(document, "total"), "total")
        for row in rows(field(document, "counts"), "counts"):
            place, count, age = rows(row, "a count", 3)
            count, age = number(count, "a count"), number(age, "the age of a count")
            if total < 0.5 or count * self._fade(age) > total + ROUNDING:
                raise DamagedDocument("a count is more than all together")
            if name := named(place, names, "the name of a count"):
                self._counts[name] = (count, now - age)

    def _fade(self, age: float) -> float:
        return math.pow(0.5, age / self._half_life)


class Succession:
    """Which names come right after which model: a few followers each, the recent ones first."""

    def __init__(self) -> None:
        self._last = ""
        self._after: dict[str, dict[str, float]] = {}

    def saw(self, names: tuple[str, ...]) -> None:
        """A request; its first name stands for it."""
        if self._last:
            followers = self._after.setdefault(self._last, {})
            fade = math.pow(0.5, 1.0 / _FOLLOWER_HALF_LIFE)
            for name in followers:
                followers[name] *= fade
            for name in ("", *names):  # "" counts them all
                followers[name] = followers.get(name, 0.0) + 1.0
            if len(followers) > _FOLLOWERS * len(names):
                del followers[min(followers, key=followers.__getitem__)]
        self._last = names[0]

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
        for followers in self._after.values():
            followers.pop(name, None)

    def copy(self) -> "Succession":
        """As it stands now."""
        made = Succession()
        made._last = self._last
        made._after = {model: dict(followers) for model, followers in self._after.items()}
        return made

    def document(self, places: Mapping[str, int]) -> dict[str, Any]:
        """Of each model its place, how many followed, and each follower's place and weight."""
        after = []
        for model, followers in self._after.items():
            if model in places:
                kept = [[places[name], round(w, DIGITS)] for name, w in followers.items() if name in places]
                after.append([places[model], round(followers[""], DIGITS), kept])
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
                weight = number(follower[1], "a follower", most=followers[""] + ROUNDING)
                if name:
                    followers[name] = weight
            if model := named(place, names, "whom others followed"):
                self._after[model] = followers

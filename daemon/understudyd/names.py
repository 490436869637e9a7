"""Names that a slip of the finger may have meant."""

import difflib
import functools
import heapq
from collections.abc import Collection, Iterable

_NEAR_ENOUGH = 0.6
_CANDIDATES = 8


def near(name: str, names: Iterable[str]) -> str | None:
    """The name that is most like `name`, if one is near.

    Only those that share most pairs of letters are compared in earnest: among a thousand names that takes
    about a millisecond.
    """
    lowered = name.lower()[:200]
    pairs = _pairs(lowered)
    by_overlap = heapq.nlargest(_CANDIDATES, ((len(pairs & _known_pairs(n)), n) for n in names))
    best, best_ratio = None, _NEAR_ENOUGH
    for overlap, candidate in by_overlap:
        ratio = difflib.SequenceMatcher(None, lowered, candidate.lower()).ratio() if overlap else 0.0
        if ratio >= best_ratio and (best is None or ratio > best_ratio):
            best, best_ratio = candidate, ratio
    return best


def unknown_model(name: str, names: Iterable[str], otherwise: str) -> str:
    """Say that there is no such model, and which may have been meant; `otherwise` what to do."""
    return unknown("model", name, names, otherwise)


def unknown(kind: str, name: str, names: Iterable[str], otherwise: str) -> str:
    """`unknown_model` for another kind of thing."""
    meant = near(name, names)
    hint = f"did you mean {meant!r}?" if meant is not None else otherwise
    return f"{kind} {name!r:.140} unknown; {hint}"


def how_to_list(names: Collection[str], command: str) -> str:
    """What to do about an unknown model: `command` lists those there are, if there are any."""
    return f"`{command}` lists them" if names else "no models yet: add one with `understudyctl add`"


def _pairs(text: str) -> frozenset[str]:
    """Pairs of neighbouring letters, the first and the last with the edge."""
    edged = f" {text} "
    return frozenset(edged[i : i + 2] for i in range(len(edged) - 1))


@functools.lru_cache(maxsize=4096)
def _known_pairs(name: str) -> frozenset[str]:
    return _pairs(name.lower())

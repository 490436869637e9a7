"""Which models a family of any size consists of, beyond those that were trained.

In this order: the base, the fine-tunes, the base with each LoRA; then mixtures of these in rounds. Every
recipe is weights only: a UNet = sum of shares x trained UNets + strength x a LoRA's low-rank products.
Averaging the weights of fine-tunes of one base gives a working model between them (Wortsman et al. 2022,
"Model soups").
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, islice

from understudy_demo.styles import BASE, FINE_TUNES, LORAS

_PAIR_SHARES = (0.5, 0.35, 0.65)
_BASE_SHARES = (0.3, 0.5)
_STRENGTHS = (1.0, 0.7)


@dataclass(frozen=True, slots=True)
class Recipe:
    """`shares` of trained UNets, by name, add up to one; `lora` at `strength` on top, if there is one."""

    shares: tuple[tuple[str, float], ...]
    lora: str | None = None
    strength: float = 1.0

    @property
    def name(self) -> str:
        """Says what is in it: `night`, `night-x-clay-65`, `clay-with-sepia-70`."""
        (first, share), *others = self.shares
        name = first if not others else f"{first}-x-{others[0][0]}-{round(100 * share)}"
        if self.lora is None:
            return name
        strength = "" if self.strength == 1 else f"-{round(100 * self.strength)}"
        return f"{self.lora}{strength}" if name == BASE else f"{name}-with-{self.lora}{strength}"

    @property
    def styles(self) -> tuple[str, ...]:
        """The styles that a picture of it may be in; a mixture looks like one of its parts."""
        parts = [name for name, _ in self.shares] + ([self.lora] if self.lora else [])
        return tuple(parts) if parts == [BASE] or len(parts) > 2 else tuple(p for p in parts if p != BASE)


def trained() -> tuple[Recipe, ...]:
    """What was trained, as it is."""
    tuned = [Recipe(((name, 1.0),)) for name in (BASE, *FINE_TUNES)]
    return (*tuned, *(Recipe(((BASE, 1.0),), lora) for lora in LORAS))


def recipes(count: int) -> list[Recipe]:
    """The first `count` recipes: always the same ones, each with a name of its own.

    Raises `ValueError` beyond the last one.
    """
    chosen = list(islice(_all(), count))
    if len(chosen) < count:
        raise ValueError(f"there are {len(chosen)} recipes; ask for so many models or fewer")
    return chosen


def _all() -> Iterator[Recipe]:
    yield from trained()
    pairs, loras = list(combinations(FINE_TUNES, 2)), list(LORAS)
    for strength in _STRENGTHS:
        for turn in range(len(loras)):  # so that few mixtures have much variety
            for number, style in enumerate(FINE_TUNES):
                yield Recipe(((style, 1.0),), loras[(number + turn) % len(loras)], strength)
    for share in _PAIR_SHARES:
        for first, second in pairs:
            yield Recipe(((first, share), (second, 1 - share)))
    for share in _BASE_SHARES:
        for style in FINE_TUNES:
            yield Recipe(((style, 1 - share), (BASE, share)))
    for first, second in pairs:
        for lora in LORAS:
            yield Recipe(((first, 0.5), (second, 0.5)), lora)

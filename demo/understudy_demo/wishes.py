"""What the demo's models are asked for: a closed little language of shapes, and its captions.

    a red circle on blue            three small green triangles on dotted white
    a big star                      an orange cross on striped black, at the top

A caption says everything that the picture must show. What it leaves out is free (background, place) or
ordinary (medium size, plain background).
"""

import random
from dataclasses import dataclass

SHAPES = ("circle", "square", "triangle", "cross", "star")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
SIZES = ("small", "medium", "big")
TEXTURES = ("plain", "striped", "dotted")
PLACES = ("left", "right", "top", "bottom")

_COUNTS = ("a", "two", "three", "four")
_PLURALS = {"cross": "crosses"}
_PLACE_WORDS = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
}


class NotAWish(ValueError):
    """The caption is not of this language."""


@dataclass(frozen=True, slots=True)
class Wish:
    """`count` equal shapes of one colour. `background` and `place` are None where they are free."""

    count: int
    colour: str
    shape: str
    size: str = "medium"
    background: str | None = None
    texture: str = "plain"
    place: str | None = None

    @property
    def caption(self) -> str:
        """The sentence; `parse` is its inverse."""
        size = "" if self.size == "medium" else f"{self.size} "
        what = f"{size}{self.colour} {_noun(self.shape, self.count)}"
        text = f"{_article(what) if self.count == 1 else _COUNTS[self.count - 1]} {what}"
        if self.background is not None:
            texture = "" if self.texture == "plain" else f"{self.texture} "
            text += f" on {texture}{self.background}"
        return text if self.place is None else f"{text}, {_PLACE_WORDS[self.place]}"


def _article(words: str) -> str:
    return "an" if words[0] in "aeiou" else "a"


def _noun(shape: str, count: int) -> str:
    return shape if count == 1 else _PLURALS.get(shape, shape + "s")


_SINGULARS = {_noun(shape, count): shape for shape in SHAPES for count in (1, 2)}


def parse(caption: str) -> Wish:
    """The wish that a caption says. Raises `NotAWish`, naming what was not understood."""
    text, _, place_words = caption.strip().lower().partition(", ")
    what, _, ground = text.partition(" on ")
    words, ground_words = what.split(), ground.split()
    if len(words) < 3 or len(words) > 4 or len(ground_words) > 2:
        raise NotAWish(f"{caption!r} is not of the form 'two small red circles on striped blue'")
    count = 1 if words[0] == "an" else _index(_COUNTS, words[0], caption) + 1
    texture = ground_words[0] if len(ground_words) == 2 else "plain"
    return Wish(
        count=count,
        colour=_one_of(COLOURS, words[-2], caption),
        shape=_SINGULARS[_one_of(tuple(_SINGULARS), words[-1], caption)],
        size=_one_of(SIZES, words[1], caption) if len(words) == 4 else "medium",
        background=_one_of(COLOURS, ground_words[-1], caption) if ground_words else None,
        texture=_one_of(TEXTURES, texture, caption),
        place=_place(place_words, caption),
    )


def _place(words: str, caption: str) -> str | None:
    if not words:
        return None
    _one_of(tuple(_PLACE_WORDS.values()), words, caption)
    return next(place for place, said in _PLACE_WORDS.items() if said == words)


def _one_of(allowed: tuple[str, ...], word: str, caption: str) -> str:
    if word not in allowed:
        raise NotAWish(f"{word!r} in {caption!r} is none of {', '.join(allowed)}")
    return word


def _index(allowed: tuple[str, ...], word: str, caption: str) -> int:
    return allowed.index(_one_of(allowed, word, caption))


def sample_wish(rng: random.Random) -> Wish:
    """A wish as the models were trained on them; all words are about equally likely."""
    count = rng.choice((1, 1, 2, 3, 4))
    colour = rng.choice(COLOURS)
    size = rng.choice(("small", "medium", "big") if count == 1 else ("small", "medium"))
    background = rng.choice([other for other in COLOURS if other != colour])
    has_background = rng.random() < 0.85
    texture = rng.choice(("plain", "plain", *TEXTURES[1:])) if has_background else "plain"
    has_place = count == 1 and size != "big" and rng.random() < 0.5
    return Wish(
        count=count,
        colour=colour,
        shape=rng.choice(SHAPES),
        size=size,
        background=background if has_background else None,
        texture=texture,
        place=rng.choice(PLACES) if has_place else None,
    )


def vocabulary() -> tuple[str, ...]:
    """Every word and sign of the language, sorted."""
    words = {*COLOURS, *_SINGULARS, *_COUNTS, "an", *SIZES, *TEXTURES, "on", ","}
    return tuple(sorted(words | {word for said in _PLACE_WORDS.values() for word in said.split()}))

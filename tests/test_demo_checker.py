"""The checkers on pictures that were drawn, so that what is right is known."""

import random
from dataclasses import replace

import numpy as np
import pytest

from understudy_demo.checker import check
from understudy_demo.drawing import RGB, SIDE
from understudy_demo.members import Member
from understudy_demo.quality import sample_wishes
from understudy_demo.style_checker import style_of
from understudy_demo.styles import BASE, FINE_TUNES, LORAS, STYLES, draw_wish
from understudy_demo.verdicts import Judge, Verdict
from understudy_demo.wishes import COLOURS, SHAPES, NotAWish, Wish, parse, sample_wish, vocabulary
from understudy_demo.workload import PROMPTS, Request

WISH = Wish(2, "red", "triangle", "medium", "white")


def faults(drawn: Wish, asked: Wish, style: str = BASE, seed: int = 1) -> tuple[str, ...]:
    return check(draw_wish(drawn, style, seed), asked, style)


@pytest.mark.parametrize(
    ("caption", "wish"),
    [
        ("a red circle on blue", Wish(1, "red", "circle", "medium", "blue")),
        ("three small green triangles", Wish(3, "green", "triangle", "small")),
        ("an orange cross on striped black, at the top",
         Wish(1, "orange", "cross", "medium", "black", "striped", "top")),
    ],
)  # fmt: skip
def test_captions_say_wishes(caption: str, wish: Wish) -> None:
    assert parse(caption) == wish and wish.caption == caption


def test_every_sampled_wish_survives_its_caption_in_known_words() -> None:
    rng, words = random.Random(3), set(vocabulary())
    for _ in range(300):
        wish = sample_wish(rng)
        assert parse(wish.caption) == wish
        assert set(wish.caption.replace(",", " ,").split()) <= words


@pytest.mark.parametrize(
    "text", ["", "a lighthouse at dusk", "a pink circle", "a red circle on", "five red stars"]
)
def test_other_sentences_are_refused(text: str) -> None:
    with pytest.raises(NotAWish):
        parse(text)


def test_the_same_seed_draws_the_same_picture() -> None:
    wish = Wish(4, "blue", "star", "small", "yellow", "dotted")
    for style in STYLES:
        assert np.array_equal(draw_wish(wish, style, 5), draw_wish(wish, style, 5))
    assert not np.array_equal(draw_wish(wish, "night", 5), draw_wish(wish, "night", 6))


def test_what_was_drawn_plainly_passes() -> None:
    wishes = sample_wishes(150, 1)
    failed = [wish.caption for i, wish in enumerate(wishes) if faults(wish, wish, seed=i)]
    assert len(failed) <= 2, failed


@pytest.mark.parametrize("style", [*FINE_TUNES, *LORAS])
def test_most_of_what_was_drawn_in_a_style_passes(style: str) -> None:
    wishes = sample_wishes(40, 2)
    passed = sum(not faults(wish, wish, style, seed=i) for i, wish in enumerate(wishes))
    assert passed >= (24 if style == "clay" else 32), "clay shades its colours: yellow is half orange"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"colour": "green"}, "colour red"),
        ({"shape": "square"}, "shape triangle"),
        ({"count": 3}, "2 shapes"),
        ({"count": 1}, "2 shapes"),
        ({"size": "small"}, "size medium"),
        ({"background": "yellow"}, "background white"),
        ({"texture": "striped"}, "texture plain"),
    ],
)
def test_what_is_not_as_asked_is_named(change: dict[str, object], fault: str) -> None:
    for seed in range(5):
        assert faults(WISH, WISH, seed=seed) == ()
        assert fault in faults(WISH, replace(WISH, **change), seed=seed)  # type: ignore[arg-type]


def test_every_wrong_colour_and_shape_is_noticed() -> None:
    for colour in COLOURS:
        ground = "white" if colour != "white" else "blue"
        drawn = Wish(1, colour, "circle", "medium", ground)
        for other in COLOURS:
            assert bool(faults(drawn, replace(drawn, colour=other))) == (other != colour), (colour, other)
    for shape in SHAPES:
        drawn = Wish(3, "blue", shape, "small", "yellow")
        for other in SHAPES:
            assert bool(faults(drawn, replace(drawn, shape=other))) == (other != shape), (shape, other)


def test_another_place_is_noticed() -> None:
    drawn = Wish(1, "white", "star", "small", "purple", place="left")
    assert faults(drawn, drawn) == ()
    assert faults(drawn, replace(drawn, place="top")) == ("another place",)


def test_a_second_colour_among_the_shapes_is_noticed() -> None:
    picture = draw_wish(Wish(1, "red", "circle", "small", "white", place="left"), BASE, 2)
    picture[26:38, 44:56] = RGB["green"]
    asked = Wish(1, "red", "circle", "small", "white", place="left")
    assert "another colour on white" in check(picture, asked, BASE)


@pytest.mark.parametrize("value", [0.0, 128.0, 255.0])
def test_an_empty_picture_shows_nothing(value: float) -> None:
    assert "0 shapes" in check(np.full((SIDE, SIDE, 3), value, np.float32), WISH, BASE)


def test_noise_shows_nothing() -> None:
    noise = np.random.default_rng(0).uniform(0, 255, (SIDE, SIDE, 3))
    assert len(check(noise, WISH, BASE)) >= 2


def test_drawn_styles_are_told_apart() -> None:
    wrong = [
        (style, wish.caption)
        for style in STYLES
        for i, wish in enumerate(sample_wishes(15, 3))
        if style_of(draw_wish(wish, style, 900 + i)) != style
    ]
    assert len(wrong) <= 0.05 * 15 * len(STYLES), wrong


def member(style: str) -> Member:
    return Member(name=style, folder="", architecture="sd", own_text_encoder=False, hue=0.0, styles=(style,))


def drawn_rows(style: str, prompt: str) -> bytes:
    return draw_wish(parse(prompt), style, 3).astype(np.uint8).tobytes()


def test_a_picture_of_another_model_or_of_another_prompt_is_no_answer() -> None:
    """What a mistaken switch looks like: the right thing by the wrong model."""
    styles = ("plain", "night", "frame")
    asked = [
        Request(i, 0, style, PROMPTS[i % 2], 7, 8, SIDE, SIDE, 0.0)
        for i, style in enumerate((*styles, *styles))
    ]
    judge = Judge([member(style) for style in styles])
    right = {r.index: drawn_rows(r.model, r.prompt) for r in asked}
    assert judge.verdict(asked, right) == Verdict(images=6, shown=6, in_style=6, both=6)
    wrong_model = right | {0: drawn_rows("night", asked[0].prompt)}
    assert judge.verdict(asked, wrong_model).in_style == 5
    wrong_prompt = right | {1: drawn_rows("night", "a blue star on white")}
    assert judge.verdict(asked, wrong_prompt) == Verdict(images=6, shown=5, in_style=6, both=5)
    assert str(judge.verdict(asked, {2: right[2]})) == "1 of 1", "of those that came back"

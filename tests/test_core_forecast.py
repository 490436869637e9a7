"""What history says: bursts fade, popularity lasts, and chances are probabilities."""

import random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from understudyd.core.forecast import HALF_LIVES_REQUESTS, Forecast


def after(*names: str) -> Forecast:
    forecast = Forecast()
    for name in names:
        forecast.saw(name)
    return forecast


def test_nothing_is_known_of_who_never_came() -> None:
    assert Forecast().chance("a") == 0.0
    assert Forecast().ranked() == []


def test_who_comes_often_and_lately_is_likelier() -> None:
    assert after("a", "a", "b").ranked() == ["a", "b"]
    assert after("b", "a").ranked() == ["a", "b"]


def test_a_burst_outranks_lasting_popularity_at_first_and_then_fades() -> None:
    """`steady` is every third request for long; `burst` comes ten times in a row."""
    forecast = after(*(["steady", "x", "y"] * 200), *["burst"] * 10)
    assert forecast.chance("burst") > forecast.chance("steady")
    for i in range(30):
        forecast.saw(["steady", "x", "y"][i % 3])
    assert forecast.chance("burst") < forecast.chance("steady")


def test_time_is_counted_in_requests() -> None:
    """A quiet night forgets nothing: only what others ask for makes a name unlikelier."""
    forecast = after("a", "a")
    before = forecast.chance("a")
    assert forecast.chance("a") == before
    forecast.saw("b")
    assert forecast.chance("a") < before


def test_a_count_halves_with_its_half_life() -> None:
    forecast = after("a")
    once = [1 - 0.5 ** (1 / h) for h in HALF_LIVES_REQUESTS]
    assert forecast.chance("a") == pytest.approx(sum(once) / 3)
    for _ in range(50):
        forecast.saw("b")
    halves = [0.5 ** (50 / h) for h in HALF_LIVES_REQUESTS]
    assert forecast.chance("a") == pytest.approx(sum(o * h for o, h in zip(once, halves)) / 3)


def test_the_chance_converges_to_the_probability() -> None:
    dice = random.Random(1)
    forecast = Forecast()
    shares = {"a": 0.5, "b": 0.3, "c": 0.2}
    seen = dict.fromkeys(shares, 0.0)
    for i in range(6000):
        forecast.saw(*dice.choices(list(shares), list(shares.values())))
        if i >= 2000:
            for name in shares:
                seen[name] += forecast.chance(name) / 4000
    assert seen == {name: pytest.approx(share, abs=0.03) for name, share in shares.items()}


def test_one_request_may_count_for_several_names() -> None:
    forecast = Forecast()
    forecast.saw("unet of a", "vae")
    forecast.saw("unet of b", "vae")
    assert forecast.requests == 2
    together = forecast.chance("unet of a") + forecast.chance("unet of b")
    assert forecast.chance("vae") == pytest.approx(together)


def test_forgetting() -> None:
    forecast = after("a", "b", "a")
    assert forecast.ranked() == ["a", "b"]
    forecast.forget("a")
    forecast.forget("never seen")
    assert forecast.ranked() == ["b"] and forecast.chance("a") == 0.0
    forecast.saw("a")
    assert forecast.ranked() == ["a", "b"]


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from("abcdef"), max_size=200))
def test_chances_are_probabilities_and_ranked_sorts_by_them(names: list[str]) -> None:
    forecast = after(*names)
    chances = {name: forecast.chance(name) for name in "abcdef"}
    assert all(0.0 <= chance <= 1.0 for chance in chances.values())
    assert sum(chances.values()) <= 1.0 + 1e-9
    ranked = forecast.ranked()
    assert sorted(ranked) == sorted(set(names))
    assert [chances[n] for n in ranked] == sorted((chances[n] for n in ranked), reverse=True)


def test_with_many_names_the_ranking_may_lag_but_never_names_the_forgotten() -> None:
    forecast = after(*(f"m{i}" for i in range(400)))
    assert len(forecast.ranked()) == 400
    for _ in range(24):
        forecast.saw("m7")
        forecast.ranked()
    forecast.saw("m7")
    assert forecast.ranked()[0] == "m7"
    forecast.forget("m7")
    assert "m7" not in forecast.ranked()

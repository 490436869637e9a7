"""What history says: bursts fade, popularity lasts, and chances are probabilities."""

import random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from understudyd.core.forecast import Forecast
from understudyd.core.predictors import Popularity, Succession
from understudyd.core.returns import Returns


def after(*names: str) -> Forecast:
    forecast = Forecast()
    for name in names:
        forecast.saw(name)
    return forecast


def test_nothing_is_known_of_who_never_came() -> None:
    assert Forecast().chance("a") == 0.0
    assert list(Forecast().ranked()) == []


def test_who_comes_often_and_lately_is_likelier() -> None:
    assert list(after("a", "a", "b").ranked()) == ["a", "b"]
    assert list(after("b", "a").ranked()) == ["a", "b"]


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


def test_a_share_halves_against_who_came_meanwhile() -> None:
    """After a half-life as many requests count as came; in seconds, only time makes the difference."""
    counts = Popularity(10.0)
    counts.saw(["a"], 0.0)
    assert counts.share("a") == 1.0
    counts.saw(["b"], 10.0)
    assert counts.share("a") == pytest.approx(1 / 3) and counts.share("b") == pytest.approx(2 / 3)
    assert counts.share("c") == 0.0
    counts.forget("a")
    assert counts.share("a") == 0.0


def test_who_follows_whom() -> None:
    follows = Succession()
    for _ in range(5):
        follows.saw(("a",))
        follows.saw(("b", "blob of b"))
    follows.saw(("a",))
    assert follows.share("b") == follows.share("blob of b") == 1.0 and follows.share("a") == 0.0
    follows.forget("b")
    assert follows.share("b") == 0.0


def test_followers_are_bounded_and_the_old_ones_fade() -> None:
    follows = Succession()
    for i in range(200):
        follows.saw(("a",))
        follows.saw((f"m{i}",))
    follows.saw(("a",))
    shares = [follows.share(f"m{i}") for i in range(200)]
    assert 0 < sum(share > 0 for share in shares) <= 16
    assert shares[-1] == max(shares) > 0 == shares[0]


def test_clients_come_back_for_the_same_after_their_usual_absence() -> None:
    """Each client asks every 10 s, five times, and never again; two are there at a time."""
    returns, now_s = Returns(), 0.0
    for i in range(100):
        for _ in range(5):
            for which in ("x", "y"):
                returns.saw(f"{which}{i}", (f"model of {which}{i}", "shared"), now_s)
                now_s += 5.0
    here, gone = returns.share("model of x99"), returns.share("model of x98")
    assert here > 0.3 > 0.01 > gone
    assert returns.share("shared") == pytest.approx(1.0)
    returns.pass_time(now_s + 3600.0)
    assert returns.share("model of x99") < here
    before = returns.share("model of y99")
    returns.forget("shared")
    assert returns.share("shared") == 0.0 and returns.share("model of y99") == before
    returns.inherit("new blob", "model of y99")
    assert returns.share("new blob") == pytest.approx(before)
    returns.forget("model of y99")
    assert returns.share("model of y99") == returns.share("new blob") == 0.0


def test_two_requests_at_one_moment_leave_one_client() -> None:
    returns = Returns()
    for _ in range(3):
        returns.saw("c", ("a",), 1.0)
    returns.pass_time(100.0)
    assert returns._held == {"a": returns._all}
    assert returns._holders == {"a": 1} and sum(clients > 1e-9 for clients in returns._all) == 1


def test_the_better_predictor_gains_weight() -> None:
    """Where every client has a model of its own, who is here says more than what is popular."""
    forecast, dice, now_s = Forecast(), random.Random(3), 0.0
    for i in range(200):
        for _ in range(6):
            forecast.saw(f"m{i % 40}", client=f"c{i}", now_s=now_s)
            now_s += dice.uniform(5.0, 10.0)
    names = [type(predictor).__name__ for predictor in forecast._predictors]
    weights = dict(zip(names[-2:], forecast._weights[-2:]))
    by_requests = forecast._weights[2]
    assert weights["Returns"] > 5 * by_requests


def test_a_chance_is_that_of_now() -> None:
    forecast = after(*(["a", "b"] * 50))
    before = forecast.chance("a")
    forecast.saw("c")
    assert forecast.chance("a") < before
    forecast.forget("a")
    assert forecast.chance("a") == 0.0


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
    assert list(forecast.ranked()) == ["a", "b"]
    forecast.forget("a")
    forecast.forget("never seen")
    assert list(forecast.ranked()) == ["b"] and forecast.chance("a") == 0.0
    forecast.saw("a")
    assert list(forecast.ranked()) == ["a", "b"]


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from("abcdef"), max_size=200))
def test_chances_are_probabilities_and_ranked_sorts_by_them(names: list[str]) -> None:
    forecast = after(*names)
    chances = {name: forecast.chance(name) for name in "abcdef"}
    assert all(0.0 <= chance <= 1.0 for chance in chances.values())
    assert sum(chances.values()) <= 1.0 + 1e-9
    for _ in "abcdef":
        ranked = list(forecast.ranked())
    assert sorted(ranked) == sorted(set(names))
    assert [chances[n] for n in ranked] == sorted((chances[n] for n in ranked), reverse=True)


def test_with_many_names_the_ranking_may_lag_but_never_names_the_forgotten() -> None:
    forecast = after(*(f"m{i}" for i in range(400)))
    assert next(forecast.ranked()) == "m399"
    for _ in range(100):
        ranked = list(forecast.ranked())
    assert sorted(ranked) == sorted(f"m{i}" for i in range(400))
    for _ in range(24):
        forecast.saw("m7")
        list(forecast.ranked())
    forecast.saw("m7")
    assert next(forecast.ranked()) == "m7"
    forecast.forget("m7")
    assert "m7" not in forecast.ranked()

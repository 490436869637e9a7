"""What a forecast has learned outlives it: as a document that is believed whole, or not at all."""

import functools
import json
import math
import operator
from collections.abc import Iterable
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from understudyd.core.forecast import Forecast
from understudyd.core.remembered import DamagedDocument

MODELS = [f"m{i}" for i in range(6)]
BLOBS = [f"blob{i}" for i in range(8)]
LAST_S = 12.5

asks = st.tuples(st.integers(0, 5), st.integers(0, 7), st.sampled_from("abcd"), st.integers(0, 400))
"""Model, further blob, client, and quarters of a second since the request before."""


def learn(forecast: Forecast, requests: Iterable[tuple[int, int, str, int]], now_s: float) -> None:
    for which, extra, client, quarters in requests:
        now_s += quarters / 4
        blobs = dict.fromkeys((BLOBS[which], BLOBS[extra]))
        forecast.saw(MODELS[which], *blobs, client=client, now_s=now_s)


def chances(forecast: Forecast) -> list[float]:
    return [forecast.chance(name) for name in [*MODELS, *BLOBS]]


def written(forecast: Forecast) -> Any:
    """As it comes back from a file."""
    return json.loads(json.dumps(forecast.copy().document(), allow_nan=False))


def a_life() -> Forecast:
    forecast = Forecast()
    learn(forecast, [(i * i % 6, i % 8, "abcd"[i % 4], i % 50) for i in range(150)], 5000.0)
    return forecast


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(asks, max_size=120), st.lists(asks, max_size=60), st.integers(0, 10**6))
def test_another_life_predicts_the_same_and_learns_the_same(
    before: list[tuple[int, int, str, int]], after: list[tuple[int, int, str, int]], clock_s: int
) -> None:
    old, new = Forecast(), Forecast()
    learn(old, before, 0.0)
    new.restore(written(old), MODELS, BLOBS, LAST_S + clock_s)
    assert chances(new) == pytest.approx(chances(old), abs=1e-4)
    for _ in MODELS:
        ranked = set(old.ranked())
    assert set(new.ranked()) == ranked
    learn(old, after, old.last_request_s)
    learn(new, after, new.last_request_s)
    assert chances(new) == pytest.approx(chances(old), abs=1e-4)
    assert new.requests == old.requests == len(before) + len(after)


def test_a_copy_does_not_follow() -> None:
    forecast = a_life()
    copy, then = forecast.copy(), written(forecast)
    learn(forecast, [(1, 2, "a", 3)] * 40, forecast.last_request_s)
    assert json.loads(json.dumps(copy.document())) == then != written(forecast)


def test_time_off_counts() -> None:
    """After a short restart the clients of a minute ago are expected back, after a night they are not."""
    soon, later = Forecast(), Forecast()
    for forecast, last_s in ((soon, 100.0), (later, 100.0 - 36_000.0)):
        forecast.restore(written(a_life()), MODELS, BLOBS, last_s)
        forecast.saw("new", client="z", now_s=101.0)
    expected = dict.fromkeys(MODELS)
    assert sum(map(soon.chance, expected)) > sum(map(later.chance, expected)) > 0.0


def test_what_is_gone_is_not_remembered() -> None:
    forecast = Forecast()
    forecast.restore(written(a_life()), ["m1", "m3"], ["blob1"], LAST_S)
    assert set(forecast.ranked()) == {"m1", "m3"}
    assert forecast.chance("m0") == forecast.chance("blob0") == 0.0 < forecast.chance("blob1")
    learn(forecast, [(0, 1, "a", 1), (1, 0, "b", 1)], LAST_S)
    assert set(forecast.ranked()) == {"m0", "m1", "m3"}


def test_a_blob_never_comes_back_as_a_model() -> None:
    """Whoever ranks models looks them up."""
    document = written(a_life())
    document["models"] = len(document["names"])
    forecast = Forecast()
    forecast.restore(document, MODELS, BLOBS, LAST_S)
    assert set(forecast.ranked()) == {"m0", "m1", "m3", "m4"}


def test_only_the_likeliest_are_written() -> None:
    forecast = Forecast()
    for i in range(300):
        forecast.saw(f"m{i % 100 if i < 200 else i % 10}", f"b{i}", client=str(i), now_s=float(i))
    document = forecast.document(most_names=30)
    assert len(document["names"]) == 30
    likeliest = sorted((f"m{i}" for i in range(100)), key=forecast.chance)[-10:]
    assert set(likeliest) <= set(document["names"])
    assert len(json.dumps(document)) < 12_000


def test_a_thousand_models_fit_a_small_file() -> None:
    forecast = Forecast()
    for i in range(6000):
        which = i * i % 1009
        names = (f"model-{which}", *(f"{part}-{which:060}" for part in ("t", "u", "v")))
        forecast.saw(*names, client=f"client-{i // 5:030}", now_s=float(i))
    assert len(json.dumps(forecast.document())) < 3 * 2**20


def parts_of(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to all there is in a document."""
    if not isinstance(document, dict | list):
        return [path]
    inside = document.items() if isinstance(document, dict) else enumerate(document)
    return [path, *(deeper for key, value in inside for deeper in parts_of(value, (*path, key)))]


DOCUMENT = written(a_life())
PATHS = parts_of(DOCUMENT)[1:]
values = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**20), 10**20), st.floats(), st.text(max_size=5),
    st.sampled_from([0, 1, -1, 1e300, [], {}, [0], "m1", [[1, 2, 3]]]),
)  # fmt: skip


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(PATHS), values)
def test_a_damaged_document_is_refused_or_does_no_harm(path: tuple[Any, ...], value: Any) -> None:
    document = json.loads(json.dumps(DOCUMENT))
    functools.reduce(operator.getitem, path[:-1], document)[path[-1]] = value
    forecast = Forecast()
    learn(forecast, [(1, 2, "a", 3), (2, 2, "b", 3)], 0.0)
    before = chances(forecast)
    try:
        forecast.restore(document, MODELS, BLOBS, LAST_S)
    except DamagedDocument as error:
        assert str(error) and chances(forecast) == before
    assert set(forecast.ranked()) <= set(MODELS)
    learn(
        forecast, [(i % 6, i % 8, "abcd"[i % 4], 1) for i in range(40)], max(LAST_S, forecast.last_request_s)
    )
    assert all(math.isfinite(chance) and 0.0 <= chance <= 1.01 for chance in chances(forecast))
    json.dumps(forecast.document(), allow_nan=False)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 1}, "another version"),
        ({"names": DOCUMENT["names"] * 2}, "twice"),
        ({"predictors": []}, "list of 8"),
        ({"weights": [float("nan")] * 8}, "no number"),
        ({"requests": 1.5}, "no whole number"),
    ],
)
def test_the_error_says_what_is_wrong(change: dict[str, Any], says: str) -> None:
    with pytest.raises(DamagedDocument, match=says):
        Forecast().restore(DOCUMENT | change, MODELS, BLOBS, LAST_S)


@pytest.mark.parametrize("document", [None, [], "x", 3, {}])
def test_what_is_no_document(document: Any) -> None:
    with pytest.raises(DamagedDocument):
        Forecast().restore(document, MODELS, BLOBS, LAST_S)

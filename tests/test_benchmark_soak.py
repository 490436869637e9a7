"""The soak, short: its keys and its zeros; and a verdict that sees what is lost, wrong or said twice."""

import json

import pytest
from benchmarks import soak
from benchmarks.soak_client import Entry, Wish

WISHES = [
    Wish(model="a", seed=1, right=("good",)),
    Wish(model="guest", seed=1, right=("old", "new"), guest=True),
]


def test_everything_at_once_and_nothing_lost(capsys: pytest.CaptureFixture[str]) -> None:
    status = soak.main(["--seconds", "6", "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(found) == [
        "requests",
        "lost",
        "wrong_image",
        "duplicated",
        "rss_growth_mb",
        "fd_growth",
        "leaked_bytes",
    ]
    assert status == 0 and soak.holds(found), found


def asked(number: int, wish: int = 0) -> Entry:
    return Entry(id=str(number), wish=wish, step="asked")


def ended(number: int, step: str, wish: int = 0, sha256: str = "", excuses: tuple[str, ...] = ()) -> Entry:
    return Entry(id=str(number), wish=wish, step=step, sha256=sha256, excuses=excuses)


def verdict(*journal: Entry, was_killed: bool = False) -> tuple[int, int, int, int]:
    """Requests, lost, wrong, duplicated."""
    found = soak.Verdict()
    found.hear(list(journal), WISHES, was_killed=was_killed)
    return found.requests, found.lost, found.wrong_image, found.duplicated


def test_what_is_right() -> None:
    good = [asked(1), ended(1, "image", sha256="good"), asked(2, 1), ended(2, "image", 1, "new")]
    assert verdict(*good) == (2, 0, 0, 0)
    assert verdict(asked(1), ended(1, "cancelled", excuses=("cancelled",))) == (1, 0, 0, 0)


def test_what_is_lost() -> None:
    assert verdict(asked(1)) == (1, 1, 0, 0)
    assert verdict(asked(1), was_killed=True) == (0, 0, 0, 0)
    assert verdict(asked(1), ended(1, "load_failed", excuses=("cancelled",))) == (1, 1, 0, 0)


def test_what_is_wrong_or_said_twice() -> None:
    assert verdict(asked(1), ended(1, "image", sha256="else")) == (1, 0, 1, 0)
    image = ended(1, "image", sha256="good")
    assert verdict(asked(1), image, Entry(id="1", wish=-1, step="again")) == (1, 0, 0, 1)


def test_what_holds() -> None:
    clean = dict.fromkeys(["lost", "wrong_image", "duplicated", "fd_growth", "leaked_bytes"], 0)
    clean |= {"requests": 7, "rss_growth_mb": 29.0}
    assert soak.holds(clean) and soak.holds(clean | {"fd_growth": -1, "rss_growth_mb": -3.0})
    assert not soak.holds(clean | {"rss_growth_mb": 30.0})
    assert not any(
        soak.holds(clean | {name: 1}) for name in clean if name not in ("requests", "rss_growth_mb")
    )

"""What `understudyctl top` draws."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from understudy import admin, top

STATUS: dict[str, Any] = {
    "state": "draining",
    "uptime_s": 7500.0,
    "device": "cuda",
    "models": 24,
    "models_resident": 6,
    "requests_done": 100,
    "requests_failed": 2,
    "tiers_on_receipt": {"resident": 75, "disk": 25},
    "last_errors": [
        {"s_ago": 61.0, "code": "load_failed", "message": "the older"},
        {"s_ago": 2.0, "code": "internal", "message": "the [newer]"},
    ],
    "loaders": [
        {"slot": 0, "pid": 11, "state": "loading", "load": "sdxl/unet", "rate_bytes_per_s": 2.0 * 2**20}
    ],
}
ARENA = {
    "size_bytes": 1024,
    "extents": [
        {"offset": 0, "size_bytes": 512, "state": "ready", "models": ["big"]},
        {"offset": 512, "size_bytes": 256, "state": "leased", "models": ["a", "b", "c"]},
        {"offset": 768, "size_bytes": 256, "state": "free", "models": []},
    ],
}


def wish(name: str, state: str) -> dict[str, Any]:
    return {"id": name, "model": "m", "state": state, "waited_s": 1.0, "tier": "disk", "step": 3, "steps": 20}


def drawn(picture: Any) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(picture)
        return console.export_text()


def test_a_frame_shows_everything() -> None:
    queue = [wish("r1", "running"), *(wish(f"w{i}", "waiting") for i in range(12))]
    text = drawn(top.frame({"status": STATUS, "queue": queue, "arena": ARENA}, 12.5))
    for part in ("draining", "up 2 h 5 min", "6 of 24 models resident", "100 done, 12.5/s, 2 failed"):
        assert part in text
    assert "queue: 12 waiting" in text and "and 2 more" in text and "w9" in text and "w10" not in text
    assert text.index("r1") < text.index("queue:") < text.index("w0")
    assert "resident 75 (75 %)  disk 25 (25 %)" in text
    assert text.index("internal: the [newer]") < text.index("load_failed: the older")
    assert "sdxl/unet" in text and "2.0 MiB/s" in text


def test_the_arena_is_drawn_to_scale_and_shared_bytes_are_one_colour() -> None:
    text = drawn(top.arena_by_model(ARENA))
    cells = "".join(text.splitlines()[:4])
    assert (cells.count("a"), cells.count("b"), cells.count("·")) == (128, 64, 64)
    assert "a big 512 B" in text and "b a and 2 more 256 B" in text and "free 256 B" in text


def test_more_models_than_letters_are_still_counted() -> None:
    extents = [
        {"offset": i * 10, "size_bytes": 10, "state": "ready", "models": [f"m{i}"]} for i in range(100)
    ]
    text = drawn(top.arena_by_model({"size_bytes": 1000, "extents": extents}))
    assert "*" in text and "·" not in "".join(text.splitlines()[:4])


@pytest.mark.parametrize("document", [{}, {"size_bytes": 0, "extents": []}])
def test_an_arena_of_nothing(document: dict[str, Any]) -> None:
    assert "free" in drawn(top.arena_by_model(document))


def test_frames_go_on_when_the_daemon_is_away_and_tell_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    done = iter([100, 150, None, 150])
    now = itertools.count(step=10.0)

    def call(path: Path, command: admin.AdminRequest, timeout_s: float) -> Any:
        match command:
            case admin.Status():
                if (count := next(done)) is None:
                    raise admin.AdminError("unreachable", "cannot reach the daemon")
                return STATUS | {"requests_done": count}
            case admin.Queue():
                return []
            case _:
                return ARENA

    monkeypatch.setattr(top, "call", call)
    shown = [drawn(picture) for picture in itertools.islice(top.frames(Path("x"), lambda: next(now)), 4)]
    assert "/s" not in shown[0].splitlines()[0] and "150 done, 5.0/s" in shown[1]
    assert "cannot reach the daemon" in shown[2] and "/s" not in shown[3].splitlines()[0]
    assert "nothing on stage" in shown[0]

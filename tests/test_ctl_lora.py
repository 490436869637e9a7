"""`understudyctl` about LoRAs, against a scripted admin socket."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from test_cli_completion import completed
from test_cli_understudyctl import STATUS, FakeDaemon
from understudy import admin

LORA = {
    "name": "pixel-[art]", "base": "sd15", "ranks": [4, 16], "size_bytes": 3 * 1024 * 1024, "tier": "host",
    "overlays": 3, "overlays_resident": 2, "requests": 12, "last_used_s_ago": 3.0,
}  # fmt: skip
COMBINATION = {
    "name": "sd15+pixel-[art]@0.8", "base": "sd15", "adapters": [["pixel-[art]", 0.8]], "ranks": [4, 16],
    "size_bytes": 1024, "tier": "resident", "pinned": True, "requests": 7, "last_used_s_ago": None,
}  # fmt: skip
LISTING = {
    "loras": [LORA, {"name": "wrong", "base": "", "ranks": [8], "tier": "disk"}],
    "combinations": [COMBINATION],
}
MORE = {
    "fits": ["sd15", "sd15-anime"],
    "trigger_words": ["pixel"],
    "licence": "",
    "combinations": [COMBINATION],
}
PARTS = [
    {"name": "unet", "role": "overlay", "blob": "f" * 64, "size_bytes": 1024, "tier": "resident",
     "host_copy": False, "shared_by": ["a", "b"], "history": "", "made_of": [["pixel-[art]", 0.8]],
     "fold_s": 0.012, "chance_next": 0.25},
    {"name": "pixel-[art]", "role": "lora", "blob": "e" * 64, "size_bytes": 512, "tier": "host",
     "host_copy": True, "shared_by": [], "history": ""},
]  # fmt: skip


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    daemon = FakeDaemon(tmp_path / "admin.sock")
    daemon.answers |= {"loras": LISTING, "models": [{"name": "sd15", "tier": "disk"}]}
    daemon.thread.start()
    yield daemon
    daemon.server.shutdown()
    daemon.server.server_close()
    daemon.thread.join(10)


def test_loras_lists_adapters_and_combinations(daemon: FakeDaemon) -> None:
    text = daemon.run("loras").stdout
    first, second = (
        next(line for line in text.splitlines() if line.startswith(n)) for n in ("pixel", "wrong")
    )
    for fact in ("pixel-[art]", "sd15", "4-16", "3.0 MiB", "host", "2 of 3", "12", "3.0 s ago"):
        assert fact in first
    assert "any that it fits" in second and " 8 " in second
    assert "sd15+pixel-[art]@0.8" in text and "pinned" in text and "never" in text
    assert json.loads(daemon.run("loras", "-o", "json").stdout) == LISTING
    daemon.answers["loras"] = {"loras": [], "combinations": []}
    assert "add-lora" in daemon.run("loras").stdout


def test_show_of_a_lora_and_of_a_combination(daemon: FakeDaemon) -> None:
    daemon.answers["show"] = LORA | MORE
    text = daemon.run("show", "pixel-[art]").stdout
    for fact in ("4-16", "sd15, sd15-anime", "trigger_words", "sd15+pixel-[art]@0.8"):
        assert fact in text
    assert "licence" not in text, "nothing is known of it"
    daemon.answers["show"] = COMBINATION | {"components": PARTS, "parts": "prepared"}
    text = daemon.run("show", "sd15+pixel-[art]@0.8").stdout
    for fact in ("pixel-[art] x 0.8", "overlay", "12 ms", "f" * 16, "prepared"):
        assert fact in text


def test_add_lora_says_what_became_of_each(daemon: FakeDaemon, tmp_path: Path) -> None:
    (tmp_path / "loras").mkdir()
    daemon.notes = [admin.Note(phase="a", done=1, total=4), admin.Note(phase="a", done=4, total=4)]
    daemon.answers["add-lora"] = {
        "results": [
            {"outcome": "refused", "path": "/l/dora.safetensors", "name": "dora", "why": "is a DoRA"},
            {"outcome": "added", "path": "/l/a.safetensors", "name": "a", "size_bytes": 2048},
        ]
    }
    result = daemon.run("add-lora", str(tmp_path / "loras"), "--base", "sd15", "--name-prefix", "x-")
    assert result.exit_code == 1 and "is a DoRA" in result.stdout and "1 added, 1 refused" in result.stdout
    assert daemon.asked == [admin.AddLora(source=str(tmp_path / "loras"), base="sd15", name_prefix="x-")]
    daemon.answers["add-lora"] = {"results": []}
    assert "no loras found" in daemon.run("add-lora", "mine", "org/name", "--replace").stdout
    assert daemon.asked[-1] == admin.AddLora(name="mine", source="org/name", replace=True)
    daemon.run("add-lora", str(tmp_path / "none"))
    assert daemon.asked[-1].is_missing  # type: ignore[union-attr]
    for wrong in ([], ["a", "b", "c"]):
        assert daemon.run("add-lora", *wrong).exit_code == 2


def test_remove_lora(daemon: FakeDaemon) -> None:
    daemon.answers["remove-lora"] = {"name": "wrong", "freed_bytes": 2048}
    result = daemon.run("remove-lora", "wrong")
    assert result.exit_code == 0 and "2.0 KiB" in result.stdout
    assert daemon.asked == [admin.RemoveLora(name="wrong")]


def test_status_counts_them_where_there_are_any(daemon: FakeDaemon) -> None:
    assert "loras" not in daemon.run("status").stdout
    daemon.answers["status"] = STATUS | {"loras": 300, "combinations": 40, "combinations_resident": 20}
    assert "300; 40 combinations, 20 resident" in daemon.run("status").stdout


def test_names_are_completed(daemon: FakeDaemon) -> None:
    def completes(words: str) -> list[str]:
        return completed("", f"understudyctl --socket {daemon.path} {words}")[0]

    assert completes("remove-lora ") == ["pixel-[art]", "wrong"]
    assert completes("show ") == ["sd15", "pixel-[art]", "wrong", "sd15+pixel-[art]@0.8"]
    assert completes("add-lora --base s") == ["sd15"]
    assert completes("remove ") == ["sd15"]

"""Telling sources apart, what `add` makes of what was typed, and sources that may not be read."""

import os
from pathlib import Path

import click
import pytest

from store_kit import fake_source
from understudy import admin
from understudy.ctl_add import daemon_source, make_command
from understudyd.shell.ingesting import ingest_arguments
from understudyd.store.errors import StoreError
from understudyd.store.ingest_cli import build_parser, options_from
from understudyd.store.sources import opening
from understudyd.store.sources.opening import FolderSource, open_source, user_name

OPTIONS = {
    "config": None, "name_prefix": "", "dry_run": False, "like": (), "revision": None, "replace": False,
    "dtype": "keep", "variant": None, "ignore_pickle": False, "pipeline": None,
}  # fmt: skip


def typed(**options: object) -> admin.Add | admin.Scan:
    given = {"name": None, "source": None, "folder": None} | OPTIONS | options
    return make_command(**given)  # type: ignore[arg-type]


def test_sources_as_the_daemon_is_told_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    told = {
        "org/here": str(tmp_path / "org/here"),  # what exists is a path
        "org/name": "org/name",
        "org/name@v1": "org/name@v1",
        "./org/name": str(tmp_path / "org/name"),
        "model.safetensors": str(tmp_path / "model.safetensors"),
        "/models/x": "/models/x",
    }
    assert {source: daemon_source(source) for source in told} == told


def test_what_was_typed_becomes_one_command(tmp_path: Path) -> None:
    assert typed(name="m", source="/models/x", like=("a", "b"), config=tmp_path, replace=True) == admin.Add(
        name="m", source="/models/x", like=("a", "b"), config=str(tmp_path), replace=True, is_missing=True
    )
    for there in (str(tmp_path), "org/name"):
        assert typed(name="m", source=there) == admin.Add(name="m", source=there)
    assert typed(folder=tmp_path, dry_run=True, name_prefix="p-", dtype="fp16") == admin.Scan(
        folder=str(tmp_path), dry_run=True, name_prefix="p-", dtype="fp16"
    )
    for wrong in (
        {}, {"name": "m"}, {"name": "m", "source": "x", "dry_run": True}, {"folder": tmp_path, "name": "m"},
        {"folder": tmp_path, "revision": "v1"},
    ):  # fmt: skip
        with pytest.raises(click.UsageError):
            typed(**wrong)


@pytest.mark.parametrize(
    "command",
    [
        admin.Add(name="--json", source="-x", dtype="bf16", variant="fp16", revision="v1", replace=True),
        admin.Add(name="m", source="/x y", like=("a", "--b"), config="/c", ignore_pickle=True, pipeline="p"),
        admin.Scan(folder="/x", name_prefix="-p", dry_run=True, like=("a",), dtype="fp32"),
    ],
)
def test_the_ingest_process_is_told_everything_and_takes_no_value_for_an_option(
    command: admin.Add | admin.Scan,
) -> None:
    parsed = build_parser().parse_args(["--store", "/s", *ingest_arguments(command)])
    options = options_from(parsed)
    for field in ("dtype", "variant", "ignore_pickle", "like", "replace"):
        assert getattr(options, field) == getattr(command, field), field
    assert (str(options.config) if options.config else None) == command.config
    if isinstance(command, admin.Add):
        assert (parsed.name, parsed.source, options.revision) == (
            command.name,
            command.source,
            command.revision,
        )
        assert options.pipeline == command.pipeline
    else:
        assert (str(parsed.scan), parsed.name_prefix) == (command.folder, command.name_prefix)
        assert parsed.dry_run == command.dry_run


def test_a_folder_names_itself_as_its_origin(tmp_path: Path) -> None:
    folder = fake_source(tmp_path / "model")
    assert open_source(folder) == FolderSource(folder, str(folder))
    with pytest.raises(StoreError, match="scan it"):
        open_source(tmp_path)
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(StoreError, match="add-lora"):
        open_source(tmp_path)
    with pytest.raises(StoreError, match="which has no revisions"):
        open_source(folder, revision="v1")


def test_what_may_not_be_read_names_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may run as root, who may read everything: the kernel's answer is made up."""
    folder = fake_source(tmp_path / "model")
    monkeypatch.setattr(opening.os, "access", lambda path, mode: path != folder)
    with pytest.raises(StoreError) as caught:
        open_source(folder)
    assert caught.value.code == "unreadable"
    assert f"user {user_name()} may not read {folder}" in caught.value.message
    monkeypatch.undo()

    def forbidden(self: Path, **_: bool) -> os.stat_result:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "stat", forbidden)
    with pytest.raises(StoreError) as caught:
        open_source(folder)
    monkeypatch.undo()
    assert caught.value.code == "unreadable"

"""The members of a family on disk, and the note in its folder that says whether it is all there."""

import colorsys
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec

_NOTE = "family.json"


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One model: its folder loads with `DiffusionPipeline.from_pretrained`.

    `hue` is in turns, for charts. `styles` are those a picture of it may be in (see `styles`); none if its
    pictures mean nothing.
    """

    name: str
    folder: str
    architecture: str
    own_text_encoder: bool
    hue: float
    styles: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self.folder)

    @property
    def colour(self) -> tuple[float, float, float]:
        """The hue as an RGB triple for captions and charts, where red is the alarm's."""
        return colorsys.hls_to_rgb(0.06 + 0.84 * self.hue, 0.55, 0.5)


OnMember = Callable[[Member], None]


class _Note(msgspec.Struct, frozen=True, kw_only=True):
    """What a finished family folder was made from, and its members."""

    kind: str
    models: int
    seed: int
    members: tuple[Member, ...]


def made_before(folder: Path, kind: str, models: int, seed: int) -> tuple[Member, ...]:
    """The members of a finished family of this kind; none if there is none. It may have been moved."""
    try:
        note = msgspec.json.decode((folder / _NOTE).read_bytes(), type=_Note)
    except (FileNotFoundError, msgspec.DecodeError):
        return ()
    if (note.kind, note.models, note.seed) != (kind, models, seed):
        return ()
    return tuple(msgspec.structs.replace(m, folder=str(folder / m.name)) for m in note.members)


def clear(folder: Path, base: str) -> None:
    """Remove an older or half-made family, known by its base's hidden folder, and nothing else.

    Raises `FileExistsError` if the folder holds anything that is not a family.
    """
    if folder.exists() and any(folder.iterdir()):
        if not (folder / base).exists():
            raise FileExistsError(f"{folder} holds something that is not a family; name another folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)


def finish(
    folder: Path, kind: str, models: int, seed: int, members: tuple[Member, ...]
) -> tuple[Member, ...]:
    """Note that all members are there."""
    note = _Note(kind=kind, models=models, seed=seed, members=members)
    (folder / _NOTE).write_bytes(msgspec.json.encode(note))
    return members


def link_tree(source: Path, target: Path, leave_out: set[str]) -> None:
    """Hard links of every file, except below the named top folders."""
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if relative.parts[0] in leave_out or path.is_dir():
            continue
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        os.link(path, target / relative)

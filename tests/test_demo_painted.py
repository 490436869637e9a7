"""A family on disk: complete pipelines, shared where they should be, each with pictures of its own."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from understudy_demo.members import Member
from understudy_demo.painted import make_family

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> tuple[Member, ...]:
    import torch

    torch.set_num_threads(1)
    return make_family(tmp_path_factory.mktemp("family") / "models", 8, seed=3)


def inodes(members: Sequence[Member], file: str) -> Counter[int]:
    return Counter((member.path / file).stat().st_ino for member in members)


def paint(member: Member) -> Any:
    import numpy as np

    from understudy_demo import baseline
    from understudy_demo.workload import Request

    baseline.quiet()
    request = Request(0, 0, member.name, "a lighthouse", 5, 2, 32, 32, 0.0)
    return np.asarray(baseline.paint(baseline.load(member.path), request), dtype=float)


def test_names_say_hue_and_grain_and_are_unique(members: tuple[Member, ...]) -> None:
    assert members[0].name == "coral-clouds-00"
    assert len({member.name for member in members}) == 8
    assert all(a.hue != b.hue for a, b in pairwise(members))


def test_two_architectures_and_half_with_a_text_encoder_of_their_own(members: tuple[Member, ...]) -> None:
    assert Counter(member.architecture for member in members) == {"sd": 6, "xl": 2}
    assert sum(member.own_text_encoder for member in members) == 4
    fine_tunes = [member for member in members if member.architecture == "sd"]
    assert list(inodes(fine_tunes, VAE).values()) == [6], "one file, six links"
    assert len({(member.path / UNET).read_bytes() for member in members}) == 8
    assert len({(member.path / TEXT).read_bytes() for member in fine_tunes}) == 4 + 1


def test_every_model_loads_and_paints_its_own_picture(members: tuple[Member, ...]) -> None:
    pictures = [paint(member) for member in members]
    assert all(picture.shape == (32, 32, 3) and picture.std() > 20 for picture in pictures)
    means = [picture.mean((0, 1)) for picture in pictures]
    distances = [abs(a - b).max() for i, a in enumerate(means) for b in means[:i]]
    assert min(distances) > 2 and sorted(distances)[len(distances) // 2] > 20


def test_models_are_small(members: tuple[Member, ...]) -> None:
    for member in members:
        assert 1_000_000 < (member.path / UNET).stat().st_size < 6_000_000


def test_a_finished_family_is_reused_and_an_unfinished_one_made_anew(tmp_path: Path) -> None:
    folder = tmp_path / "family"
    first = make_family(folder, 2)
    stamp = (folder / first[1].name / UNET).stat().st_mtime_ns
    told: list[Member] = []
    assert make_family(folder, 2, on_member=told.append) == first == tuple(told)
    assert (folder / first[1].name / UNET).stat().st_mtime_ns == stamp
    bytes_before = (folder / first[1].name / UNET).read_bytes()
    (folder / "family.json").unlink()
    assert make_family(folder, 2) == first
    assert (folder / first[1].name / UNET).stat().st_mtime_ns != stamp
    assert (folder / first[1].name / UNET).read_bytes() == bytes_before, "the same seed, the same weights"


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("do not lose me")
    with pytest.raises(FileExistsError, match="name another folder"):
        make_family(tmp_path, 2)
    assert (tmp_path / "thesis.txt").read_text() == "do not lose me"

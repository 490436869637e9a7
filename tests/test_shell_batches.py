"""What may share a run, and what is set for single models."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from understudy.wire import Generate, InputInfo
from understudyd.shell.batch_key import batch_key
from understudyd.shell.model_settings import NAME, ModelSetting, ModelSettings


def key(**fields: Any) -> str:
    return batch_key(Generate(**{"id": "r", "model": "m", "prompt": "a", "seed": 1, "steps": 20} | fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "another"},
        {"seed": 2},
        {"negative_prompt": None},
        {"format": "jpeg", "quality": 80},
        {"priority": 3},  # the core looks at that
        {"images": 2},
        {"options": {}},
        {"progress": False, "deadline_s": 3.0},
    ],
)
def test_what_each_request_has_for_itself_keeps_nobody_apart(fields: dict[str, Any]) -> None:
    assert key(**fields) == key() != ""


@pytest.mark.parametrize(
    "fields",
    [
        {"width": 512},
        {"height": 512},
        {"steps": 21},
        {"guidance": 3.0},
        {"task": "text-to-image"},
        {"scheduler": "euler"},
        {"options": {"eta": 0.5}},
        {"negative_prompt": "blur"},
        {"format": "latent"},
    ],
)
def test_other_settings_do(fields: dict[str, Any]) -> None:
    assert key(**fields) not in (key(), "")


def test_options_are_compared_by_what_they_say() -> None:
    one, other = {"eta": 0.5, "clip_skip": 1}, {"clip_skip": 1, "eta": 0.5}
    assert key(options=one) == key(options=other) != key(options=one | {"eta": 0.25})


def test_inputs_and_videos_share_with_nobody() -> None:
    image = InputInfo(name="image", format="raw", width=1, height=1, channels=3)
    assert key(inputs=(image,)) == "" == key(format="mp4")


@pytest.mark.parametrize("pixels", [(32, 32), (512, 768), (40, 40), (520, 520), (24, 24)])
def test_several_images_share_where_their_noise_is_the_same_image_by_image(pixels: tuple[int, int]) -> None:
    """As torch draws it here; one image's noise is always the same."""
    width, height = pixels
    shape = (4, height // 8, width // 8)
    at_once, singly = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    both = torch.randn((2, *shape), generator=at_once)
    apart = torch.cat([torch.randn((1, *shape), generator=singly) for _ in range(2)])
    can_share = key(width=width, height=height, images=2) != ""
    assert can_share == torch.equal(both, apart)
    assert key(width=width, height=height) != ""


# -- settings --------------------------------------------------------------------------------------------


def test_settings_outlive_the_daemon_and_defaults_are_not_written(tmp_path: Path) -> None:
    async def play() -> None:
        first, second = ModelSettings(tmp_path), ModelSettings(tmp_path)
        await first.read()
        assert first.of("a").max_batch == 1
        await asyncio.gather(
            *(first.put(name, ModelSetting(max_batch=i + 2)) for i, name in enumerate("abc"))
        )
        await first.put("b", ModelSetting())
        await first.forget("c")
        await second.read()
        assert [second.of(name).max_batch for name in "abc"] == [2, 1, 1]
        assert json.loads((tmp_path / NAME).read_bytes()) == {"a": {"max_batch": 2}}
        assert [path.name for path in tmp_path.iterdir()] == [NAME]

    asyncio.run(play())


@pytest.mark.parametrize("damage", [b"", b"{", b'{"a": {"max_batch": 0}}', b'{"a": 3}', b"\xff"])
def test_a_damaged_file_is_ignored_with_a_warning(
    damage: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / NAME).write_bytes(damage)
    settings = ModelSettings(tmp_path)
    asyncio.run(settings.read())
    assert settings.of("a").max_batch == 1 and NAME in caplog.text


def test_what_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    settings = ModelSettings(tmp_path / "gone")
    with pytest.raises(OSError, match="No such file"):
        asyncio.run(settings.put("a", ModelSetting(max_batch=2)))
    assert settings.of("a").max_batch == 1

"""Blob files that vanish, shrink or turn into something else, before a load and during it.

Only requests for that model fail, with the documented code, and only where its bytes are out of reach.
"""

import asyncio
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from family_kit import Family
from faults_kit import Stricken, stricken_daemon


def vanish(path: Path) -> None:
    path.unlink()


def become_a_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def become_a_link(path: Path) -> None:
    """To the very bytes, but outside of the store."""
    elsewhere = path.parents[2] / path.name
    path.replace(elsewhere)
    path.symlink_to(elsewhere)


def become_another_file(path: Path) -> None:
    """Another file of the same size under the same name."""
    other = path.with_suffix(".other")
    other.write_bytes(path.read_bytes()[::-1])
    other.replace(path)


def shrink(path: Path) -> None:
    path.chmod(0o644)
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(-5000, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def restore(path: Path, saved: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    path.unlink(missing_ok=True)
    shutil.copy2(saved, path)


@pytest.fixture(scope="module")
def stricken(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stricken]:
    """One daemon for all files, without a host pool: a copy there would do for any of them."""
    with stricken_daemon(family, tmp_path_factory.mktemp("files")) as stricken:
        yield stricken


@pytest.mark.parametrize(
    ("mishap", "model", "code"),
    [
        (vanish, "sd-a", "load_failed"),
        (become_a_fifo, "sd-a", "load_failed"),
        (become_a_folder, "xl", "load_failed"),
        (become_a_link, "xl", "load_failed"),
        (become_another_file, "sd-half", "model_corrupt"),
        (shrink, "xl-b", "model_corrupt"),
        (flip_a_bit, "sd-b", "model_corrupt"),
    ],
)
def test_a_file_is_gone_or_wrong_before_its_load(
    stricken: Stricken, tmp_path: Path, mishap: Callable[[Path], None], model: str, code: str
) -> None:
    blob = stricken.blob(model)
    saved = Path(shutil.copy2(blob, tmp_path / "saved"))

    async def scenario() -> None:
        async with stricken.visited():
            mishap(blob)
            error, _ = await asyncio.gather(stricken.refused(model, code), stricken.served("sd-c"))
            assert mishap is not flip_a_bit or "is damaged between" in str(error)
            # A client may be anywhere: it is told which blob, and the log where that lies.
            assert f"(blob {blob.stem[:12]})" in str(error) and "--replace" in str(error)
            assert str(stricken.store.path) not in str(error)
            stricken.daemon.wait_for_log(str(blob))
            restore(blob, saved)
            if code == "load_failed":  # whoever asks again has it tried again; damage is for good
                await stricken.served(model)
            else:
                assert not error.retryable
                assert "add it again with --replace" in str(await stricken.refused(model, code))
        assert stricken.restarts() == 0
        await stricken.emptied()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "mishap", [vanish, become_another_file, become_a_fifo, become_a_folder, become_a_link]
)
def test_a_name_changes_hands_during_its_load(
    stricken: Stricken, tmp_path: Path, mishap: Callable[[Path], None]
) -> None:
    """The load goes on with the file that it has opened; the next one has to open what is there now."""
    blob = stricken.blob("sd-c")
    saved = Path(shutil.copy2(blob, tmp_path / "saved"))

    async def scenario() -> None:
        async with stricken.visited():
            stricken.strike("slow:read")
            handle = await stricken.submit("sd-c")
            await stricken.in_the_middle("sd-c unet")
            mishap(blob)
            stricken.relent()
            await stricken.right("sd-c", handle)
        restore(blob, saved)
        await stricken.emptied()

    asyncio.run(scenario())


def test_a_file_shrinks_during_its_load(stricken: Stricken) -> None:
    async def scenario() -> None:
        async with stricken.visited():
            await stricken.served("sd-a")
            stricken.strike("slow:read")
            refusal = asyncio.create_task(stricken.refused("sd-c", "model_corrupt"))
            await stricken.in_the_middle("sd-c unet")
            shrink(stricken.blob("sd-c"))
            stricken.relent()
            await stricken.served("sd-a", "xl")
            await refusal
        await stricken.emptied()

    asyncio.run(scenario())

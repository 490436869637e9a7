"""What the benchmarks stand on: loads that are waited for, and a comparison that can fail."""

from pathlib import Path

import numpy as np
import pytest
from benchmarks.loaders import LoadTrouble, noise_file, running_loaders
from benchmarks.raw_reads import RawReader
from benchmarks.real_size import sd15
from benchmarks.real_store import random_blob

from loader_kit import KIB, MIB, arena_bytes, cpu_arena
from understudyd.store.safetensors_file import read_header


def test_loads_are_waited_for_and_right(tmp_path: Path) -> None:
    sources = [noise_file(tmp_path / f"{seed}", 700 * KIB, seed=seed) for seed in range(3)]
    with cpu_arena() as arena, running_loaders(arena, count=2) as loaders:
        assert loaders.load([source.at(i * MIB) for i, source in enumerate(sources)]) > 0
        for i, source in enumerate(sources):
            content = np.frombuffer(arena_bytes(arena, i * MIB, 700 * KIB), np.uint8)
            assert source.is_at(content)
            assert not source.is_at(content ^ np.eye(1, len(content), 5, dtype=np.uint8)[0])


def test_a_load_that_fails_is_not_taken_for_one_that_ended(tmp_path: Path) -> None:
    source = noise_file(tmp_path / "noise", 64 * KIB)
    source.path.unlink()
    with cpu_arena() as arena, running_loaders(arena) as loaders, pytest.raises(LoadTrouble, match="noise"):
        loaders.load([source.at(0)])


def test_busy_loaders_repeat_their_loads_until_the_block_ends(tmp_path: Path) -> None:
    sources = [noise_file(tmp_path / f"{seed}", 100 * KIB, seed=seed) for seed in range(2)]
    with cpu_arena() as arena, running_loaders(arena, count=2) as loaders:
        with loaders.kept_busy([source.at(i * MIB) for i, source in enumerate(sources)]) as done:
            loaders.wait(lambda: len(done) > 20, "many loads are done")
        assert set(done) == {100 * KIB}
        count = len(done)
        loaders.load([sources[0].at(0)])
        assert len(done) == count


def test_plain_reads_bring_the_same_bytes(tmp_path: Path) -> None:
    source = noise_file(tmp_path / "noise", 300 * KIB + 7)
    with cpu_arena() as arena:
        reader = RawReader(source, arena.fds()[0], chunk_bytes=64 * KIB, threads=2)
        try:
            assert reader.read() > 0
            assert source.is_at(np.frombuffer(arena_bytes(arena, 0, source.size_bytes), np.uint8))
        finally:
            reader.close()


def test_a_random_blob_is_one_of_the_store_s(tmp_path: Path) -> None:
    signature = sd15(narrow=True).signatures["unet"]
    record = random_blob(tmp_path / "blob", signature)
    header = read_header(tmp_path / "blob")
    assert (header.data_size_bytes, header.data_start_bytes) == (
        signature.size_bytes,
        record.data_start_bytes,
    )

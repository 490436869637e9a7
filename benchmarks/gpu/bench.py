"""What every section works with: the device, the scale, a folder, and the parts under test."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from benchmarks.gpu.runner import Skip
from benchmarks.loaders import DEFAULTS, Loaders, running_loaders
from understudyd.loader.cuda import Cuda, load_driver
from understudyd.shell.host_pool import HostPool
from understudyd.shell.loading import LoaderSettings
from understudyd.shell.memory import Arena, CpuArena
from understudyd.shell.memory_cuda import CudaArena
from understudyd.store.store import Store

if TYPE_CHECKING:
    from benchmarks.real_size import Architecture

T = TypeVar("T")
MIB, GIB = 1 << 20, 1 << 30
KINDS = ("sd15", "sdxl")
TINY_SIDE = 8  # latent pixels


@dataclass(frozen=True, slots=True)
class Bench:
    """`device` is "cuda" or "cpu", `size` "real" or "tiny"; `work` holds store and files for the while."""

    device: str
    size: str
    work: Path

    @property
    def is_cuda(self) -> bool:
        """There is a GPU under test."""
        return self.device == "cuda"

    def pick(self, real: T, tiny: T) -> T:
        """One of two by the size."""
        return real if self.size == "real" else tiny

    # -- weights ------------------------------------------------------------------------------------

    def architecture(self, kind: str) -> "Architecture":
        """Stable Diffusion 1.5 or SDXL, real or narrow."""
        from benchmarks.real_size import sd15, sdxl  # diffusers, which half of the sections do without

        if self.size == "real":
            return {"sd15": sd15, "sdxl": sdxl}[kind]()
        return {"sd15": sd15, "sdxl": sdxl}[kind](narrow=True, sample_size=TINY_SIDE)

    def dtypes(self, kind: str) -> dict[str, torch.dtype]:
        """Each component's dtype: fp16, but on the CPU, which is slow at it, only what must be upcast."""
        parts = self.architecture(kind).builders
        if self.is_cuda:
            return dict.fromkeys(parts, torch.float16)
        return dict.fromkeys(parts, torch.float32) | ({"vae": torch.float16} if kind == "sdxl" else {})

    def store(self) -> Store:
        """The models that the section `weights` made: "sd15-a", "sd15-b", "sdxl-a", "sdxl-b"."""
        return Store.open(self.work / "store", writable=True)

    # -- the parts under test -----------------------------------------------------------------------

    @property
    def gpu_uuid(self) -> str:
        """The GPU as loaders are told it; empty on the CPU."""
        return Cuda(load_driver()).device(0)[1] if self.is_cuda else ""

    @contextlib.contextmanager
    def arena(self, size_bytes: int) -> Iterator[Arena]:
        """An arena of at least this size."""
        whole_bytes = -(-size_bytes // 4096) * 4096
        arena: Arena = CudaArena(whole_bytes, 0) if self.is_cuda else CpuArena(whole_bytes)
        try:
            yield arena
        finally:
            arena.close()

    def loaders(
        self,
        arena: Arena,
        *,
        count: int = 1,
        settings: LoaderSettings = DEFAULTS,
        host_pool: HostPool | None = None,
    ) -> AbstractContextManager[Loaders]:
        """Loaders at work on this arena."""
        return running_loaders(
            arena, count=count, settings=settings, host_pool=host_pool, gpu_uuid=self.gpu_uuid
        )

    @contextlib.contextmanager
    def host_pool(self, size_bytes: int) -> Iterator[HostPool]:
        """A host pool."""
        pool = HostPool(size_bytes)
        try:
            yield pool
        finally:
            pool.close()

    # -- looking at it ------------------------------------------------------------------------------

    def content(self, arena: Arena, offset: int, size_bytes: int) -> "np.ndarray[Any, np.dtype[np.uint8]]":
        """What is in the arena now."""
        content: np.ndarray[Any, np.dtype[np.uint8]] = (
            arena.tensor()[offset : offset + size_bytes].cpu().numpy()
        )
        return content

    def synchronise(self) -> None:
        """The device has finished."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def need(self, size_bytes: int) -> None:
        """Raises `Skip` when the GPU has less than this free."""
        if self.is_cuda and self.free_bytes() < size_bytes:
            raise Skip(f"this needs {size_bytes / GIB:.1f} GiB of free GPU memory")

    def free_bytes(self) -> int:
        """Free memory of the GPU, 0 on the CPU. The first call makes this process's own context."""
        return int(torch.cuda.mem_get_info()[0]) if self.is_cuda else 0


def gbps(size_bytes: int, seconds: float) -> float:
    """Rate in GB (1e9 bytes) per second."""
    return size_bytes / seconds / 1e9

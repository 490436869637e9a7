"""What it costs to pin shared host memory, per GB: cold pages, pages that are there, and letting go."""

import ctypes
import mmap
import os
import time
from typing import Any

import torch

from benchmarks.gpu.bench import GIB, Bench
from benchmarks.gpu.runner import Skip
from understudyd.loader.cuda import Cuda, load_driver

PIECES = 2


def register_memory(bench: Bench) -> dict[str, Any]:
    """Pieces of 1 GiB of a memfd, as loaders register the host pool."""
    if not bench.is_cuda:
        raise Skip("there is nothing to pin memory for")
    torch.empty(1, device="cuda")  # makes the primary context this thread's
    cuda = Cuda(load_driver())
    fd = os.memfd_create("pieces")
    os.ftruncate(fd, PIECES * GIB)
    mapping = mmap.mmap(fd, PIECES * GIB)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    cold = [_register_s(cuda, address + i * GIB) for i in range(PIECES)]
    warm = [_register_s(cuda, address + i * GIB) for i in range(PIECES)]
    per_gb = 1e9 / GIB / PIECES
    return {
        "piece_bytes": GIB,
        "register_cold_s_per_gb": sum(taken for taken, _ in cold) * per_gb,
        "register_s_per_gb": sum(taken for taken, _ in warm) * per_gb,
        "unregister_s_per_gb": sum(given for _, given in warm) * per_gb,
    }


def _register_s(cuda: Cuda, address: int) -> tuple[float, float]:
    started_s = time.monotonic()
    cuda.call("cuMemHostRegister", address, GIB, 0)
    registered_s = time.monotonic()
    cuda.call("cuMemHostUnregister", address)
    return registered_s - started_s, time.monotonic() - registered_s

"""Which machine this is."""

import os
import platform
from importlib import metadata
from typing import Any

import torch

from benchmarks.gpu.bench import Bench
from understudyd.loader.cuda import Cuda, CudaError, load_driver
from understudyd.shell.memory import memory_available_bytes

_PACKAGES = ("torch", "diffusers", "transformers", "cuda-bindings", "msgspec", "xxhash", "understudy")


def describe_machine() -> dict[str, Any]:
    """Processors, memory, kernel and versions."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_available_bytes": memory_available_bytes(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def find_gpu(bench: Bench) -> dict[str, Any]:
    """`{"gpu": ...}`, None without one, and then `why`. Uses the GPU: run it in a process of its own."""
    if not bench.is_cuda:
        return {"gpu": None, "why": "the CPU was asked for"}
    if not torch.cuda.is_available():
        build = "for the CPU only" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
        return {"gpu": None, "why": f"torch sees no NVIDIA GPU here (this torch is built {build})"}
    found = torch.cuda.get_device_properties(0)
    free_bytes, total_bytes = torch.cuda.mem_get_info(0)
    gpu = {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "total_bytes": total_bytes,
        "free_bytes": free_bytes,
        "cuda": torch.version.cuda,
    }
    try:
        cuda = Cuda(load_driver())
        gpu |= {"uuid": cuda.device(0)[1], "driver": cuda.call("cuDriverGetVersion")}
    except CudaError as error:  # the sections will fail and say the same
        gpu["driver"] = str(error)
    return {"gpu": gpu}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""

"""What people run today instead of a daemon: small, honest programs for `benchmarks.compare`.

Each serves the same requests at the same times in one process, first come, first served, and computes as
diffusers does. They differ in how a pipeline comes to be there: see `keepers.py`.
"""

ON_ANY_DEVICE = ("per_switch", "lru", "background_thread")
ON_A_GPU = ("cpu_offload",)


def names(device: str) -> tuple[str, ...]:
    """Those that mean something on this device."""
    return (*ON_ANY_DEVICE, *(ON_A_GPU if device == "cuda" else ()))

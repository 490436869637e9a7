"""The round trip that a loader must make through the arena before it is trusted with loads.

Parent and loader each write a pattern that only they wrote, and find the other's: the memory that one fills
is the memory that the other reads. Some containers map a wrong or a stale allocation without an error.
"""

import random

import xxhash

PROOF_BYTES = 64 * 1024
PROOF_AREA_BYTES = 2 * 1024 * 1024
"""Behind the arena: room for a proof per slot of the loader pool."""


def pattern(seed: int, size_bytes: int) -> bytes:
    """The bytes that `seed` stands for."""
    return random.Random(seed).randbytes(size_bytes)  # noqa: S311 nobody is to be kept from guessing it


def holds(content: bytes | bytearray | memoryview, seed: int) -> bool:
    """Whether these bytes are the pattern of `seed`."""
    return xxhash.xxh3_64_intdigest(content) == xxhash.xxh3_64_intdigest(pattern(seed, len(content)))

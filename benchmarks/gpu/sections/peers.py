"""A load beside what others load with: the UNet of Stable Diffusion 1.5 from the page cache onto the device.

Ours by one loader, from the file and from the host pool; the limit is one large pinned copy. Peers are those
of `benchmarks.load`, a process each, told to load to the device; what is not installed is absent. All take
turns, and every arrival is compared by checksum.
"""

import sys
from typing import Any

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.sections.rates import pinned_copy
from benchmarks.load import (
    OURS,
    RAW,
    Contestant,
    PeerProcess,
    WrongBytes,
    file_digest,
    rates,
    read_pages,
    write_unet,
)
from benchmarks.load_peers import PEERS

FROM_POOL = "understudy_from_pool"
PINNED_TARGET, PEER_TARGET = 0.9, 2.0


def compare_peers(bench: Bench) -> dict[str, Any]:
    """GB (1e9 bytes) per second, medians."""
    folder = bench.work / "peers"
    folder.mkdir()
    source, scene = write_unet("sd15", folder, narrow=bench.size == "tiny", device=bench.device)
    peers = [PeerProcess(name, scene, sys.executable) for name in peer_names()]
    try:
        for peer in peers:
            peer.wait_ready()
        there = [peer for peer in peers if peer.absent is None]
        with (
            bench.arena(source.size_bytes) as arena,
            bench.host_pool(source.size_bytes) as pool,
            bench.loaders(arena, host_pool=pool) as loaders,
        ):
            loaders.load([source.at(0, pool_offset=0)])  # verifies the checksums

            def ours(**route: Any) -> float:
                arena.tensor().zero_()
                bench.synchronise()
                seconds = loaders.load([source.at(0, **route)])
                if not source.is_at(bench.content(arena, 0, source.size_bytes)):
                    raise WrongBytes("the arena holds other bytes than the file's")
                return seconds

            expected = file_digest(source.path)
            all_ = {
                OURS: Contestant(source.path, ours),
                RAW: Contestant(source.path, pinned_copy(bench, arena, source)),
                FROM_POOL: Contestant(source.path, lambda: ours(pool_offset=0, from_pool=True)),
            }
            for peer in there:
                all_[peer.name] = Contestant(peer.file, lambda peer=peer: peer.load(expected))  # type: ignore[misc]
            for one in all_.values():
                one.load()
            found = rates(all_, source.size_bytes, bench.pick(3, 1), read_pages)
    finally:
        for peer in peers:
            peer.close()
    return summary(found) | {"absent": {peer.name: peer.absent for peer in peers if peer.absent is not None}}


def peer_names() -> list[str]:
    """Those that bring weights onto a device; mappings of the file mean something on the CPU only."""
    return [name for name, peer in PEERS.items() if not peer.mapped]


def summary(found: dict[str, float]) -> dict[str, Any]:
    """Ours, the limit, the others; both ratios, and whether they are what they are to be."""
    peers = {name: rate for name, rate in found.items() if name in PEERS}
    best_gbps = max(peers.values(), default=0.0)
    document: dict[str, Any] = {
        "understudy_gbps": found[OURS],
        "understudy_from_pool_gbps": found[FROM_POOL],
        "pinned_copy_gbps": found[RAW],
        "ratio_pinned": found[FROM_POOL] / found[RAW],
        "peers": peers,
        "ratio_best_peer": found[OURS] / best_gbps if best_gbps else None,
    }
    targets = {f"pool_of_pinned_at_least_{PINNED_TARGET}": document["ratio_pinned"] >= PINNED_TARGET}
    if best_gbps:
        targets[f"times_best_peer_at_least_{PEER_TARGET:g}"] = document["ratio_best_peer"] >= PEER_TARGET
    return document | {"targets": targets}

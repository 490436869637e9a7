"""A daemon whose pipelines do nothing, for `benchmarks.wire`: its store, its settings."""

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from benchmarks.kit import DaemonProcess, DaemonSettings, running_daemon, say
from understudy import admin

NOTHING, STEPS = "nothing", "steps"
OTHERS = tuple(f"other-{number:02d}" for number in range(24))
_ROOT = Path(__file__).parent.parent
_ENTRY_POINTS = """[understudy.pipelines]
nothing = benchmarks.wire_pipelines:Nothing
steps = benchmarks.wire_pipelines:Steps
"""
# A thousand requests of one client may wait; nothing else differs from what operators have.
_ROOM = {
    "UNDERSTUDY__QUEUE__MAX_WAITING": "4000",
    "UNDERSTUDY__SERVER__MAX_OPEN_PER_CLIENT": "4000",
    "UNDERSTUDY__SERVER__MAX_OPEN_PER_USER": "8000",
}


@dataclass(frozen=True, slots=True)
class Scene:
    """A daemon that listens on both, `tcp` on the loopback interface."""

    daemon: DaemonProcess
    ipc: str
    tcp: str


@contextlib.contextmanager
def daemon_in(folder: Path) -> Iterator[Scene]:
    """Make the models and start the daemon; `others` are models of one architecture with room for all."""
    site = folder / "site"
    _install(site)
    store, size_bytes = _make_store(folder, site)
    paths = [str(site), str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    tcp = f"tcp://127.0.0.1:{free_port()}"
    environ = _ROOM | {
        "PYTHONPATH": os.pathsep.join(paths),
        "UNDERSTUDY__SERVER__ENDPOINTS": f'["{tcp}"]',
        "UNDERSTUDY__STAGE__WARM_UP": "false",  # the other models are never asked for
        "OMP_NUM_THREADS": "1",
    }
    settings = DaemonSettings(
        store=store, runtime_dir=folder / "run", arena_bytes=size_bytes, loaders=1, prefetch=False
    )
    with mock.patch.dict(os.environ, environ), running_daemon(settings, folder) as daemon:
        for name in (NOTHING, STEPS):
            daemon.ask(admin.Pin(name=name))
        yield Scene(daemon, daemon.endpoint, tcp)


def _install(site: Path) -> None:
    """What an installer leaves of a package besides its modules."""
    info = site / "wire_pipelines-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: wire-pipelines\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(_ENTRY_POINTS)


def _make_store(folder: Path, site: Path) -> tuple[Path, int]:
    """Its path, and an arena's size that holds all of it."""
    import torch
    from safetensors.torch import save_file

    from benchmarks.real_size import sd15
    from benchmarks.real_store import publish
    from benchmarks.wire_pipelines import Nothing, Steps
    from understudyd.store.ingest import IngestOptions, ingest_many
    from understudyd.store.store import Store

    store = Store.open(folder / "store", writable=True)
    sys.path.insert(0, str(site))
    try:
        for name, made in ((NOTHING, Nothing), (STEPS, Steps)):
            (folder / name).mkdir()
            for part, build in made.components({}).items():
                save_file(build().state_dict(), folder / name / f"{part}.safetensors")
            ingest_many(store, [(name, folder / name)], IngestOptions(pipeline=name))
    finally:
        sys.path.remove(str(site))
    architecture = sd15(narrow=True)
    dtypes = dict.fromkeys(architecture.builders, torch.float16)
    for seed, name in enumerate(OTHERS):
        publish(store, architecture, name, seed=seed, dtypes=dtypes)
    blobs = {part.blob.sha256: part.blob.size_bytes for r in store.models().values() for part in r.components}
    say(f"  {len(blobs)} blobs of {sum(blobs.values()) / 1e6:.0f} MB")
    return store.path, sum(blobs.values()) + (16 << 20)


def free_port() -> int:
    """One that nobody had a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

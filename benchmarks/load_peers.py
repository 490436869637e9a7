"""What others load the same weights with: `python -m benchmarks.load_peers NAME FOLDER DEVICE`.

Every peer is a process of its own, used as its own documentation shows for a local file and the device, and
ends with every tensor of the file in memory that stays when file and loader are gone. Import, and the writing
of a format of its own, are no part of a load. The parent writes a line for each load it wants; the answers
are lines of JSON.
"""

import contextlib
import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import xxhash

from understudyd.store.safetensors_file import PAD_PREFIX

Tensors: TypeAlias = Mapping[str, Any]

PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Scene:
    """`folder` is what `from_pretrained` reads, `file` the weights in it; `device` is "cpu" or "cuda"."""

    folder: Path
    device: str = "cpu"

    @property
    def file(self) -> Path:
        return self.folder / "diffusion_pytorch_model.safetensors"

    @property
    def tensorized(self) -> Path:
        """The same tensors as tensorizer writes them."""
        return self.folder / "model.tensors"


@dataclass(frozen=True, slots=True)
class Peer:
    """`package` is what must be installed; `prepare` makes files that a load needs, once.

    A `mapped` one leaves the weights in the page cache, behind a mapping of the file, where they neither stay
    nor are copied: it is shown beside the others, not compared with.
    """

    package: str
    load: Callable[[Scene], Tensors]
    prepare: Callable[[Scene], None] = lambda scene: None
    file: Callable[[Scene], Path] = lambda scene: scene.file
    environ: Mapping[str, str] | None = None
    mapped: bool = False


def _safetensors(scene: Scene) -> Tensors:
    """`load_file`. On the CPU its tensors are views of a mapped file: what shall stay is copied."""
    from safetensors.torch import load_file

    loaded: Tensors = load_file(scene.file, device=scene.device)
    return loaded if scene.device != "cpu" else {name: tensor.clone() for name, tensor in loaded.items()}


def _safetensors_pread(scene: Scene) -> Tensors:
    """Its other backend reads into memory of its own."""
    from safetensors.torch import load_file

    loaded: Tensors = load_file(scene.file, device=scene.device, backend="pread")
    return loaded


def _safetensors_mapped(scene: Scene) -> Tensors:
    from safetensors.torch import load_file

    tensors = load_file(scene.file)
    _touch(tensors)
    return dict(tensors)


def _fastsafetensors(scene: Scene) -> Tensors:
    """https://github.com/foundation-model-stack/fastsafetensors: the loader without GPU Direct Storage."""
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    device = "cuda:0" if scene.device == "cuda" else scene.device
    loader = SafeTensorsFileLoader(SingleGroup(), device, nogds=True)
    loader.add_filenames({0: [str(scene.file)]})
    buffers = loader.copy_files_to_device()
    tensors = {name: buffers.get_tensor(name) for name in loader.get_keys()}
    if scene.device == "cpu":
        _touch(tensors)  # they own the memory by now
    else:
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # the buffers own it
    buffers.close()
    loader.close()
    return tensors


def _runai(scene: Scene) -> Tensors:
    """https://github.com/run-ai/runai-model-streamer: tensors that the streamer yields are the caller's."""
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_file(str(scene.file))
        return {name: tensor.to(scene.device) for name, tensor in streamer.get_tensors()}


def _tensorizer(scene: Scene) -> Tensors:
    """https://github.com/coreweave/tensorizer: its own format, and as many readers as it chooses."""
    from tensorizer import TensorDeserializer

    with TensorDeserializer(str(scene.tensorized), device=scene.device) as tensors:
        return dict(tensors)


def _write_tensorized(scene: Scene) -> None:
    if scene.tensorized.exists():
        return
    from safetensors.torch import load_file
    from tensorizer import TensorSerializer

    serializer = TensorSerializer(str(scene.tensorized))
    serializer.write_state_dict(load_file(scene.file))
    serializer.close()
    fd = os.open(scene.tensorized, os.O_RDONLY)
    os.fsync(fd)  # what was never written cannot leave the page cache
    os.close(fd)


def _from_pretrained(scene: Scene) -> Tensors:
    """The whole module. On the CPU its tensors are views of the mapped file: they are copied to stay.

    (With `disable_mmap=True`, which has diffusers make the copies, it takes eight times as long.)
    """
    if scene.device != "cpu":
        moved: Tensors = _module(scene).to(scene.device).state_dict()
        return moved
    return {name: tensor.clone() for name, tensor in _module(scene).state_dict().items()}


def _from_pretrained_mapped(scene: Scene) -> Tensors:
    """The same as it comes, every tensor touched."""
    tensors: Tensors = _module(scene).state_dict()
    _touch(tensors)
    return tensors


def _module(scene: Scene) -> Any:
    import torch
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(scene.folder, torch_dtype=torch.float16)


def _touch(tensors: Tensors) -> None:
    """Read a byte of every page."""
    import torch

    for tensor in tensors.values():
        tensor.reshape(-1).view(torch.uint8)[::PAGE_BYTES].sum()


PEERS: dict[str, Peer] = {
    "safetensors": Peer("safetensors", _safetensors),
    "safetensors_pread": Peer("safetensors", _safetensors_pread),
    "fastsafetensors": Peer("fastsafetensors", _fastsafetensors),
    "fastsafetensors_buffered": Peer(
        "fastsafetensors", _fastsafetensors, environ={"FASTSAFETENSORS_ODIRECT": "0"}
    ),
    "runai_model_streamer": Peer("runai_model_streamer", _runai),
    "tensorizer": Peer("tensorizer", _tensorizer, _write_tensorized, lambda scene: scene.tensorized),
    "from_pretrained": Peer("diffusers", _from_pretrained),
    "safetensors_mapped": Peer("safetensors", _safetensors_mapped, mapped=True),
    "from_pretrained_mapped": Peer("diffusers", _from_pretrained_mapped, mapped=True),
}


def digest(tensors: Tensors) -> str:
    """One checksum over names and bytes, in the order of the names, padding left out."""
    import torch

    state = xxhash.xxh3_128()
    for name in sorted(tensors):
        if not name.startswith(PAD_PREFIX):
            state.update(name.encode())
            flat = tensors[name].detach().contiguous().reshape(-1).view(torch.uint8)
            state.update(flat.cpu().numpy().data)
    return state.hexdigest()


def _arrive(scene: Scene) -> None:
    """Copies to a GPU have ended."""
    if scene.device != "cpu":
        import torch

        torch.cuda.synchronize()


def main() -> None:
    """Say whether it is there, then load once for each line that comes."""
    peer, scene = PEERS[sys.argv[1]], Scene(Path(sys.argv[2]), sys.argv[3])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print; the answers are ours alone

    def answer(document: Mapping[str, Any]) -> None:
        print(json.dumps(document), file=answers, flush=True)

    os.environ.update(peer.environ or {})
    try:
        for package in ("torch", peer.package):
            importlib.import_module(package)
    except ImportError as error:
        answer({"absent": str(error)})
        return
    if peer.package == "diffusers":
        from diffusers import UNet2DConditionModel  # noqa: F401 the class is imported when first asked for
    peer.prepare(scene)
    answer({"file": str(peer.file(scene))})
    with contextlib.suppress(KeyboardInterrupt):
        for _ in sys.stdin:
            started_s = time.monotonic()
            tensors = peer.load(scene)
            _arrive(scene)
            seconds = time.monotonic() - started_s
            answer({"seconds": seconds, "digest": digest(tensors)})
            del tensors
            gc.collect()  # some hold their buffers in cycles


if __name__ == "__main__":
    main()

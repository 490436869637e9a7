"""Four ways to have the pipeline of the next request: each has one method of interest, `bring`.

All of them read with `from_pretrained` and count what they hold in bytes of weights, against the same budget
that the daemon's arena has.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch


@dataclass(frozen=True, slots=True)
class Means:
    """What every keeper is given. `load` reads a model's pipeline from disk to `device` and notes when."""

    folders: Mapping[str, Path]
    budget_bytes: int
    device: str
    load: Callable[[str], Any]


class Keeper(Protocol):
    """Has pipelines. `upcoming` are the models of the requests that have arrived after this one, in order."""

    def bring(self, model: str, upcoming: Sequence[str]) -> Any:
        """The pipeline, ready to compute on the device."""


class PerSwitch:
    """One pipeline at a time: `from_pretrained` whenever another model is wanted."""

    def __init__(self, means: Means) -> None:
        self._means = means
        self._model = ""
        self._pipeline: Any = None

    def bring(self, model: str, upcoming: Sequence[str]) -> Any:
        """See `Keeper`."""
        if model != self._model:
            self._pipeline = None  # two at a time may be more than there is room for
            self._pipeline, self._model = self._means.load(model), model
        return self._pipeline


class Lru:
    """As many pipelines as the budget holds; the one that was not used for longest goes."""

    def __init__(self, means: Means) -> None:
        self._means = means
        self._held: OrderedDict[str, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def bring(self, model: str, upcoming: Sequence[str]) -> Any:
        """See `Keeper`."""
        if (pipeline := self.held(model)) is None:
            self.make_room()
            self.keep(model, pipeline := self._means.load(model))
        return pipeline

    def held(self, model: str) -> Any:
        """The pipeline if it is here; it was used just now then."""
        with self._lock:
            if model not in self._held:
                return None
            self._held.move_to_end(model)
            return self._held[model][0]

    def make_room(self) -> None:
        """For one more of the size of the largest so far, before it is read."""
        with self._lock:
            largest = max((size for _, size in self._held.values()), default=0)
            self._trim(self._means.budget_bytes - largest)

    def keep(self, model: str, pipeline: Any) -> None:
        """Hold one more."""
        with self._lock:
            self._held[model] = (pipeline, weights_bytes(pipeline))
            self._trim(self._means.budget_bytes)

    def _trim(self, most_bytes: int) -> None:
        while len(self._held) > 1 and sum(size for _, size in self._held.values()) > most_bytes:
            self._held.popitem(last=False)


class BackgroundThread:
    """The LRU, and a thread of the same process that reads the next model in the queue meanwhile.

    One load at a time: `from_pretrained` in two threads at once leaves tensors on the meta device, since the
    libraries patch `torch.nn.Module` of the whole process while they build one (seen with transformers 5).
    """

    def __init__(self, means: Means) -> None:
        self._loading = threading.Lock()
        self._load = means.load
        self._means = replace(means, load=self._load_alone)
        self._lru = Lru(self._means)
        self._thread = ThreadPoolExecutor(1, "load")
        self._coming: dict[str, Future[None]] = {}

    def bring(self, model: str, upcoming: Sequence[str]) -> Any:
        """See `Keeper`."""
        if (coming := self._coming.pop(model, None)) is not None:
            coming.result()
        pipeline = self._lru.bring(model, upcoming)
        for other in upcoming:
            if other != model and other not in self._coming and self._lru.held(other) is None:
                if not self._coming:  # one at a time: two share the interpreter, too
                    self._coming[other] = self._thread.submit(self._fetch, other)
                break
        self._lru.held(model)  # what is computed with goes last
        return pipeline

    def _load_alone(self, model: str) -> Any:
        with self._loading:
            return self._load(model)

    def _fetch(self, model: str) -> None:
        self._lru.make_room()
        self._lru.keep(model, self._means.load(model))


class CpuOffload:
    """Every pipeline in host memory; accelerate's hooks take a component to the GPU when it computes.

    Without a GPU there is nothing to offload from.
    """

    def __init__(self, means: Means) -> None:
        self._means = means
        self._held: dict[str, Any] = {}

    def bring(self, model: str, upcoming: Sequence[str]) -> Any:
        """See `Keeper`."""
        if model not in self._held:
            self._held[model] = self._means.load(model)
            self._held[model].enable_model_cpu_offload()
        return self._held[model]


def weights_bytes(pipeline: Any) -> int:
    """Bytes of the parameters and buffers of all components."""
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    tensors = {
        tensor.data_ptr(): tensor.nbytes
        for module in modules
        for tensor in (*module.parameters(), *module.buffers())
    }
    return sum(tensors.values())


KEEPERS: dict[str, Callable[[Means], Keeper]] = {
    "per_switch": PerSwitch,
    "lru": Lru,
    "background_thread": BackgroundThread,
    "cpu_offload": CpuOffload,
}

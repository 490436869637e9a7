"""What NVML says of the GPU: memory and utilisation. Without nvidia-ml-py, or without a GPU, nothing.

After the NVML API reference: `nvmlDeviceGetMemoryInfo` in bytes, `nvmlDeviceGetUtilizationRates` in percent
of the last sample period. NVML goes by UUID, like the driver: its numbers follow the bus, CUDA's the speed.
"""

import importlib
import logging
from collections.abc import Iterator
from typing import Any

from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_log = logging.getLogger(__name__)


def open_nvml() -> Any | None:
    """The module pynvml, ready for use; None where there is none, or no driver that it works with."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        _log.info("no metrics of the GPU: pip install 'understudy[cuda]' for nvidia-ml-py")
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        _log.warning("no metrics of the GPU: NVML does not start: %s", error)
        return None
    return nvml


class GpuCollector(Collector):
    """Asks NVML at every scrape; what it cannot tell is left out. `uuid` is "GPU-..."."""

    def __init__(self, nvml: Any, uuid: str) -> None:
        self._nvml = nvml
        self._uuid = uuid
        self._handle: Any = None

    def collect(self) -> Iterator[Metric]:
        """The GPU's families. Not on the event loop: NVML may take its time."""
        try:
            if self._handle is None:
                self._handle = self._nvml.nvmlDeviceGetHandleByUUID(self._uuid)
            families = [*self._memory(), *self._utilisation()]
        except self._nvml.NVMLError as error:
            _log.debug("NVML: %s", error)
            self._handle = None
            return
        yield from families

    def _memory(self) -> Iterator[Metric]:
        memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
        family = GaugeMetricFamily(
            "understudy_gpu_memory_bytes", "Memory of the GPU, of all processes.", labels=["gpu", "state"]
        )
        family.add_metric([self._uuid, "used"], memory.used)
        family.add_metric([self._uuid, "free"], memory.free)
        yield family

    def _utilisation(self) -> Iterator[Metric]:
        rates = self._nvml.nvmlDeviceGetUtilizationRates(self._handle)
        for name, percent, text in (
            ("understudy_gpu_utilisation_ratio", rates.gpu, "Share of time in which a kernel ran."),
            (
                "understudy_gpu_memory_utilisation_ratio",
                rates.memory,
                "Share of time in which its memory worked.",
            ),
        ):
            family = GaugeMetricFamily(name, text, labels=["gpu"])
            family.add_metric([self._uuid], percent / 100)
            yield family

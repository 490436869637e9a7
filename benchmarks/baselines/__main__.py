"""One baseline in a process of its own: `python -m benchmarks.baselines NAME WORK ANSWERS`.

Waits for the line "go" once its libraries are imported and it has painted one image.
"""

import hashlib
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import torch

from benchmarks.baselines import ON_A_GPU
from benchmarks.baselines.keepers import KEEPERS, Means
from benchmarks.compare_work import Answers, Painted, Spent, Work
from understudy_demo import baseline
from understudy_demo.workload import Request


class Server:
    """Serves requests at their times of arrival, or as soon after as it can."""

    def __init__(self, name: str, work: Work) -> None:
        self._work = work
        self._is_kept_on_host = name in ON_A_GPU
        self._loads: list[Spent] = []
        folders = {model: Path(folder) for model, folder in work.folders.items()}
        self._folders = folders
        self._keeper = KEEPERS[name](Means(folders, work.budget_bytes, work.device, self._load))

    def run(self) -> Answers:
        """All of the work."""
        origin_s = time.monotonic()
        painted = [self._serve(number, origin_s) for number in range(len(self._work.requests))]
        return Answers(painted=tuple(painted), loads=tuple(self._loads), memory_bytes=peak_bytes())

    def warm_up(self) -> None:
        """The first image of a process is slower than all others."""
        self._paint(self._keeper.bring(self._work.requests[0].model, ()), self._work.requests[0])
        self._loads.clear()

    def _serve(self, number: int, origin_s: float) -> Painted:
        request = self._work.requests[number]
        arrived_s = origin_s + request.at_s
        if (early_s := arrived_s - time.monotonic()) > 0:
            time.sleep(early_s)
        pipeline = self._keeper.bring(request.model, self._arrived(number + 1, origin_s))
        started_s = time.monotonic()
        image = self._paint(pipeline, request)
        ended_s = time.monotonic()
        digest = hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()
        return Painted(
            index=request.index, model=request.model, arrived_s=arrived_s, started_s=started_s,
            ended_s=ended_s, sha256=digest,
        )  # fmt: skip

    def _arrived(self, first: int, origin_s: float) -> list[str]:
        since_s = time.monotonic() - origin_s
        models = []
        for request in self._work.requests[first:]:
            if request.at_s > since_s:
                break
            models.append(request.model)
        return models

    def _paint(self, pipeline: Any, request: Request) -> Any:
        return baseline.paint(pipeline, request)

    def _load(self, model: str) -> Any:
        started_s = time.monotonic()
        dtype = {} if self._work.dtype is None else {"torch_dtype": getattr(torch, self._work.dtype)}
        pipeline = baseline.load(self._folders[model], **dtype)
        if not self._is_kept_on_host:
            pipeline.to(self._work.device)
        self._loads.append(Spent(name=model, started_s=started_s, ended_s=time.monotonic()))
        return pipeline


def peak_bytes() -> int:
    """The most resident memory that this process had; on a GPU also what it had there."""
    lines = Path("/proc/self/status").read_text().splitlines()
    host_bytes = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    return host_bytes + (torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0)


def main() -> None:
    """The command."""
    name, work_path, answers_path = sys.argv[1:]
    torch.set_num_threads(1)
    baseline.quiet()
    server = Server(name, msgspec.json.decode(Path(work_path).read_bytes(), type=Work))
    server.warm_up()
    print("ready", flush=True)
    sys.stdin.readline()
    Path(answers_path).write_bytes(msgspec.json.encode(server.run()))


if __name__ == "__main__":
    main()

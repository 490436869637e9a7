"""What every training run here needs: optimiser, smoothed weights, and checkpoints to go on from."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from train.muon import Muon

_WARM_UP_STEPS = 100


def lowest_priority(threads: int) -> None:
    """Be no burden to the machine's owner."""
    os.nice(19 - os.nice(0))
    torch.set_num_threads(threads)


class Checkpoint:
    """AdamW over a network, its schedule, and an exponential average of the weights, in one file.

    `learn` makes a step; the rate rises over the first steps and falls to zero along a cosine at `steps`.
    The average is what is used in the end: less noisy than the last step's weights.
    """

    def __init__(
        self, path: Path, network: nn.Module, *, rate: float, steps: int, smooth: float,
        decay: float = 0.01, matrices_apart: bool = False,
    ) -> None:  # fmt: skip
        self.path, self._network, self._rate, self._steps, self._smooth = path, network, rate, steps, smooth
        self._optimisers = _optimisers(network, rate, decay, matrices_apart)
        self.step, self.mean_loss = 0, 0.0
        self.restart()
        if path.exists():
            self._load()

    def restart(self) -> None:
        """The average starts from the network as it is."""
        self._average = {name: p.detach().clone() for name, p in self._network.state_dict().items()}

    def learn(self, loss: Tensor) -> None:
        """One step of the optimiser."""
        self._network.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._network.parameters(), 1.0)
        for optimiser in self._optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self._rate * self._share()
            optimiser.step()
        self.step += 1
        memory = min(self._smooth, self.step / (self.step + 10))
        for name, value in self._network.state_dict().items():
            if value.is_floating_point():
                self._average[name].lerp_(value, 1 - memory)
        self.mean_loss += 0.02 * (loss.item() - self.mean_loss) if self.step > 1 else loss.item()

    def _share(self) -> float:
        warm = min(1.0, (self.step + 1) / _WARM_UP_STEPS)
        return warm * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * min(1.0, self.step / self._steps)))))

    def report(self, name: str, seconds: float) -> None:
        """One line on where the training is."""
        print(f"{name} step {self.step} {seconds:.0f} s  loss {self.mean_loss:.4f}", flush=True)

    def save(self) -> None:
        """Write everything that going on needs; the old file stays whole until the new one is."""
        tensors = {f"network.{k}": v.contiguous() for k, v in self._network.state_dict().items()}
        tensors |= {f"average.{k}": v.contiguous() for k, v in self._average.items()}
        for number, optimiser in enumerate(self._optimisers):
            for index, state in optimiser.state_dict()["state"].items():
                place = f"optimiser.{number}.{index}"
                tensors |= {f"{place}.{k}": torch.as_tensor(v).contiguous() for k, v in state.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        half = self.path.with_suffix(".half")
        save_file(tensors, half, {"step": str(self.step), "loss": str(self.mean_loss)})
        half.replace(self.path)

    def _load(self) -> None:
        with safe_open(self.path, "pt") as file:
            self.step, self.mean_loss = int(file.metadata()["step"]), float(file.metadata()["loss"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self._network.load_state_dict(_below("network.", tensors))
        self._average = _below("average.", tensors)
        for number, optimiser in enumerate(self._optimisers):
            state: dict[int, dict[str, Tensor]] = {}
            for name, value in _below(f"optimiser.{number}.", tensors).items():
                index, _, key = name.partition(".")
                state.setdefault(int(index), {})[key] = value
            optimiser.load_state_dict(optimiser.state_dict() | {"state": state})

    @staticmethod
    def smoothed(path: Path) -> dict[str, Tensor]:
        """The averaged weights of a checkpoint."""
        with safe_open(path, "pt") as file:
            return _below("average.", {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


def _optimisers(network: nn.Module, rate: float, decay: float, matrices_apart: bool) -> list[Any]:
    """AdamW for all, or for what is no matrix, with Muon for the matrices; embeddings are no matrices."""
    embeddings = {id(m.weight) for m in network.modules() if isinstance(m, nn.Embedding)}
    trained = [p for p in network.parameters() if p.requires_grad]
    matrices = [p for p in trained if matrices_apart and p.ndim >= 2 and id(p) not in embeddings]
    chosen = {id(p) for p in matrices}
    rest = [p for p in trained if id(p) not in chosen]
    adam = torch.optim.AdamW(rest, rate, betas=(0.9, 0.99), weight_decay=decay)
    return [adam, *([Muon(matrices, rate)] if matrices else [])]


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}

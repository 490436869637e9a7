"""Muon (Jordan et al. 2024): momentum whose singular values are all made one, for matrices and kernels."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_A, _B, _C = 3.4445, -4.7750, 2.0315  # of the quintic Newton-Schulz iteration, from the same source


class Muon(torch.optim.Optimizer):
    """For parameters of two or more dimensions; a kernel counts as a matrix with its outputs as rows.

    Updates are scaled to the size of AdamW's (Liu et al. 2025, arXiv 2502.16982), so that both share a rate.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update from the gradients that are there; matrices of one shape are worked on together."""
        for group in self.param_groups:
            alike: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    ahead = self._ahead(parameter, group["momentum"]).reshape(len(parameter), -1)
                    alike[tuple(ahead.shape)].append((parameter, ahead))
            for shape, pairs in alike.items():
                changes = _orthogonal(torch.stack([ahead for _, ahead in pairs]))
                rate = group["lr"] * 0.2 * max(shape) ** 0.5
                for (parameter, _), change in zip(pairs, changes, strict=True):
                    parameter.add_(change.reshape(parameter.shape), alpha=-rate)

    def _ahead(self, parameter: Tensor, momentum: float) -> Tensor:
        """Nesterov's look ahead along the mean gradient."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        mean: Tensor = state.setdefault("mean", torch.zeros_like(parameter))
        mean.lerp_(gradient, 1 - momentum)
        return gradient.lerp(mean, momentum)


def _orthogonal(matrices: Tensor) -> Tensor:
    """Of each of k x rows x columns."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).to(torch.bfloat16)
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = _A * x + (_B * square + _C * square @ square) @ x
    return (x.mT if tall else x).float()

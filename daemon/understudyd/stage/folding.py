"""Folding adapters into weights, bit for bit as PEFT merges them, without touching the base.

What `pipeline.load_lora_weights`, `set_adapters(names, scales)` and `fuse_lora(adapter_names=names)` do to
one weight W, for each adapter in turn (peft/tuners/lora/layer.py: `Linear.get_delta_weight`, `_ConvNd`,
`merge`):

* A and B are rounded to W's dtype, as PEFT does when it injects them;
* B @ A, in float32 for half types on the CPU; for convolutions larger than 1x1 `conv(A^T, B)^T`;
* times scale * alpha / rank, computed in this order; or scale * alpha / sqrt(rank);
* rounded to W's dtype, and only then added.

`fuse_lora(lora_scale=s)` multiplies the finished scaling by s once more, which may round differently from a
scale of s; requests name scales, so that is not offered. Where `safe_fusing=True` raises, `NotFinite` is
raised here.

Equality holds for equal numbers of threads: 3x3 convolutions with few input channels differ between one and
two (measured), whatever fuses them. `FoldProducts` convolves with one number always.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from understudyd.core.types import ErrorCode
from understudyd.stage.errors import StageError
from understudyd.stage.fold_products import FoldProducts
from understudyd.stage.views import DTYPES, WeightArena
from understudyd.store.adapters.overlays import FoldedWeight, OverlayPlan
from understudyd.store.adapters.records import TargetRecord
from understudyd.store.records import TensorRecord

_HALF_TYPES = (torch.float16, torch.bfloat16)


class NotFinite(StageError):
    """A folded weight holds infinities or NaN; the message names weight and adapter."""

    code = ErrorCode.BAD_REQUEST


@dataclass(frozen=True, slots=True)
class FoldPart:
    """What an adapter adds to a weight: `up` [out, rank, ...] @ `down` [rank, in, ...] times `scaling`."""

    down: Tensor
    up: Tensor
    scaling: float


def fold(base: Tensor, parts: Sequence[FoldPart], out: Tensor, products: FoldProducts | None = None) -> None:
    """Write `base` plus every part, in order, to `out` (of base's shape and dtype, not overlapping it).

    Raises `NotFinite` when the result is not; `out` then holds it all the same.
    """
    for _ in _steps(base, parts, out, products or FoldProducts()):
        pass
    if not is_finite(out):
        raise NotFinite("the folded weight is not finite: a scale is too large, or the adapter is broken")


def _steps(base: Tensor, parts: Sequence[FoldPart], out: Tensor, products: FoldProducts) -> Iterator[None]:
    if not parts:
        out.copy_(base)
    folded = base
    for part in parts:
        _add(part, folded, out, products)
        folded = out
        yield


def _add(part: FoldPart, weight: Tensor, out: Tensor, products: FoldProducts) -> None:
    """Write `weight` plus the part to `out`, which may be `weight`."""
    dtype = weight.dtype
    down, up = part.down.to(dtype), part.up.to(dtype)
    if weight.device.type == "cpu" and dtype in _HALF_TYPES:
        down, up = down.float(), up.float()
    if weight.dim() == 2 or weight.shape[2:] == (1, 1):
        is_free = out is not weight and down.dtype == dtype
        weight, out = weight.flatten(1), out.flatten(1)
        pieces = products.pieces(up.flatten(1), down.flatten(1), out if is_free else None)
    else:
        pieces = iter([(slice(None), products.convolution(up, down))])
    for rows, product in pieces:
        if part.scaling != 1.0:
            product.mul_(part.scaling)
        torch.add(weight[rows], product.to(dtype), out=out[rows])  # rounded twice, as PEFT does


def scaling_of(target: TargetRecord, scale: float) -> float:
    """What B @ A is multiplied by: PEFT's `set_scale`, in its order, in the dtype that alpha is kept in."""
    divisor = math.sqrt(target.rank) if target.is_rank_stabilised else target.rank
    if target.alpha_dtype is None:
        return scale * target.alpha / divisor
    return float(scale * torch.tensor(target.alpha, dtype=DTYPES[target.alpha_dtype]) / divisor)


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is infinite or NaN. One pass without a temporary.

    A finite sum has finite summands. It may overflow where no element does; then both extremes tell, which
    propagate NaN and take three times as long.
    """
    if math.isfinite(tensor.sum().item()):
        return True
    low, high = torch.aminmax(tensor)
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _is_harmless(parts: Sequence[FoldPart], base: Tensor) -> bool:
    """Whether parts are so small for sure that a finite weight stays finite; False where it takes a look.

    What is less than half a step between the largest numbers of a type does not carry one past them. The
    factors are a small part of the weight, and looking at them a small part of looking at it. On a GPU asking
    takes longer than looking. Infinities that the base has itself are not the adapters' doing.
    """
    if base.device.type != "cpu":
        return False
    limit = torch.finfo(base.dtype).max * torch.finfo(base.dtype).eps / 8
    total = 0.0
    for part in parts:
        up, down = float(part.up.abs().max()), float(part.down.abs().max())
        if not (up <= limit and down <= limit):  # NaN is neither
            return False
        total += max(1.0, abs(part.scaling)) * part.down.shape[0] * up * down
    return bool(total <= limit)


# -- a whole overlay -------------------------------------------------------------------------------


class FoldMemory(Protocol):
    """Where the tensors of one fold are."""

    def base(self, record: TensorRecord) -> Tensor:
        """A weight of the base component; it is only read."""

    def factor(self, adapter: int, record: TensorRecord) -> Tensor:
        """A factor of the plan's adapter of this number; it is only read."""

    def folded(self, record: TensorRecord) -> Tensor:
        """Where a folded weight goes."""


class ArenaFoldMemory:
    """Everything in extents of the arena; the offsets are theirs, in bytes."""

    def __init__(
        self, arena: WeightArena, base_offset: int, adapter_offsets: Sequence[int], overlay_offset: int
    ) -> None:
        self._arena = arena
        self._base_offset = base_offset
        self._adapter_offsets = adapter_offsets
        self._overlay_offset = overlay_offset

    def base(self, record: TensorRecord) -> Tensor:
        """A view."""
        return self._arena.tensor(record, self._base_offset)

    def factor(self, adapter: int, record: TensorRecord) -> Tensor:
        """A view."""
        return self._arena.tensor(record, self._adapter_offsets[adapter])

    def folded(self, record: TensorRecord) -> Tensor:
        """A view."""
        return self._arena.tensor(record, self._overlay_offset)


def fold_steps(
    plan: OverlayPlan,
    memory: FoldMemory,
    products: FoldProducts | None = None,
    weights: Iterable[FoldedWeight] | None = None,
) -> Iterator[int]:
    """Fold an overlay piece by piece: each step is one adapter's part of one weight.

    Yields the bytes of the overlay that are finished, after every step; whoever folds beside a request stops
    pulling whenever its time is up. Abandoned half-way it has changed nothing but the overlay's own bytes.
    Of the plan only `weights` are folded if they are given. Raises `NotFinite`.
    """
    done = 0
    products = products or FoldProducts()
    for weight in plan.weights if weights is None else weights:
        base, out = memory.base(weight.base), memory.folded(weight.folded)
        parts = _parts(plan, weight, memory)
        for _ in _steps(base, parts, out, products):
            yield done
        if not (_is_harmless(parts, base) or is_finite(out)):
            raise NotFinite(_blame(plan, weight, memory, products))
        done += weight.folded.size_bytes
        yield done


def _parts(plan: OverlayPlan, weight: FoldedWeight, memory: FoldMemory) -> list[FoldPart]:
    return [
        FoldPart(
            down=memory.factor(term.adapter, term.target.down),
            up=memory.factor(term.adapter, term.target.up),
            scaling=scaling_of(term.target, plan.adapters[term.adapter].scale),
        )
        for term in weight.terms
    ]


def _blame(plan: OverlayPlan, weight: FoldedWeight, memory: FoldMemory, products: FoldProducts) -> str:
    """Which adapter's part is not finite by itself; all of them where only the sum is not."""
    where = f"{plan.component}.{weight.base.path}"
    base = memory.base(weight.base)
    if not is_finite(base):
        return f"{where} of the base model is not finite; its file is broken"
    guilty = []
    for term, part in zip(weight.terms, _parts(plan, weight, memory), strict=True):
        alone = torch.zeros_like(base)
        _add(part, alone, alone, products)
        if not is_finite(alone):
            guilty.append(term)
    guilty = guilty or list(weight.terms)
    names = ", ".join(f"{a.record.name!r} at {a.scale:g}" for a in (plan.adapters[t.adapter] for t in guilty))
    return f"{where} is not finite with adapter {names}; use a smaller scale or another adapter"

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
from understudyd.stage.views import DTYPES, WeightArena, dtype_of
from understudyd.store.adapters.overlays import FoldedWeight, OverlayPlan
from understudyd.store.adapters.records import AdapterRecord, TargetRecord
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
    """Write `weight` plus the part to `out`, which may be `weight`.

    Every call of torch gives the interpreter away and has to win it back from whatever runs beside: no call
    is made that changes nothing.
    """
    dtype = weight.dtype
    works_in_float = weight.device.type == "cpu" and dtype in _HALF_TYPES
    down, up = _as(dtype, part.down), _as(dtype, part.up)
    if works_in_float:
        down, up = down.float(), up.float()
    if weight.dim() == 2 or weight.shape[2:] == (1, 1):
        place = None if out is weight or works_in_float else _flat(out)
        weight, out = _flat(weight), _flat(out)
        pieces = products.pieces(_flat(up), _flat(down), place)
    else:
        pieces = iter([(None, products.convolution(up, down))])
    for rows, product in pieces:
        if part.scaling != 1.0:
            product.mul_(part.scaling)
        product = _as(dtype, product)  # rounded twice, as PEFT does
        if rows is None:
            torch.add(weight, product, out=out)
        else:
            torch.add(weight[rows], product, out=out[rows])


def _as(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _flat(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 2 else tensor.flatten(1)


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


def _is_harmless(parts: Sequence[FoldPart], largest: Sequence[float], dtype: torch.dtype) -> bool:
    """Whether parts are so small for sure that a finite weight stays finite; False where it takes a look.

    `largest` bounds the absolute values of each part's factors. What is less than half a step between the
    largest numbers of a type does not carry one past them. Infinities that the base has itself are not the
    adapters' doing.
    """
    limit = torch.finfo(dtype).max * torch.finfo(dtype).eps / 8
    total = 0.0
    for part, bound in zip(parts, largest, strict=True):
        if not bound <= limit:  # NaN is not
            return False
        total += max(1.0, abs(part.scaling)) * part.down.shape[0] * bound * bound
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

    def largest(self, adapter: int, record: AdapterRecord) -> float:
        """No factor of that adapter has a larger absolute value. Infinite or NaN: nobody knows."""


class ArenaFoldMemory:
    """Everything in extents of the arena; the offsets are theirs, in bytes."""

    def __init__(
        self, arena: WeightArena, base_offset: int, adapter_offsets: Sequence[int], overlay_offset: int
    ) -> None:
        self._arena = arena
        self._base_offset = base_offset
        self._adapter_offsets = adapter_offsets
        self._overlay_offset = overlay_offset
        self._largest: dict[int, float] = {}

    def base(self, record: TensorRecord) -> Tensor:
        """A view."""
        return self._arena.tensor(record, self._base_offset)

    def factor(self, adapter: int, record: TensorRecord) -> Tensor:
        """A view."""
        return self._arena.tensor(record, self._adapter_offsets[adapter])

    def folded(self, record: TensorRecord) -> Tensor:
        """A view."""
        return self._arena.tensor(record, self._overlay_offset)

    def largest(self, adapter: int, record: AdapterRecord) -> float:
        """Found in one pass over the adapter, once; not on a GPU, where waiting for it takes longer."""
        found = self._largest.get(adapter)
        if found is None:
            found = self._largest[adapter] = self._look(adapter, record)
        return found

    def _look(self, adapter: int, record: AdapterRecord) -> float:
        factors = [tensor for target in record.targets for tensor in (target.down, target.up)]
        if self._arena.device.type != "cpu" or len({factor.dtype for factor in factors}) != 1:
            return math.inf
        end = max(factor.offset + factor.size_bytes for factor in factors)
        low, high = self._arena.run(dtype_of(factors[0]), self._adapter_offsets[adapter], end).aminmax()
        return max(-float(low), float(high))


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
    sums: list[tuple[FoldedWeight, Tensor]] = []
    for weight in plan.weights if weights is None else weights:
        base, out = memory.base(weight.base), memory.folded(weight.folded)
        parts = _parts(plan, weight, memory)
        for _ in _steps(base, parts, out, products):
            yield done
        largest = [memory.largest(t.adapter, plan.adapters[t.adapter].record) for t in weight.terms]
        if not _is_harmless(parts, largest, base.dtype):
            sums.append((weight, out.sum()))
        done += weight.folded.size_bytes
        yield done
    for weight in _suspects(sums):
        if not is_finite(memory.folded(weight.folded)):
            raise NotFinite(_blame(plan, weight, memory, products))


def _suspects(sums: Sequence[tuple[FoldedWeight, Tensor]]) -> list[FoldedWeight]:
    """Those whose sum is not finite: one question for all, since a GPU is waited for at each."""
    if not sums:
        return []
    is_finite_sum = torch.stack([total for _, total in sums]).isfinite().tolist()
    return [weight for (weight, _), is_fine in zip(sums, is_finite_sum, strict=True) if not is_fine]


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

"""One weight folded equals one layer merged by PEFT, whatever its shape; what cannot be folded is told."""

import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

import adapter_kit as kit
from adapter_kit import Making
from fold_kit import read_blob
from ingest_kit import single_threaded
from understudy_demo import tiny
from understudyd.stage.folding import (
    ArenaFoldMemory,
    FoldPart,
    NotFinite,
    fold,
    fold_steps,
    is_finite,
    scaling_of,
)
from understudyd.stage.views import WeightArena
from understudyd.store.adapters.files import find_adapters
from understudyd.store.adapters.ingest import add_adapter
from understudyd.store.adapters.overlays import AppliedAdapter, plan_overlays
from understudyd.store.adapters.records import TargetRecord
from understudyd.store.ingest import ingest
from understudyd.store.records import TensorRecord
from understudyd.store.store import Store
from zoo import unets

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield from single_threaded()


@st.composite
def layers(draw: st.DrawFn) -> nn.Module:
    wide_in, wide_out = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    kernel = draw(st.sampled_from([None, (1, 1), (3, 3), (1, 3)]))
    torch.manual_seed(draw(st.integers(0, 99)))
    if kernel is None:
        return nn.Linear(wide_in, wide_out)
    return nn.Conv2d(wide_in, wide_out, kernel, padding=draw(st.integers(0, 1)))


ADAPTERS = st.lists(
    st.tuples(
        st.integers(1, 9),  # rank
        st.floats(0.1, 40),  # alpha
        st.floats(-2, 2),  # scale
        st.booleans(),  # rank-stabilised
        st.sampled_from(DTYPES),  # of its factors
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(layer=layers(), dtype=st.sampled_from(DTYPES), adapters=ADAPTERS)
def test_a_fold_equals_pefts_merge(
    layer: nn.Module, dtype: torch.dtype, adapters: list[tuple[int, float, float, bool, torch.dtype]]
) -> None:
    model = nn.ModuleDict({"layer": layer.to(dtype)})
    base = layer.weight.data.clone()
    parts, names = [], []
    for number, (rank, alpha, scale, is_stable, factor_dtype) in enumerate(adapters):
        names.append(f"adapter-{number}")
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["layer"], use_rslora=is_stable)
        with warnings.catch_warnings(action="ignore"):  # that there is more than one adapter
            inject_adapter_in_model(config, model, names[-1])
        tuned = model["layer"]
        down, up = (
            torch.randn(side[names[-1]].weight.shape).to(factor_dtype)
            for side in (tuned.lora_A, tuned.lora_B)
        )
        tuned.lora_A[names[-1]].weight.data = down.to(dtype)
        tuned.lora_B[names[-1]].weight.data = up.to(dtype)
        tuned.set_scale(names[-1], scale)
        parts.append(FoldPart(down, up, scaling_of(target(rank, alpha, is_stable), scale)))
        assert parts[-1].scaling == tuned.scaling[names[-1]]
    model["layer"].set_adapter(names)
    model["layer"].merge(adapter_names=names)

    before = base.clone()
    out = torch.full_like(base, float("nan"))
    fold(base, parts, out)
    assert torch.equal(out, model["layer"].base_layer.weight.data)
    assert torch.equal(base, before)


def target(rank: int, alpha: float, is_stable: bool, alpha_dtype: str | None = None) -> TargetRecord:
    factor = TensorRecord(path="x", kind="parameter", dtype="F32", shape=(1,), offset=0, size_bytes=4)
    return TargetRecord(
        component="unet",
        path="layer.weight",
        kind="linear",
        shape=(1, 1),
        rank=rank,
        alpha=alpha,
        down=factor,
        up=factor,
        is_rank_stabilised=is_stable,
        alpha_dtype=alpha_dtype,
    )


def test_an_alpha_that_the_library_keeps_as_a_tensor_is_rounded_as_one() -> None:
    alpha = torch.tensor(3.3, dtype=torch.bfloat16)
    expected = 0.7 * alpha / 4
    assert scaling_of(target(4, float(alpha), False, "BF16"), 0.7) == expected.item()
    assert scaling_of(target(4, float(alpha), False), 0.7) != expected.item()


def test_without_adapters_a_fold_is_a_copy() -> None:
    base = torch.randn(5, 7)
    out = torch.empty_like(base)
    fold(base, [], out)
    assert torch.equal(out, base)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nan_are_seen(bad: float, dtype: torch.dtype) -> None:
    tensor = torch.zeros(1000, dtype=dtype)
    assert is_finite(tensor)
    tensor[777] = bad
    assert not is_finite(tensor)
    with pytest.raises(NotFinite):
        fold(tensor, [], torch.empty_like(tensor))


class Board:
    """Two adapters over a float16 UNet in an arena."""

    def __init__(self, root: Path) -> None:
        pipeline = unets.stable_diffusion(0)
        store = Store.open(root / "store", writable=True)
        model = ingest(store, "base", tiny.save(pipeline, root / "saved"), dtype="fp16")
        (component,) = (c for c in model.components if c.name == "unet")
        self.signature = store.signature(component.signature)
        self.records = []
        for seed in (1, 2):
            made = kit.make_adapter(pipeline, Making({"unet": kit.UNET_LAYERS}, seed=seed))
            (file,) = find_adapters(kit.write_diffusers(made, root / f"lora-{seed}.safetensors"))
            self.records.append(add_adapter(store, file))
        self.blobs = [read_blob(store, b) for b in (component.blob, *(r.blob for r in self.records))]

    def set_up(self, *scales: float) -> tuple[Iterator[int], Tensor, int]:
        """The steps of a fold with these scales, the arena's memory, and where the overlay begins."""
        applied = [AppliedAdapter(r, s) for r, s in zip(self.records, scales, strict=True)]
        (plan,) = plan_overlays({"unet": self.signature}, applied)
        memory = torch.cat([*self.blobs, torch.full((plan.size_bytes,), 0xFF, dtype=torch.uint8)])
        offsets = [sum(b.numel() for b in self.blobs[:i]) for i in range(4)]
        steps = fold_steps(plan, ArenaFoldMemory(WeightArena(memory), 0, offsets[1:3], offsets[3]))
        return steps, memory, offsets[3]


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Board:
    return Board(tmp_path_factory.mktemp("board"))


def test_a_fold_is_done_in_steps_and_may_be_left_half_way(board: Board) -> None:
    steps, memory, overlay_offset = board.set_up(0.5, 0.8)
    before = memory[:overlay_offset].clone()
    for _ in range(7):
        next(steps)
    steps.close()
    assert torch.equal(memory[:overlay_offset], before)
    begun = memory[overlay_offset:].clone()
    whole, again, _ = board.set_up(0.5, 0.8)
    done = list(whole)
    assert len(done) == 3 * len(board.records[0].targets)  # a step for each adapter, and one that checks
    assert torch.equal(again[:overlay_offset], before)
    assert not torch.equal(again[overlay_offset:], begun)


def test_a_scale_that_overflows_is_told_with_weight_and_adapter(board: Board) -> None:
    steps, memory, overlay_offset = board.set_up(0.5, 1e9)
    before = memory[:overlay_offset].clone()
    with pytest.raises(NotFinite, match=r"unet\..*to_q\.weight .*'lora-2' at 1e\+09") as caught:
        list(steps)
    assert "lora-1" not in str(caught.value)
    assert caught.value.code == "bad_request"
    assert torch.equal(memory[:overlay_offset], before)


def test_the_largest_factor_is_known_without_looking_at_each(board: Board) -> None:
    record, blob = board.records[0], board.blobs[1]
    arena = WeightArena(blob)
    memory = ArenaFoldMemory(arena, 0, [0], 0)
    factors = [arena.tensor(factor, 0) for t in record.targets for factor in (t.down, t.up)]
    assert memory.largest(0, record) == max(float(factor.abs().max()) for factor in factors)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_one_bad_factor_among_many_is_seen(board: Board, bad: float) -> None:
    steps, memory, overlay_offset = board.set_up(0.5, 0.8)
    before = memory[:overlay_offset].clone()
    target = board.records[1].targets[-1]
    start = sum(blob.numel() for blob in board.blobs[:2])
    WeightArena(memory).tensor(target.up, start).view(-1)[-1] = bad
    with pytest.raises(NotFinite, match=rf"{target.path} .*'lora-2' at 0\.8"):
        list(steps)
    assert not torch.equal(memory[:overlay_offset], before)  # that was this test's doing


def test_factors_of_several_dtypes_are_looked_at_one_by_one(board: Board) -> None:
    record = board.records[0]
    first = record.targets[0]
    other = msgspec.structs.replace(first, down=msgspec.structs.replace(first.down, dtype="F16"))
    mixed = msgspec.structs.replace(record, targets=(other, *record.targets[1:]))
    assert ArenaFoldMemory(WeightArena(board.blobs[1]), 0, [0], 0).largest(0, mixed) == math.inf

"""Compiled blocks serve every fine-tune, overlay and size of a signature; the stage itself compiles nothing.

Most of it with torch.compile's backend "eager": dynamo's graphs and guards are what decides about recompiles,
and they are the same whatever makes code of the graphs. `test_compile_inductor.py` has the real one.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from adapter_kit import Making
from overlay_kit import CONV, UNET, AdaptedFamily, OverlayRig
from stage_kit import Rig, pixels
from understudy_demo import tiny
from understudyd.core.types import ErrorCode, Outcome
from understudyd.stage.compile_report import CompileReport
from understudyd.stage.compiling import CompileFailure, reason_of
from understudyd.stage.regions import CompiledBlocks

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's compilers have many of their own

# ATen computes small convolutions of a batch of one in another way than large ones: these are all small.
SMALL: dict[str, Any] = {"width": 8, "height": 8}
WIDE: dict[str, Any] = {"width": 16, "height": 8}
VARIED: list[dict[str, Any]] = [
    SMALL,
    WIDE,
    SMALL | {"images": 2},
    WIDE | {"guidance": 1.0},
    SMALL | {"scheduler": "DDIMScheduler"},
]
ADAPTERS = [(("style", 1.0),), (("shape", 0.9), ("style", 0.5))]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> AdaptedFamily:
    family = AdaptedFamily(tmp_path_factory.mktemp("family"))
    for i, name in enumerate("abc", 1):
        family.add(name, tiny.stable_diffusion(i))
    family.adapt("a", "style", Making(UNET))
    family.adapt("a", "shape", Making(CONV, rank=5, alpha=3, seed=2))
    return family


@pytest.fixture(scope="module")
def plain(family: AdaptedFamily) -> Iterator[OverlayRig]:
    rig = OverlayRig(family)
    all_served(rig)
    yield rig
    rig.close()


@pytest.fixture(scope="module")
def compiled(family: AdaptedFamily) -> Iterator[OverlayRig]:
    """Warmed up: one run of one model."""
    rig = OverlayRig(family, compile_backend="eager")
    all_served(rig)
    rig.run("a", **SMALL)
    rig.stage.wait_compiled()
    yield rig
    rig.close()


def all_served(rig: OverlayRig) -> list[str]:
    rig.serve("a", "b", "c")
    return ["a", "b", *(rig.serve_derived("a", adapters) for adapters in ADAPTERS), "c"]


def report_of(rig: Rig) -> CompileReport:
    rig.stage.wait_compiled()
    report = rig.stage.compile_report()
    assert report is not None
    return report


def test_one_compilation_serves_a_family(compiled: OverlayRig, plain: OverlayRig) -> None:
    """Three fine-tunes, two overlays, sizes, batches and schedulers, there and back: nothing is made anew."""
    first = report_of(compiled)
    assert first.graphs > 0 and not first.failures and first.recompiles == 0, first
    models = all_served(compiled)
    made: dict[tuple[str, int], list[bytes]] = {}
    for model in [*models, *reversed(models)]:
        for i, params in enumerate(VARIED):
            images = pixels(compiled.run(model, **params))
            if (model, i) not in made:
                assert images == pixels(plain.run(model, **params)), (model, params)
            assert made.setdefault((model, i), images) == images
    assert report_of(compiled) == first
    assert compiled.stage.strays() == []


def test_compiled_steps_tell_progress_and_can_be_cancelled(compiled: OverlayRig) -> None:
    request = compiled.submit("b", steps=9, **SMALL)
    compiled.cancel_at_step(request, 3)
    ended = compiled.ended(request)
    assert (ended.outcome, ended.code) == (Outcome.CANCELLED, ErrorCode.CANCELLED)
    assert [step for told, step, _ in compiled.progress if told == request] == [1, 2, 3]


def test_a_recompile_is_counted_and_told(
    compiled: OverlayRig, plain: OverlayRig, caplog: pytest.LogCaptureFixture
) -> None:
    """What guards ask for changes; the request is served without compiled code meanwhile."""
    before = report_of(compiled)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert pixels(compiled.run("a", **SMALL)) == pixels(plain.run("a", **SMALL))
        after = report_of(compiled)
        compiled.run("b", **SMALL)
        assert report_of(compiled) == after, "once made, it fits"
    finally:
        torch.use_deterministic_algorithms(False)
    told = [r.getMessage() for r in caplog.records if "compiled again" in r.getMessage()]
    assert after.recompiles == after.graphs - before.graphs == len(told) > 0
    assert any("deterministic" in line for line in told), told
    compiled.run("a", **SMALL)
    assert report_of(compiled) == after, "what was there before still fits"


def test_what_cannot_be_compiled_is_served_without(
    family: AdaptedFamily, plain: OverlayRig, caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig(family.store, compile_backend=broken_backend)
    try:
        rig.serve("a")
        for _ in range(2):
            assert pixels(rig.run("a", **SMALL)) == pixels(plain.run("a", **SMALL))
            report = report_of(rig)
        assert report.failures == {"UNet2DConditionModel": "backend"}
        told = [r.getMessage() for r in caplog.records if "cannot be compiled (backend)" in r.getMessage()]
        assert len(told) == 1 and "no code today" in told[0]
    finally:
        rig.close()


def broken_backend(_graph: Any, _inputs: Any) -> Any:
    raise RuntimeError("no code today")


def test_reasons_are_found_below_what_wraps_them() -> None:
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        try:
            raise InvalidCxxCompiler("c++")
        except InvalidCxxCompiler as error:
            raise RuntimeError("compiling failed") from error
    except RuntimeError as error:
        assert reason_of(error) is CompileFailure.NO_COMPILER
    assert reason_of(torch.OutOfMemoryError("full")) is CompileFailure.OUT_OF_MEMORY
    assert reason_of(RuntimeError("what?")) is CompileFailure.UNKNOWN


def test_nothing_is_compiled_unless_asked_for(plain: OverlayRig) -> None:
    assert plain.stage.compile_report() is None
    assert all("forward" not in vars(m) for s in plain.stage.skeletons() for m in s.module.modules())


def test_only_what_denoises_is_compiled(compiled: OverlayRig) -> None:
    opened = {
        skeleton.signature.class_name
        for skeleton in compiled.stage.skeletons()
        if any("forward" in vars(module) for module in skeleton.module.modules())
    }
    assert opened == {"UNet2DConditionModel"}


def test_blocks_of_one_layout_share_a_region() -> None:
    blocks = CompiledBlocks(tiny.unet(), lambda blocks, noted: None)
    labels = [region.label for region in blocks.regions.values()]
    assert set(labels) == {"ResnetBlock2D", "BasicTransformerBlock"}
    assert labels.count("BasicTransformerBlock") == 1, "four blocks, one layout"

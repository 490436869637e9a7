"""A pipeline that reads weights before its first forward pass gets its own, whatever is bound then."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from stage_kit import Family, Rig, pixels, rig_over, two_models
from understudyd.core.events import ImagesEncoded
from understudyd.stage.early import EarlyReads, WeightsReadEarly


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return two_models(tmp_path_factory.mktemp("family"))


@pytest.fixture
def rig(family: Family) -> Iterator[Rig]:
    with rig_over(family) as rig:
        yield rig


class Reading:
    """A method of the pipeline that sums up the UNet's first weights before it does its work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
        self.sums: list[float] = []
        own = getattr(StableDiffusionPipeline, method)

        def reads(pipeline: Any, *args: Any, **kwargs: Any) -> Any:
            unet = kwargs["unet"] if method == "__init__" else pipeline.unet
            self.sums.append(unet.conv_in.weight.sum().item())
            return own(pipeline, *args, **kwargs)

        # The constructor's signature says what the pipeline is made of.
        reads.__wrapped__ = own  # type: ignore[attr-defined]
        monkeypatch.setattr(StableDiffusionPipeline, method, reads)


def sum_of(family: Family, name: str) -> float:
    sum_: float = family._plain(name).unet.conv_in.weight.sum().item()
    return sum_


@pytest.mark.parametrize("method", ["__init__", "check_inputs"])
def test_what_was_read_is_the_models_own(
    rig: Rig, family: Family, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    expected = {name: sum_of(family, name) for name in ("a", "b")}
    plain = {name: family.plain_images(name) for name in ("a", "b")}
    reading = Reading(monkeypatch, method)
    rig.serve("a", "b")
    for name in ("a", "b", "a"):
        reading.sums.clear()
        assert pixels(rig.run(name)) == plain[name]
        assert reading.sums == [expected[name]], "read once, and on stage"


def test_the_requests_before_it_are_not_disturbed(
    rig: Rig, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = {name: family.plain_images(name, steps=6) for name in ("a", "b")}
    Reading(monkeypatch, "check_inputs")
    rig.serve("a", "b")
    first, second = rig.submit("a", steps=6), rig.submit("b", steps=6)
    for request_id in (first, second):
        rig.wait_for(ImagesEncoded(request_id))
    assert [pixels(rig.stage.take_result(r)) for r in (first, second)] == [plain["a"], plain["b"]]


def test_watching_ends_with_the_baton() -> None:
    weight = torch.ones(3)
    address = weight.data_ptr()
    with EarlyReads(lambda at: at == address) as early:
        assert (weight.dtype, weight.shape, weight.dim()) == (torch.float32, (3,), 1)
        assert weight.is_floating_point() and hash(weight)
        assert torch.ones(3).sum() == 3, "what is no weight is left alone"
        for reads in (weight.sum, weight.tolist, lambda: weight.data, lambda: torch.stack([weight])):
            with pytest.raises(WeightsReadEarly):
                reads()
        early.end()
        assert weight.sum() == 3 and torch.overrides._get_current_function_mode() is None
        early.end()
    assert torch.overrides._get_current_function_mode() is None


def test_watching_may_end_under_another_mode() -> None:
    weight = torch.ones(3)
    address = weight.data_ptr()
    with EarlyReads(lambda at: at == address) as early, torch.device("cpu"):
        early.end()
        assert weight.sum() == 3
    assert torch.overrides._get_current_function_mode() is None

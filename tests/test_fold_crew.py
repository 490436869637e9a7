"""Who folds and how it is multiplied: helpers share the weights, and every product has torch.mm's bits."""

import threading
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch

from ingest_kit import single_threaded
from understudyd.stage import fold_products
from understudyd.stage.fold_crew import FoldCrew, SharedWeights
from understudyd.stage.fold_products import FoldProducts
from understudyd.stage.folding import FoldPart, NotFinite, _is_harmless, fold, is_finite

SHAPES = [(1, 1, 1), (320, 16, 320), (1280, 64, 768), (7, 3, 5), (1500, 4, 1024), (64, 128, 2048)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield from single_threaded()


# -- products --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("magnitude", [1.0, 1e-20, 1e18])
def test_products_have_the_bits_of_mm(shape: tuple[int, int, int], magnitude: float) -> None:
    wide_out, rank, wide_in = shape
    torch.manual_seed(rank)
    up, down = magnitude * torch.randn(wide_out, rank), magnitude * torch.randn(rank, wide_in)
    up[0], down[:, 0] = 0, -0.0
    product = torch.cat([piece for _, piece in FoldProducts().pieces(up, down, None)])
    assert torch.equal(product, torch.mm(up, down))


def test_a_product_with_other_bits_is_never_used(monkeypatch: pytest.MonkeyPatch) -> None:
    up, down = torch.randn(6, 4), torch.randn(4, 9)
    calls = 0

    def almost(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        product = torch.mm(up, down)
        product[3, 2] = torch.nextafter(product[3, 2], torch.tensor(99.0))
        return product

    monkeypatch.setattr(fold_products, "_onednn", almost)
    products, place = FoldProducts(), torch.empty(6, 9)
    for _ in range(3):
        ((_, product),) = products.pieces(up, down, place)
        assert product is place and torch.equal(product, torch.mm(up, down))
    assert calls == 1, "it is tried once"


def test_convolutions_leave_the_callers_threads_as_they_are() -> None:
    up, down = torch.randn(8, 3, 1, 1), torch.randn(3, 4, 3, 3)
    product = FoldProducts(threads=2).convolution(up, down)
    assert product.shape == (8, 4, 3, 3)
    assert torch.get_num_threads() == 1


# -- what cannot become infinite is not looked at --------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scaling", [1.0, 1e-3, 30.0])
def test_harmless_parts_cannot_carry_the_largest_numbers_away(dtype: torch.dtype, scaling: float) -> None:
    """The largest factors that pass for harmless, over the largest weights: finite all the same."""
    largest = torch.finfo(dtype).max
    base = torch.tensor([[largest, -largest], [largest, 1.0]], dtype=dtype)
    size = 0.99 * (largest * torch.finfo(dtype).eps / 8 / max(scaling, 1.0) / 2) ** 0.5
    part = FoldPart(torch.full((2, 2), size), torch.full((2, 2), size), scaling)
    assert _is_harmless([part], [size], dtype)
    assert not _is_harmless([part] * 9, [size] * 9, dtype)
    out = torch.empty_like(base)
    fold(base, [part], out)
    assert is_finite(out)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_what_may_become_infinite_is_not_harmless(bad: float) -> None:
    base = torch.zeros(3, 3)
    part = FoldPart(torch.ones(2, 3), torch.full((3, 2), bad), scaling=1e9)
    assert not _is_harmless([part], [bad], base.dtype)
    with pytest.raises(NotFinite):
        fold(base, [part], torch.empty_like(base))


# -- the crew --------------------------------------------------------------------------------------


def weights(number: int) -> Any:
    """The crew does not look at them."""
    return range(number)


def test_helpers_take_weights_and_nobody_takes_one_twice() -> None:
    crew = FoldCrew(helpers=2)
    taken: list[tuple[Any, str]] = []
    has_helped = threading.Event()

    def fold_by_helper(some: Iterable[Any]) -> Iterator[None]:
        for weight in some:
            taken.append((weight, threading.current_thread().name))
            has_helped.set()
            yield

    with crew.sharing(weights(100), fold_by_helper) as shared:
        assert has_helped.wait(60)
        for weight in shared:
            taken.append((weight, "caller"))
    assert sorted(weight for weight, _ in taken) == list(range(100))
    assert any(name.startswith("stage-fold-helper") for _, name in taken)
    crew.close()


def test_helpers_go_home_when_something_computes() -> None:
    has_helped = threading.Event()
    crew = FoldCrew(helpers=1, is_busy=has_helped.is_set)
    helped: list[Any] = []

    def fold_by_helper(some: Iterable[Any]) -> Iterator[None]:
        for weight in some:
            helped.append(weight)
            yield
        has_helped.set()

    for _ in range(2):  # the second time it does not even come
        with crew.sharing(weights(10), fold_by_helper) as shared:
            assert has_helped.wait(60)
            rest = list(shared)
    assert helped == [0] and rest == list(range(10))
    crew.close()


def test_what_a_helper_raises_ends_the_fold() -> None:
    crew = FoldCrew(helpers=1)
    has_failed = threading.Event()

    def fold_by_helper(some: Iterable[Any]) -> Iterator[None]:
        yield
        has_failed.set()
        raise NotFinite("broken")

    def take_slowly(shared: SharedWeights) -> int:
        count = 0
        for _ in shared:
            assert has_failed.wait(60)
            count += 1
        return count

    with pytest.raises(NotFinite), crew.sharing(weights(10**9), fold_by_helper) as shared:
        assert take_slowly(shared) < 10**9
    crew.close()


def test_leaving_early_waits_for_helpers() -> None:
    crew = FoldCrew(helpers=1)
    has_begun, may_end = threading.Event(), threading.Event()
    ended: list[Any] = []

    def fold_by_helper(some: Iterable[Any]) -> Iterator[None]:
        has_begun.set()
        assert may_end.wait(60)
        ended.extend(some)
        yield

    def leave() -> None:
        with crew.sharing(weights(10), fold_by_helper):
            assert has_begun.wait(60)
            threading.Timer(0.05, may_end.set).start()
            raise KeyError

    with pytest.raises(KeyError):
        leave()
    assert ended == [0], "it takes no other"
    crew.close()

"""The products of factors, with the bits of the functions that PEFT calls, in less time where there is one.

`torch.mm` in float32 on the CPU is MKL's, which keeps to AVX2 on processors of other makers. oneDNN, which
torch brings too, uses what the processor has: half the processor time on an AVX-512 core (124 ms to 62 for
rank 64 over the attention of an SD 1.5 UNet, 33 to 21 for rank 16). Both add up an element's products one
after the other with fused multiply-adds, so they agree bit for bit, as OpenBLAS does not; but nobody
promises it. So every shape is tried against `torch.mm` before it is used: once in a process, on random
factors. Where they differ, or torch has no oneDNN, it stays `torch.mm`.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

_CONVOLVE = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}

_PIECE_ELEMENTS = 1 << 19
"""A product this large stays in the cache until it is added, and in the allocator's heap."""


class FoldProducts:
    """Multiplies factors. Any number of threads may use it."""

    def __init__(self, threads: int = 1) -> None:
        """`threads` are torch's for convolutions, whose bits they change; the rest takes the caller's."""
        self._threads = threads
        self._is_exact: dict[tuple[int, int, int], bool] = {}

    def pieces(self, up: Tensor, down: Tensor, place: Tensor | None) -> Iterator[tuple[slice | None, Tensor]]:
        """`up` [out, rank] @ `down` [rank, in] by runs of rows: which they are, and a tensor to write to.

        One that has all rows comes with None. With `place` [out, in] given, of the factors' dtype, it may be
        that tensor.
        """
        if self._by_onednn(up, down):
            yield from _onednn_pieces(up, down)
        else:
            yield None, torch.mm(up, down, out=place)

    def convolution(self, up: Tensor, down: Tensor) -> Tensor:
        """What a convolution larger than 1x1 is changed by: conv(A^T, B)^T."""
        with _torch_threads(self._threads):
            return _CONVOLVE[down.dim()](down.transpose(0, 1), up).transpose(0, 1)

    def _by_onednn(self, up: Tensor, down: Tensor) -> bool:
        if up.device.type != "cpu" or up.dtype != torch.float32:
            return False
        shape = (*up.shape, down.shape[1])
        found = self._is_exact.get(shape)
        if found is None:
            found = self._is_exact[shape] = _agree(*shape)
        return found


def _agree(wide_out: int, rank: int, wide_in: int) -> bool:
    """Compare both on random factors of this shape."""
    if not torch.backends.mkldnn.is_available():
        return False
    random = torch.Generator().manual_seed(rank)
    up, down = (torch.randn(shape, generator=random) for shape in ((wide_out, rank), (rank, wide_in)))
    expected = torch.mm(up, down)
    return all(
        torch.equal(piece, expected if rows is None else expected[rows])
        for rows, piece in _onednn_pieces(up, down)
    )


def _onednn_pieces(up: Tensor, down: Tensor) -> Iterator[tuple[slice | None, Tensor]]:
    rows = max(1, _PIECE_ELEMENTS // down.shape[1])
    if rows >= len(up):
        yield None, _onednn(up, down)
        return
    for first in range(0, len(up), rows):
        piece = slice(first, first + rows)
        yield piece, _onednn(up[piece], down)


def _onednn(up: Tensor, down: Tensor) -> Tensor:
    """What the inductor calls for a linear layer; `down` is a weight kept the other way round."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(up, down.t(), None, "none", [], "")
    return product


@contextlib.contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    """For the calling thread: torch keeps this by thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)

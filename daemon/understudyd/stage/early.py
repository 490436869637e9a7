"""Noticing that a pipeline reads weights before it holds the baton.

A pipeline is called while another request computes: what is bound then is nothing, or another fine-tune. The
forward pass of a component waits for the baton, but a constructor or an input check may read a parameter
directly. Then nothing that it has computed counts: it is called again from the start, on stage.
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode

_ABOUT_A_TENSOR = frozenset(
    {
        "__hash__",
        "__len__",
        "data_ptr",
        "dim",
        "element_size",
        "get_device",
        "is_complex",
        "is_contiguous",
        "is_floating_point",
        "is_inference",
        "nelement",
        "numel",
        "requires_grad_",
        "size",
        "stride",
    }
)
"""What says nothing about values. Attributes such as `dtype` are told by giving no tensor."""


class WeightsReadEarly(BaseException):
    """Unwinds a call that went ahead of the baton. No `Exception`: no pipeline may swallow it."""


class EarlyReads(TorchFunctionMode):  # type: ignore[misc]  # torch is untyped here
    """Raises `WeightsReadEarly` when the calling thread computes with a weight, until `end`.

    `is_weight` tells weights by address. Operations cost some microseconds more while this watches; a
    pipeline's few before its first forward pass are all that it sees.
    """

    def __init__(self, is_weight: Callable[[int], bool]) -> None:
        super().__init__()
        self._is_weight = is_weight
        self._is_watching = self._is_pushed = False

    def __enter__(self) -> "EarlyReads":
        self._is_watching = self._is_pushed = True
        super().__enter__()
        return self

    def __exit__(self, *_error: object) -> None:
        self._is_watching = False
        if self._is_pushed:
            self._is_pushed = False
            super().__exit__(None, None, None)

    def end(self) -> None:
        """The baton is ours: look no more. From the watched thread; more than once is no error."""
        self._is_watching = False
        if self._is_pushed and _get_current_function_mode() is self:
            self.__exit__()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Every operation of torch on this thread comes by here."""
        options = kwargs or {}
        if not self._is_watching:
            return func(*args, **options)
        name = getattr(func, "__name__", "")
        if name in _ABOUT_A_TENSOR or not any(self._is_weight(t.data_ptr()) for t in _tensors(args, options)):
            return func(*args, **options)
        result = func(*args, **options) if name == "__get__" else None
        if name != "__get__" or isinstance(result, Tensor):
            raise WeightsReadEarly
        return result


def _tensors(args: tuple[Any, ...], options: dict[str, Any]) -> Iterator[Tensor]:
    for value in (*args, *options.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (item for item in value if isinstance(item, Tensor))

"""Which parts of a component are compiled, and what happens where compiled code meets a request.

A denoiser is a stack of blocks, many of them alike. Each kind of block is compiled, not the component
(regional compilation: PyTorch's recipe of that name, diffusers' `compile_repeated_blocks`): alike blocks
share what is compiled, and all that pipelines vary (time steps as integers or floats, optional arguments,
sizes that do not divide) happens around blocks, where nothing is compiled. Hooks on the component and its
children stay outside, so that a run takes the baton and is cancelled as ever.

The stage never compiles. A block that is called in a form for which there is no code computes without, and
the form is noted; after the run it is compiled beside the stage (`compiling.py`). Dynamo keeps compiled code
with the function's code object, and finds it by guards on what the code depends on: dtypes, layouts, flags,
not on whose weights these are. So every region has a code object of its own: a signature looks through its
own graphs only, and cannot use up the limit of another.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

_DENOISERS = ("diffusers.models.unets.", "diffusers.models.transformers.", "diffusers.models.controlnets.")
"""Where the library keeps what runs in every step."""

_ALSO_REPEATED = frozenset({"ResnetBlock2D"})
"""What U-Nets repeat beside what the library lists."""

MOST_FORMS = 16
"""Of one region that no code fitted. Compiled code stays, and whoever asks chooses the forms."""

FormKey = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Form:
    """One call of a block, without its numbers: tensors are on the meta device, all else is as it was."""

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Region:
    """Blocks of one class and layout, which share what is compiled.

    Each of them is shown to dynamo: layouts do not tell every difference (a factor of 1, another of 1.0).
    """

    def __init__(self, label: str, forward: Callable[..., Any], missed: Callable[..., None]) -> None:
        """`missed(region, module, args, kwargs)` is told of calls that are computed without compiled code."""
        self.label = label
        self.forward = forward
        self.has_code = False
        self.seen: set[FormKey] = set()
        self.missed: set[FormKey] = set()
        self.function = _with_own_code(forward, lambda *call: missed(self, *call))
        self.run: Callable[..., Any] = torch._dynamo.run(self.function)

    def is_new(self, key: FormKey) -> bool:
        """The form, of this block, is seen for the first time; before there is code for any."""
        if key in self.seen:
            return False
        self.seen.add(key)
        return True

    def is_new_miss(self, key: FormKey) -> bool:
        """No code fitted this form, for the first time, and there are not too many of them."""
        if key in self.missed or len(self.missed) >= MOST_FORMS:
            return False
        self.missed.add(key)
        return True


class CompiledBlocks:
    """One skeleton's regions. Only the holder of the baton computes, so only one thread calls blocks.

    Code is taken into use between two runs, when all that was seen so far is compiled: a picture is made by
    compiled code or without, not by both.
    """

    def __init__(self, module: nn.Module, submit: "Submit") -> None:
        """`submit` is given what a run has noted, when it has ended. `regions` may be empty."""
        self.is_on = False
        self.is_ready = False
        self.has_failed = False
        self._noted: list[tuple[Region, Form]] = []
        self._submit = submit
        self._paths: dict[nn.Module, str] = {}
        self.regions: dict[tuple[Any, ...], Region] = {}
        for path, block in _blocks(module):
            region = self._region_of(block)
            self._paths[block] = path
            vars(block)["forward"] = MethodType(self._entrance(region), block)

    def adopt(self) -> None:
        """A run begins: from now on what is compiled is used."""
        self.is_on = self.is_ready and not self.has_failed

    def run_ended(self) -> None:
        """Have compiled what was seen."""
        noted, self._noted = self._noted, []
        if noted and not self.has_failed:
            self._submit(self, noted)

    def _region_of(self, block: nn.Module) -> Region:
        key = (type(block), *((n, p.shape, p.dtype) for n, p in block.named_parameters()))
        if key not in self.regions:
            self.regions[key] = Region(type(block).__name__, type(block).forward, self._missed)
        return self.regions[key]

    def _entrance(self, region: Region) -> Callable[..., Any]:
        forward, run = region.forward, region.run

        def enter(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            args, kwargs = _as_ever(args), dict(zip(kwargs, _as_ever(kwargs.values())))
            if self.is_on:
                return run(module, *args, **kwargs)
            if not self.has_failed and region.is_new((module, *_rough_key(args, kwargs))):
                self._note(region, module, args, kwargs)
            return forward(module, *args, **kwargs)

        return enter

    def _missed(self, region: Region, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        if region.is_new_miss(_exact_key(args, kwargs)):
            self._note(region, module, args, kwargs)

    def _note(self, region: Region, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._noted.append((region, Form(self._paths[module], *weightless((args, kwargs)))))


Submit = Callable[[CompiledBlocks, list[tuple[Region, Form]]], None]
"""`submit(blocks, noted)`: have this compiled."""


def is_denoiser(module: nn.Module) -> bool:
    """It computes in every step.

    Not text encoders and autoencoders, which run once for dozens of steps; a decoder also moves (SDXL casts
    its VAE up and back), works on sizes of its own, and can be cancelled block by block, which compiled it
    could not.
    """
    return type(module).__module__.startswith(_DENOISERS)


def weightless(value: Any) -> Any:
    """The same with tensors of the same layouts on the meta device; one tensor twice is one tensor twice."""
    return _each_once(value, lambda t: _like(t, t.shape, torch.device("meta")))


def example(form: Form, device: torch.device, batch: int | None = None) -> tuple[Any, dict[str, Any]]:
    """Arguments of a form, all zeros; with a `batch` of another size than the form's.

    The batch is axis 0 of the first tensor, and of the others that agree with it.
    """
    leaves = [leaf for leaf in tree_leaves((form.args, form.kwargs)) if isinstance(leaf, Tensor)]
    was = leaves[0].shape[0] if leaves and leaves[0].dim() else None

    def make(tensor: Tensor) -> Tensor:
        shape = tensor.shape
        if batch is not None and tensor.dim() and shape[0] == was:
            shape = torch.Size((batch, *shape[1:]))
        made = _like(tensor, shape, device)
        made.untyped_storage().fill_(0)
        return made

    args, kwargs = _each_once((form.args, form.kwargs), make)
    return args, kwargs


def _each_once(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    made: dict[int, Tensor] = {}

    def once(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = change(tensor)
        return made[id(tensor)]

    return tree_map_only(Tensor, once, value)


def _like(tensor: Tensor, shape: Sequence[int], device: torch.device) -> Tensor:
    return torch.empty_strided(shape, tensor.stride(), dtype=tensor.dtype, device=device)


def _blocks(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost repeated blocks; of a class that lists none, what its lists of blocks hold."""
    names = {*(getattr(root, "_repeated_blocks", None) or ()), *_ALSO_REPEATED}
    found = {path: m for path, m in root.named_modules() if type(m).__name__ in names}
    if not found:
        found = {
            f"{name}.{i}": block
            for name, child in root.named_children()
            if isinstance(child, nn.ModuleList)
            for i, block in child.named_children()
            if any(True for _ in block.children())
        }
    for path, block in found.items():
        if not any(path.startswith(f"{other}.") for other in found):
            yield path, block


def _with_own_code(forward: Callable[..., Any], missed: Callable[..., None]) -> FunctionType:
    """A function that computes a block, with a code object that no other function has.

    What is traced is `forward` alone. The function itself runs only where no compiled code fits.
    """

    def block(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            missed(module, args, kwargs)
        return forward(module, *args, **kwargs)

    code = block.__code__.replace()
    return FunctionType(code, block.__globals__, block.__name__, None, block.__closure__)


def _as_ever(values: Iterable[Any]) -> tuple[Any, ...]:
    """In a batch of one the first stride means nothing and may be anything, but guards ask for it."""
    return tuple(
        v.as_strided(v.shape, (v.numel(), *v.stride()[1:]))
        if isinstance(v, Tensor) and v.dim() and v.shape[0] == 1 and v.stride(0) != v.numel()
        else v
        for v in values
    )


def _rough_key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> FormKey:
    """What is sure to need code of its own: dtypes, axes, sizes of 1 but for batches, what is given."""
    return tuple(
        (leaf.dtype, leaf.dim(), *(size == 1 for size in leaf.shape[1:]))
        if isinstance(leaf, Tensor)
        else type(leaf)
        for leaf in tree_leaves((args, kwargs))
    )


def _exact_key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> FormKey:
    return tuple(
        (leaf.dtype, leaf.shape, leaf.stride()) if isinstance(leaf, Tensor) else str(leaf)
        for leaf in tree_leaves((args, kwargs))
    )

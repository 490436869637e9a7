"""What a pipeline's `__call__` takes and gives: read once per class, from its signature and its source.

Signatures say which keywords there are and of which types. They do not say what comes out: whether
`output_type="latent"` is known, whether "pt" is as finished as "pil" (in some pipelines it is not clamped to
0 to 1, or has no watermark), whether images or videos are made. The source of `__call__` does.
"""

import ast
import functools
import inspect
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

EMPTY = inspect.Parameter.empty
_TENSOR_WORDS = ("latents", "embeds")
_PLAIN_IMAGE_NAMES = frozenset({"image", "mask_image", "control_image"})


@dataclass(frozen=True, slots=True)
class Keyword:
    """One named argument. `kind` is its type annotation, as text where that has no meaning, or `EMPTY`."""

    name: str
    kind: Any
    default: Any

    @property
    def is_required(self) -> bool:
        """There is no call without it."""
        return self.default is EMPTY

    @property
    def takes_image(self) -> bool:
        """Pictures are among what it takes."""
        if self.has_tensor_name:
            return False
        if self.kind is EMPTY:
            return self.name in _PLAIN_IMAGE_NAMES
        if isinstance(self.kind, str):
            return "PIL.Image" in self.kind
        return any(kind is Image.Image for kind in _leaves(self.kind))

    @property
    def has_tensor_name(self) -> bool:
        """Pipelines call it what they call tensors, whatever its type says."""
        return any(word in self.name for word in _TENSOR_WORDS)

    @property
    def takes_one_image(self) -> bool:
        """A picture by itself will do."""
        return self._is_untold or any(kind is Image.Image for kind in alternatives(self.kind))

    @property
    def takes_many_images(self) -> bool:
        """A list of pictures will do."""
        return self._is_untold or any(
            typing.get_origin(kind) in (list, tuple) and any(k is Image.Image for k in _leaves(kind))
            for kind in alternatives(self.kind)
        )

    @property
    def _is_untold(self) -> bool:
        return self.kind is EMPTY or isinstance(self.kind, str)


@dataclass(frozen=True, slots=True)
class CallFacts:
    """What is known about one `__call__`.

    `output_type` is what to ask for to get finished pictures with the least work: "pt" where that is equal to
    "pil" but for the conversion, else "pil"; None where the keyword is missing. `image_names` are the
    keywords that take pictures.
    """

    pipeline: str
    keywords: Mapping[str, Keyword]
    output_type: str | None
    gives_latents: bool
    gives_video: bool
    image_names: tuple[str, ...] = ()


def read_call(pipeline_class: type[Any]) -> CallFacts:
    """The facts about a pipeline class; remembered by its `__call__`."""
    return _read(pipeline_class.__call__, pipeline_class.__name__)


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of a union, or the type alone."""
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if is_union else (kind,)


@functools.cache
def _read(call: Callable[..., Any], pipeline: str) -> CallFacts:
    keywords = {keyword.name: keyword for keyword in _keywords(call)}
    source = _Source(call)
    return CallFacts(
        pipeline=pipeline,
        keywords=types.MappingProxyType(keywords),
        image_names=tuple(name for name, keyword in keywords.items() if keyword.takes_image),
        output_type=source.output_type if "output_type" in keywords else None,
        gives_latents="output_type" in keywords and source.gives_latents,
        gives_video=source.gives_video,
    )


def _keywords(call: Callable[..., Any]) -> Iterator[Keyword]:
    hints = _hints(call)
    for parameter in list(inspect.signature(call).parameters.values())[1:]:  # without self
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        yield Keyword(parameter.name, hints.get(parameter.name, EMPTY), parameter.default)


def _hints(call: Callable[..., Any]) -> dict[str, Any]:
    """Type hints. Those written as text stay text where they name what their module does not import."""
    function = inspect.unwrap(call)
    found: dict[str, Any] = {}
    for name, kind in function.__annotations__.items():
        alone = types.SimpleNamespace(__annotations__={name: kind})
        try:
            found |= typing.get_type_hints(alone, function.__globals__)
        except (NameError, AttributeError, TypeError):
            found[name] = kind if isinstance(kind, str) else str(kind)
    return found


def _leaves(kind: Any) -> Iterator[Any]:
    inner = typing.get_args(kind)
    if not inner:
        yield kind
    for argument in inner:
        yield from _leaves(argument)


class _Source:
    """The source of a `__call__`. One that cannot be read is taken to know PIL images and nothing else."""

    def __init__(self, call: Callable[..., Any]) -> None:
        try:
            text = textwrap.dedent(inspect.getsource(inspect.unwrap(call)))
            self._nodes = list(ast.walk(ast.parse(text)))
        except (OSError, TypeError, SyntaxError):
            self._nodes = []

    @property
    def output_type(self) -> str:
        """The processor's `postprocess` knows "pt"; what is compared by hand may mean anything."""
        is_processed = any(
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("postprocess", "postprocess_video")
            and _mentions(node, "output_type")
            for node in self._nodes
        )
        return "pt" if is_processed and self._compared() <= {"latent"} else "pil"

    @property
    def gives_latents(self) -> bool:
        """It asks whether latents are wanted."""
        return "latent" in self._compared()

    @property
    def gives_video(self) -> bool:
        """What it returns has frames."""
        return any(
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id.endswith("Output")
            and any(keyword.arg in ("frames", "video") for keyword in node.keywords)
            for node in self._nodes
        )

    def _compared(self) -> set[Any]:
        """Constants that `output_type` is compared with."""
        return {
            part.value
            for node in self._nodes
            if isinstance(node, ast.Compare) and _mentions(node.left, "output_type")
            for part in ast.walk(node)
            if isinstance(part, ast.Constant)
        }


def _mentions(node: ast.AST, name: str) -> bool:
    return any(isinstance(part, ast.Name) and part.id == name for part in ast.walk(node))

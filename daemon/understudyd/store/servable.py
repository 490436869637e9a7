"""Whether requests can drive a pipeline class, told from its `__call__` before anything is stored.

A request carries text, numbers and pictures, and takes pictures or frames back.
"""

import ast
import inspect
import textwrap
from typing import Any

import torch

_PICTURES = frozenset({"images", "image", "frames", "video", "videos"})


def why_not_servable(pipeline_class: type[Any]) -> str | None:
    """What is in the way, in words that follow the class's name; None if nothing is."""
    call = inspect.unwrap(pipeline_class.__call__)
    for parameter in list(inspect.signature(call).parameters.values())[1:]:
        is_named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if is_named and parameter.default is parameter.empty and _is_tensor(parameter.annotation):
            return f"needs {parameter.name}, tensors that no request can carry"
    given = _given_back(call)
    if given and not given & _PICTURES:
        return f"gives {' and '.join(sorted(given))}, neither images nor video"
    return None


def _is_tensor(annotation: Any) -> bool:
    """Tensors are all that fits: none of the alternatives is a picture, text or a number."""
    leaves = set(_leaves(annotation))
    return bool(leaves) and leaves <= {torch.Tensor, torch.FloatTensor, torch.LongTensor}


def _leaves(annotation: Any) -> list[Any]:
    inner = getattr(annotation, "__args__", ())
    return [leaf for item in inner for leaf in _leaves(item)] if inner else [annotation]


def _given_back(call: Any) -> set[str]:
    """The fields of the output objects that the source builds; empty where it cannot be read."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(call)))
    except (OSError, TypeError, SyntaxError):
        return set()
    return {
        keyword.arg
        for node in ast.walk(tree)
        if isinstance(node, ast.Return)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Name)
        and node.value.func.id.endswith("Output")
        for keyword in node.value.keywords
        if keyword.arg is not None
    }

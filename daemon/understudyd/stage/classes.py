"""Which classes a record may name. Everything else is refused: no code comes from a model folder."""

import functools
import importlib
from typing import Any

from understudyd.stage.errors import UnknownClass

_LIBRARIES = ("diffusers", "transformers")


def resolve(library: str, class_name: str) -> type[Any]:
    """The class, from diffusers, transformers or a `diffusers.pipelines.*` module.

    Raises `UnknownClass`.
    """
    if library not in _LIBRARIES and not library.startswith("diffusers.pipelines."):
        raise UnknownClass(
            f"{library}.{class_name} is not allowed; only diffusers and transformers classes are"
        )
    try:
        found = getattr(importlib.import_module(library), class_name)
    except (ImportError, AttributeError) as error:
        raise UnknownClass(
            f"{library}.{class_name} is not in the installed {library.partition('.')[0]}; upgrade it"
        ) from error
    if not (isinstance(found, type) and issubclass(found, _kinds())):
        raise UnknownClass(
            f"{library}.{class_name} is no pipeline, model, scheduler, tokenizer or processor, and "
            "only these are served"
        )
    return found


@functools.cache
def _kinds() -> tuple[type[Any], ...]:
    """The libraries have classes of other kinds as well: trainers, callbacks, downloaders."""
    import diffusers
    import torch
    import transformers

    return (
        diffusers.DiffusionPipeline,
        torch.nn.Module,
        diffusers.SchedulerMixin,
        transformers.PreTrainedTokenizerBase,
        transformers.FeatureExtractionMixin,
        transformers.ImageProcessingMixin,
        transformers.ProcessorMixin,
    )

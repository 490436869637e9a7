"""Loading a checked folder with the libraries' own `from_pretrained`, on the CPU.

Each component is loaded by its class's `from_pretrained` with the arguments that `DiffusionPipeline` would
give it, and the pipeline is then built around them. That is the same as one call for the whole folder
with a dtype per component (a test compares them), and it says which weights were missing: the libraries
would invent those at random.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.pipeline_loading_utils import simple_get_class_obj
from torch import nn

from understudyd.store.errors import StoreError, StoreErrorCode
from understudyd.store.guard import SourcePart, SourcePlan
from understudyd.store.servable import why_not_servable
from understudyd.store.signature import torch_dtype

DTYPES = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}
_PART_CLASSES = (
    diffusers.SchedulerMixin,
    transformers.PreTrainedTokenizerBase,
    transformers.FeatureExtractionMixin,
    transformers.ImageProcessingMixin,
    transformers.ProcessorMixin,
)


@dataclass(frozen=True, slots=True)
class LoadedPipeline:
    """What `from_pretrained` made of a folder. `components` are in order of first use."""

    pipeline_class: str
    components: dict[str, nn.Module]
    parts: dict[str, tuple[str, str]]
    """Name -> (library, class) of what has no weights."""
    absent: tuple[str, ...]
    init_kwargs: dict[str, Any]


def load_pipeline(
    plan: SourcePlan, dtype: str, on_part: Callable[[SourcePart], None] = lambda part: None
) -> LoadedPipeline:
    """Load a folder that the guard has accepted; `on_part` is called after each component.

    `dtype` is "fp16", "bf16", "fp32" or "keep": each component in the dtype most of its files' bytes are in
    (asked for none, diffusers would make float32 of its own models whatever the files hold).
    Raises `StoreError`.
    """
    pipeline_class = find_pipeline_class(plan.pipeline_class)
    classes = {part.name: find_part_class(part) for part in plan.parts}
    with quiet_libraries():
        modules = {}
        for part in plan.parts:
            if issubclass(classes[part.name], nn.Module):
                modules[part.name] = load_component(part, classes[part.name], target_dtype(part, dtype))
                on_part(part)
        with translated_load_errors(plan.pipeline_class):
            pipeline = pipeline_class.from_pretrained(
                str(plan.folder), local_files_only=True, use_safetensors=True, **modules
            )
            return described(pipeline, plan, classes)


def target_dtype(part: SourcePart, dtype: str) -> torch.dtype:
    """The torch dtype to load a component in."""
    name = part.float_dtype or "F32" if dtype == "keep" else DTYPES[dtype]
    try:
        return torch_dtype(name)
    except KeyError as error:
        raise StoreError(
            StoreErrorCode.UNSUPPORTED_SOURCE,
            f"{part.name} is stored as {name}; name a dtype to convert it to",
        ) from error


def load_component(part: SourcePart, cls: Any, dtype: torch.dtype) -> nn.Module:
    """One component by its class's `from_pretrained`. Raises `StoreError`, also when weights are missing."""
    # The names of the argument are the ones diffusers itself uses for the two libraries.
    dtype_key = "torch_dtype" if issubclass(cls, diffusers.ModelMixin) else "dtype"
    with translated_load_errors(part.name):
        module, report = cls.from_pretrained(
            str(part.folder),
            variant=part.variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **{dtype_key: dtype},
        )
    if missing := sorted(report["missing_keys"]):
        raise StoreError(
            StoreErrorCode.CORRUPT_SOURCE,
            f"{part.name}: {len(missing)} weights are in none of its files ({', '.join(missing[:3])}, ...); "
            "download the model again",
        )
    assert isinstance(module, nn.Module)
    return module


def described(pipeline: Any, plan: SourcePlan, classes: dict[str, type]) -> LoadedPipeline:
    """What a live pipeline is made of; `classes` are those of the plan's parts by name."""
    components = pipeline.components
    modules = {name: c for name, c in components.items() if isinstance(c, nn.Module)}
    arguments = {k: v for k, v in pipeline.config.items() if not k.startswith("_") and k not in components}
    return LoadedPipeline(
        pipeline_class=type(pipeline).__name__,
        components={name: modules[name] for name in _first_use_order(pipeline, list(modules))},
        parts={
            part.name: _importable(part, classes[part.name])
            for part in plan.parts
            if part.name in components and part.name not in modules
        },
        absent=tuple(name for name, component in components.items() if component is None),
        init_kwargs=arguments,
    )


def _first_use_order(pipeline: Any, names: list[str]) -> list[str]:
    """The pipeline's own offload sequence is the order of first use; what it leaves out comes last."""
    sequence = (type(pipeline).model_cpu_offload_seq or "").split("->")
    known = [name for name in dict.fromkeys(sequence) if name in names]
    return known + [name for name in names if name not in known]


# -- classes ---------------------------------------------------------------------------------------


@functools.cache
def find_pipeline_class(name: str) -> Any:
    """The pipeline class of diffusers by name. Raises `StoreError` for what is none or cannot be served."""
    cls = getattr(diffusers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline)):
        raise StoreError(
            StoreErrorCode.UNKNOWN_CLASS,
            f"{name} is no pipeline of diffusers {diffusers.__version__}; a newer release may have it",
        )
    if getattr(cls, "_load_connected_pipes", False):
        raise StoreError(
            StoreErrorCode.UNSUPPORTED_SOURCE,
            f"{name} joins several model folders, which cannot be served yet; use a model of one folder",
        )
    if why := why_not_servable(cls):
        raise StoreError(StoreErrorCode.UNSUPPORTED_SOURCE, f"{name} {why}; use another model")
    return cls


def find_part_class(part: SourcePart) -> Any:
    """The class of an entry, if it is of a kind that is served: a model, a tokenizer, a scheduler, ..."""
    try:
        cls = simple_get_class_obj(part.library, part.class_name)
    except (AttributeError, ImportError, ValueError, RuntimeError):
        cls = None
    kinds = (diffusers.ModelMixin, transformers.PreTrainedModel, *_PART_CLASSES)
    if not (isinstance(cls, type) and issubclass(cls, kinds)):
        raise StoreError(
            StoreErrorCode.UNKNOWN_CLASS,
            f"{part.name}: {part.library}.{part.class_name} is no model, scheduler, tokenizer, ... of "
            f"diffusers {diffusers.__version__} or transformers {transformers.__version__}",
        )
    return cls


def _importable(part: SourcePart, cls: type) -> tuple[str, str]:
    """Module path and name to import a part's class by: its heir's where the library dropped the name."""
    match part.library:
        case "diffusers" | "transformers" as library:
            module = {"diffusers": diffusers, "transformers": transformers}[library]
            return library, part.class_name if hasattr(module, part.class_name) else cls.__name__
        case package:
            return f"diffusers.pipelines.{package}", part.class_name


# -- the libraries' manners ------------------------------------------------------------------------


@contextmanager
def translated_load_errors(what: str) -> Iterator[None]:
    """Turn whatever the libraries raise about a source into `StoreError(corrupt_source)`."""
    try:
        yield
    except (StoreError, MemoryError):
        raise
    except Exception as error:  # the seam: a hostile folder makes the libraries raise anything
        raise StoreError(
            StoreErrorCode.CORRUPT_SOURCE,
            f"{what} cannot be loaded ({type(error).__name__}: {str(error)[:500]}); check that the folder is "
            "complete and loads with diffusers",
        ) from error


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No progress bars, warnings or advice from diffusers and transformers; as it was before, afterwards."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    levels = [library.get_verbosity() for library in libraries]
    bars = [library.is_progress_bar_enabled() for library in libraries]
    for library in libraries:
        library.set_verbosity(library.CRITICAL)
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for library, level, bar in zip(libraries, levels, bars, strict=True):
            library.set_verbosity(level)
            if bar:
                library.enable_progress_bar()

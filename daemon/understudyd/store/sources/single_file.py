"""Loading a single-file checkpoint with diffusers' own `from_single_file`, offline, on the CPU."""

from dataclasses import replace

import torch
from torch import nn

from understudyd.store.errors import StoreError, StoreErrorCode
from understudyd.store.guard import SourcePart, SourcePlan
from understudyd.store.pretrained import (
    DTYPES,
    LoadedPipeline,
    described,
    find_part_class,
    find_pipeline_class,
    load_component,
    quiet_libraries,
    translated_load_errors,
)
from understudyd.store.signature import torch_dtype
from understudyd.store.sources.checkpoint import Checkpoint
from understudyd.store.sources.frame import LEFT_OUT

_COMPUTABLE = frozenset({"F16", "BF16", "F32"})


def load_checkpoint(checkpoint: Checkpoint, frame: SourcePlan, dtype: str) -> LoadedPipeline:
    """Load a checkpoint into the pipeline that `frame` describes, a checked folder that it fits.

    The result equals `from_single_file(file, config=frame, torch_dtype=D, **missing)`, where D is the dtype
    asked for, or with "keep" the one most bytes of the checkpoint's UNet are in: the library takes one for
    all. `missing` are the components that the checkpoint does not bring, from the frame's own weights, in D.
    Raises `StoreError`.
    """
    frame = replace(frame, parts=tuple(part for part in frame.parts if part.name != LEFT_OUT))
    pipeline_class = find_pipeline_class(frame.pipeline_class)
    if not hasattr(pipeline_class, "from_single_file"):
        raise StoreError(
            StoreErrorCode.UNSUPPORTED_SOURCE,
            f"{frame.pipeline_class} has no loader for single files; name a model of another pipeline",
        )
    classes = {part.name: find_part_class(part) for part in frame.parts}
    target = _target_dtype(checkpoint, dtype)
    with quiet_libraries():
        missing = {}
        for part in frame.parts:
            if issubclass(classes[part.name], nn.Module) and part.name not in checkpoint.components:
                missing[part.name] = _missing_component(checkpoint, part, classes[part.name], target)
        with translated_load_errors(checkpoint.file.name):
            try:
                pipeline = pipeline_class.from_single_file(
                    str(checkpoint.file),
                    config=str(frame.folder),
                    local_files_only=True,
                    torch_dtype=target,
                    **missing,
                )
            except NotImplementedError as error:  # torch's word for converting weights that were not found
                raise _cut_down(checkpoint, "some weights") from error
            loaded = described(pipeline, frame, classes)
    _check_whole(checkpoint, loaded)
    return loaded


def _target_dtype(checkpoint: Checkpoint, dtype: str) -> torch.dtype:
    name = checkpoint.float_dtype or "F32" if dtype == "keep" else DTYPES[dtype]
    if name not in _COMPUTABLE:
        raise StoreError(
            StoreErrorCode.UNSUPPORTED_SOURCE,
            f"{checkpoint.file.name} is stored as {name}; name a dtype to convert it to (--dtype fp16)",
        )
    return torch_dtype(name)


def _missing_component(checkpoint: Checkpoint, part: SourcePart, cls: type, dtype: torch.dtype) -> nn.Module:
    if not part.weights:
        raise StoreError(
            StoreErrorCode.NOT_FOUND,
            f"{checkpoint.file.name} brings no {part.name}, and the folder of its configs has no weights of "
            "one; name a model of the store that has it (--like MODEL)",
        )
    return load_component(part, cls, dtype)


def _check_whole(checkpoint: Checkpoint, loaded: LoadedPipeline) -> None:
    """The library leaves weights it did not find on no memory, and says nothing of those it did not use."""
    for name, module in loaded.components.items():
        lost = [path for path, tensor in module.state_dict().items() if tensor.is_meta]
        if lost:
            raise _cut_down(checkpoint, f"{len(lost)} weights of {name} ({', '.join(lost[:3])}, ...)")
    used = sum(parameter.numel() for parameter in loaded.components["unet"].parameters())
    if used != checkpoint.unet_elements:
        raise StoreError(
            StoreErrorCode.UNSUPPORTED_SOURCE,
            f"{checkpoint.file.name} has a UNet of {checkpoint.unet_elements} weights, the model it should "
            f"be like one of {used}: they are of different architectures; name a model that it fits",
        )


def _cut_down(checkpoint: Checkpoint, what: str) -> StoreError:
    return StoreError(
        StoreErrorCode.CORRUPT_SOURCE,
        f"{checkpoint.file.name} lacks {what}: it is of another architecture or was cut down; name a model "
        "that it fits, or download it again",
    )

"""Models of custom pipelines on the stage (docs/custom-pipelines.md)."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from understudyd.pipelines import CustomPipeline, Refused
from understudyd.pipelines.installed import blamed_on
from understudyd.stage.custom_request import check_declarations, make_request
from understudyd.stage.errors import BadRequest, PipelineFailed, SkeletonMismatch, StageError
from understudyd.stage.pictures import Made
from understudyd.stage.run import Run
from understudyd.stage.skeleton import Skeleton
from understudyd.stage.views import dtype_of
from understudyd.stage.wrapper import Component
from understudyd.store.records import ModelRecord, SignatureRecord

OnStep = Callable[[int, int], None]
"""`on_step(done, total)`: report progress; a checkpoint where the run may end."""


@dataclass(frozen=True, slots=True)
class CustomModel:
    """Everything a request of this model needs except weights. `pipeline` is its entry point's name."""

    name: str
    pipeline: str
    pipeline_class: type[CustomPipeline]
    components: tuple[Component, ...]
    files: Any
    config: Mapping[str, Any]
    device: torch.device
    dtype: torch.dtype

    @property
    def can_batch(self) -> bool:
        """A request is all that such a pipeline is told of."""
        return False

    def open_pipeline(self) -> CustomPipeline:
        """An object of one's own over the shared components."""
        modules = {component.name: component.skeleton.module for component in self.components}
        return self.pipeline_class(modules, self.files, copy.deepcopy(dict(self.config)))

    def play(self, run: Run, take_stage: Callable[[], None], on_step: OnStep) -> Made:
        """Run one request. Raises `BadRequest` for what the class refuses, `PipelineFailed`, or its error.

        A custom pipeline may read weights without a call that the skeletons notice, so the stage is taken
        before it, not at the first touch; what needs no weights has `prepare`.
        """
        request = make_request(self.pipeline, self.pipeline_class, run, self.device, self.dtype, on_step)
        with _blamed_on(self.pipeline):
            pipeline = self.open_pipeline()
            pipeline.prepare(request)
            take_stage()
            output = pipeline(request)
        take_stage()  # it may have swallowed a cancel
        return _checked(self.pipeline, output)


def prepare_custom(
    record: ModelRecord,
    folder: Path,
    pipeline_class: type[CustomPipeline],
    skeletons: Mapping[str, Skeleton],
    device: torch.device,
) -> CustomModel:
    """Assemble a model from skeletons by component; tries the constructor once.

    Raises `PipelineUnavailable`, `SkeletonMismatch` where the record's components are not the class's, or the
    class's own error: call it within `blaming`.
    """
    pipeline = record.pipeline_class
    model = CustomModel(
        name=record.name,
        pipeline=pipeline,
        pipeline_class=pipeline_class,
        components=tuple(Component(c.name, c.blob.sha256, skeletons[c.name]) for c in record.components),
        files=pipeline_class.read_files(folder, copy.deepcopy(record.init_kwargs)),
        config=record.init_kwargs,
        device=device,
        dtype=_main_dtype([skeletons[c.name].signature for c in record.components]),
    )
    check_declarations(pipeline_class)
    names = list(pipeline_class.components(copy.deepcopy(dict(model.config))))
    if set(names) != set(skeletons):
        raise SkeletonMismatch(
            f"it has the components {', '.join(names)}, the model {', '.join(skeletons)}; add the model again"
        )
    model.open_pipeline()
    return model


@contextmanager
def blaming(pipeline: str) -> Iterator[None]:
    """Say in every error of preparing a model which class it is of, and what to do."""
    with blamed_on(f"{pipeline} cannot be prepared", "repair it and restart the daemon", but=(StageError,)):
        try:
            yield
        except SkeletonMismatch as error:
            raise SkeletonMismatch(
                f"{pipeline} is not the code that the model was added with: {error} (after a restart of the "
                "daemon, if the code was upgraded while it ran)"
            ) from error


@contextmanager
def _blamed_on(pipeline: str) -> Iterator[None]:
    """Tell the class's refusals from its failures. What may be the device's (no memory) goes through."""
    try:
        yield
    except Refused as error:
        raise BadRequest(str(error)) from error
    except (ValueError, TypeError, SystemExit) as error:
        raise PipelineFailed(f"{pipeline} failed ({type(error).__name__}: {error})") from error


def _checked(pipeline: str, output: Any) -> Made:
    if isinstance(output, Tensor) and output.ndim in (4, 5) and len(output):
        return Made(output, is_video=output.ndim == 5)
    if isinstance(output, Sequence) and not isinstance(output, str) and output:
        return Made(list(output), is_video=isinstance(output[0], Sequence))
    raise PipelineFailed(f"{pipeline} gave {type(output).__name__}, not a list of images or a tensor of them")


def _main_dtype(signatures: Sequence[SignatureRecord]) -> torch.dtype:
    """That of the first component's first floating parameter."""
    for signature in signatures:
        for record in signature.tensors:
            dtype = dtype_of(record)
            if record.kind == "parameter" and dtype.is_floating_point:
                return dtype
    return torch.float32

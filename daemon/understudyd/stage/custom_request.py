"""What a client asked for as a custom pipeline is given it: checked against what the class declares."""

import difflib
import operator
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image

from understudyd.pipelines import CustomPipeline, Request
from understudyd.pipelines.installed import PipelineUnavailable
from understudyd.stage.calls import CallFacts, Keyword
from understudyd.stage.errors import BadRequest, PipelineFailed
from understudyd.stage.fitting import Misfit, described, fitted
from understudyd.stage.inputs import check_inputs, decode_inputs
from understudyd.stage.run import Run

_KINDS = (bool, int, float, str, list)


def check_declarations(pipeline_class: type[CustomPipeline]) -> None:
    """Check `options` and `inputs` of a class. Raises `PipelineUnavailable`."""
    kinds = ", ".join(kind.__name__ for kind in _KINDS)
    for name, declared in pipeline_class.options.items():
        if not isinstance(name, str) or _kind(declared) not in _KINDS:
            raise PipelineUnavailable(
                f"{pipeline_class.__name__}.options: {name!r} must be a {kinds} or one of these types"
            )
    if isinstance(pipeline_class.inputs, str):
        raise PipelineUnavailable(f"{pipeline_class.__name__}.inputs must be a tuple of names, not one text")


def make_request(
    pipeline: str,
    pipeline_class: type[CustomPipeline],
    run: Run,
    device: torch.device,
    dtype: torch.dtype,
    on_step: Callable[[int, int], None],
) -> Request:
    """The request, its images decoded. Raises `BadRequest`, and `RunCancelled` between two images."""
    params = run.params
    for word, value in (("task", params.task), ("scheduler", params.scheduler)):
        if value is not None:
            raise BadRequest(f"{pipeline} takes no {word}; leave it out")
    if params.format == "latent":
        raise BadRequest(f"{pipeline} gives finished images only; ask for another format than latent")

    def step(done: int, total: int) -> None:
        if not 0 <= operator.index(done) <= operator.index(total):
            raise PipelineFailed(f"{pipeline} reported step {done} of {total}")
        on_step(done, total)

    return Request(
        prompt=params.prompt,
        negative_prompt=params.negative_prompt,
        seed=params.seed,
        width=params.width,
        height=params.height,
        steps=params.steps,
        guidance=params.guidance,
        images=params.images,
        options=_options(pipeline, pipeline_class.options, params.options),
        inputs=_inputs(pipeline, pipeline_class.inputs, run),
        device=device,
        dtype=dtype,
        on_step=step,
    )


def _options(pipeline: str, declared: Mapping[str, Any], given: Mapping[str, Any]) -> Mapping[str, Any]:
    options = {name: None if isinstance(value, type) else value for name, value in declared.items()}
    for name, value in given.items():
        if name not in declared:
            raise BadRequest(f"{pipeline} takes no option {name!r:.80}; {_known(name, list(declared))}")
        if value is not None:
            options[name] = _checked(name, value, _kind(declared[name]))
    return MappingProxyType(options)


def _checked(name: str, value: Any, kind: type[Any]) -> Any:
    try:
        return fitted(value, Keyword(name, kind, None))
    except Misfit as error:
        raise BadRequest(f"option {name} is {value!r:.80}; it must be {described(kind)}") from error


def _inputs(pipeline: str, names: Sequence[str], run: Run) -> Mapping[str, tuple[Image.Image, ...]]:
    """Checked and decoded as those of a diffusers pipeline whose keywords take lists of images."""
    call = CallFacts(
        pipeline=pipeline,
        keywords={name: Keyword(name, list[Image.Image], None) for name in names},
        output_type=None,
        gives_latents=False,
        gives_video=False,
        image_names=tuple(names),
    )
    check_inputs(run.params.inputs, call, names, required=())
    found = decode_inputs(run.params.inputs, call, run.check_cancelled)
    return MappingProxyType({name: tuple(found.get(name, ())) for name in names})


def _known(name: str, names: list[str]) -> str:
    if near := difflib.get_close_matches(name, names, n=1):
        return f"did you mean {near[0]!r}?"
    return f"it takes {', '.join(names)}" if names else "it takes none"


def _kind(declared: Any) -> type[Any]:
    return declared if isinstance(declared, type) else type(declared)

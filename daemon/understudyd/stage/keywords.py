"""From a request's fields and options to the keyword arguments of one pipeline.

What a client may name is what the pipeline's own signature names, less what has a field of its own, what
only makes sense inside a process, and what would get around the limits of requests.
"""

import difflib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch

from understudyd.stage.calls import EMPTY, CallFacts, Keyword
from understudyd.stage.errors import BadRequest
from understudyd.stage.fitting import Misfit, described, fitted, is_writable, kind_of
from understudyd.stage.run import RunParams
from understudyd.stage.tasks import what_to_send
from understudyd.stage.video import DEFAULT_FPS, MAX_FPS, check_ffmpeg

MAX_FRAMES = 257
"""Frames of one video, whichever keyword asks for them."""

MAX_STEPS = 500
"""Steps that options ask for: of a second stage, or as a list of timesteps or sigmas."""

MAX_WHOLE = 2**31 - 1

_FRAMES = ("num_frames", "video_length", "frames", "base_num_frames", "num_frames_per_chunk")
_CAPS = {
    "max_sequence_length": 4096,
    "max_new_tokens": 1024,
    "prompt_max_new_tokens": 1024,
    "resolution": 2048,
    "frame_size": 512,
    "processing_resolution": 2048,
    "ensemble_size": 16,
    "decode_chunk_size": MAX_FRAMES,
    "tiles_batch_size": 16,
    "max_post_steps": MAX_STEPS,
}

_FIELDS = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "width": "width",
    "height": "height",
    "max_area": "width and height",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "num_images_per_prompt": "images",
    "num_videos_per_prompt": "images",
    "num_waveforms_per_prompt": "images",
    "batch_size": "images",
    "generator": "seed",
    "seed": "seed",
    "output_type": "format",
}
BATCHES = ("num_images_per_prompt", "num_videos_per_prompt", "batch_size")
"""How pipelines call the number of images that one prompt gives."""

_LABELS = "class_labels"
NO_TASKS: Mapping[str, CallFacts] = MappingProxyType({})
_RATES = ("fps", "frame_rate")


def call_arguments(
    params: RunParams, call: CallFacts, tasks: Mapping[str, CallFacts] = NO_TASKS
) -> dict[str, Any]:
    """The pipeline's keyword arguments, all but the images; the generator is a new one each time.

    `tasks` are the calls of what the model can do. Raises `BadRequest` naming what the pipeline does not
    take, and which of the tasks does.
    """
    if params.format == "mp4":
        if not call.gives_video:
            raise BadRequest(f"{call.pipeline} makes no video; ask for png, jpeg, webp or raw")
        check_ffmpeg()
    arguments = _fields(params, call)
    options = {name: _option(name, value, call, tasks) for name, value in _given_options(params, call)}
    _check_labels(options, params.images)
    arguments |= options
    if "generator" in call.keywords:
        # On the CPU whatever the device, as users of diffusers do to get the same image everywhere.
        arguments["generator"] = torch.Generator("cpu").manual_seed(params.seed)
    if call.output_type is not None:
        arguments["output_type"] = _output_type(params, call)
    elif params.format == "latent":
        raise BadRequest(f"{call.pipeline} gives no latents; ask for png")
    _check_required(arguments, call)
    return arguments


def _fields(params: RunParams, call: CallFacts) -> dict[str, Any]:
    known = call.keywords
    wanted = {
        "negative prompt": ("negative_prompt", params.negative_prompt),
        "width": ("width", params.width),
        "height": ("height", params.height),
        "steps": ("num_inference_steps", params.steps),
        "guidance": ("guidance_scale", params.guidance),
    }
    arguments: dict[str, Any] = {}
    if "prompt" in known:
        arguments["prompt"] = params.prompt
    elif params.prompt:
        raise BadRequest(f"{call.pipeline} takes no prompt; leave it out")
    for word, (name, value) in wanted.items():
        if value is None:
            continue
        if name not in known:
            raise BadRequest(f"{call.pipeline} takes no {word}; leave it out")
        arguments[name] = value
    batch = next((name for name in BATCHES if name in known), None)
    if batch is not None and params.images != 1:
        arguments[batch] = params.images
    elif params.images != 1 and _LABELS not in known:
        raise BadRequest(f"{call.pipeline} makes one image at a time; leave images out")
    return arguments


def frames_per_second(params: RunParams, call: CallFacts) -> float:
    """At which rate a video is to be shown: an option, else what the pipeline was trained for, if it says so.

    Raises `BadRequest`.
    """
    for name in _RATES:
        rate = params.options.get(name)
        if rate is None:
            continue
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= MAX_FPS:
            raise BadRequest(f"option {name} is {rate!r:.40}; it must be more than 0 and at most {MAX_FPS:g}")
        return float(rate)
    defaults = (call.keywords[name].default for name in _RATES if name in call.keywords)
    return next((float(rate) for rate in defaults if isinstance(rate, int | float)), DEFAULT_FPS)


def _given_options(params: RunParams, call: CallFacts) -> Iterator[tuple[str, Any]]:
    """Options for the pipeline. The rate of an mp4 may be ours alone."""
    for name, value in params.options.items():
        if params.format == "mp4" and name in _RATES and name not in call.keywords:
            continue
        yield name, value


def _output_type(params: RunParams, call: CallFacts) -> str | None:
    if params.format == "latent":
        if not call.gives_latents:
            raise BadRequest(f"{call.pipeline} gives no latents; ask for png")
        return "latent"
    # The crop is put back into the whole picture by pasting PIL images.
    return "pil" if params.options.get("padding_mask_crop") is not None else call.output_type


def _option(name: str, value: Any, call: CallFacts, tasks: Mapping[str, CallFacts]) -> Any:
    """The value of one option, as its keyword wants it."""
    if name in _FIELDS:
        raise BadRequest(f"{name} is no option; use the request's {_FIELDS[name]}")
    keyword = call.keywords.get(name)
    if keyword is None:
        raise BadRequest(_unknown(name, call, tasks))
    if keyword.takes_image:
        raise BadRequest(f"{name} is an image; send it with the request's inputs")
    if not _is_option(keyword):
        raise BadRequest(f"{name} cannot be set by a request; leave it out")
    _check_size(name, value)
    try:
        return fitted(value, keyword)
    except Misfit:
        wanted = described(kind_of(keyword))
        raise BadRequest(f"option {name} of {call.pipeline} must be {wanted}, not {value!r:.60}") from None


def _is_option(keyword: Keyword) -> bool:
    name = keyword.name
    is_ours = name in _FIELDS or name == "return_dict" or "callback" in name or keyword.takes_image
    is_tensor = keyword.kind is EMPTY and keyword.has_tensor_name
    return not is_ours and not is_tensor and is_writable(kind_of(keyword))


def option_names(call: CallFacts) -> list[str]:
    """What `options` may hold for this pipeline."""
    return sorted(name for name, keyword in call.keywords.items() if _is_option(keyword))


def _unknown(name: str, call: CallFacts, tasks: Mapping[str, CallFacts]) -> str:
    names = option_names(call)
    elsewhere: dict[str, str] = {}
    for task, other in tasks.items():
        for option in option_names(other):
            elsewhere.setdefault(option, task)
    close = [name] if name in elsewhere else difflib.get_close_matches(name, {*names, *elsewhere}, 1)
    hints = []
    if close != [name]:
        hints.append(f"did you mean {close[0]}?" if close else f"it takes {', '.join(names)}")
    if close and close[0] not in names:
        task = elsewhere[close[0]]
        hints.append(f"{task} takes it: send {what_to_send(task)}")
    return f"{call.pipeline} takes no option {name!r:.40}; {' '.join(hints)}"


def _check_size(name: str, value: Any) -> None:
    """What multiplies work has limits, however it is spelt."""
    if isinstance(value, list | tuple):
        if name.startswith(("prompt", "negative_prompt")):
            raise BadRequest(f"option {name} must be text, one for the one prompt of a request")
        if len(value) > MAX_STEPS:
            raise BadRequest(f"option {name} has {len(value)} items; {MAX_STEPS} are allowed")
    elif isinstance(value, int) and abs(value) > (limit := _limit(name)):
        raise BadRequest(f"option {name} is {value}; {limit} is the most")


def _limit(name: str) -> int:
    if name in _FRAMES:
        return MAX_FRAMES
    return MAX_STEPS if name.endswith("_steps") else _CAPS.get(name, MAX_WHOLE)


def _check_labels(options: Mapping[str, Any], images: int) -> None:
    """Pipelines that draw by class make one image for each label."""
    labels = options.get(_LABELS)
    if isinstance(labels, list) and len(labels) != images:
        raise BadRequest(f"option {_LABELS} has {len(labels)} items for {images} images; give one for each")


def _check_required(arguments: Mapping[str, Any], call: CallFacts) -> None:
    for name, keyword in call.keywords.items():
        if not keyword.is_required or name in arguments or keyword.takes_image:
            continue
        if name in _FIELDS:
            raise BadRequest(f"{call.pipeline} needs the request's {_FIELDS[name]}")
        if _is_option(keyword):
            raise BadRequest(f"{call.pipeline} needs {name}; set it in the request's options")
        raise BadRequest(f"{call.pipeline} needs {name}, which a request cannot carry")

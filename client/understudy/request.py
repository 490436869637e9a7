"""What a caller may ask for, and the message it becomes."""

import difflib
import secrets
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Required, TypedDict

from understudy.errors import CallerError
from understudy.inputs import Images, inputs_from
from understudy.wire import Adapter, Generate, Option

AdapterLike = str | tuple[str, float] | Adapter
"""A LoRA by name, as strong as it was trained, or with a scale."""


class RequestFields(TypedDict, total=False):
    """All that a request may say beside model and prompt. None, or nothing, is the pipeline's own default.

    What image: `negative_prompt`; `seed` (one that is not given is chosen here and reported in the result);
    `width` and `height`, or `size` for both, in pixels and multiples of 8; `steps`; `guidance`; `images` of
    this prompt; `scheduler`, a class name; `options`, further keyword arguments of the pipeline.

    `adapters` are LoRAs by name, or (name, scale), folded into the model in this order.

    From what: `image`, `mask` and `control_image`, or `inputs` by the pipeline's argument name, each one
    image or a list (see `inputs.ImageLike`). `task` is "text-to-image", "image-to-image" or "inpainting", or
    one of them with "-controlnet" behind it; without it the inputs decide.

    What comes back: `format` "png" (the default), "jpeg" ("jpg") or "webp" (with `quality`, 1 to 100), "raw",
    "latent", or "mp4"; `progress` events or none.

    When: `priority`, -100 to 100, higher runs earlier; `deadline_s` from now. `request_id` names the request.
    """

    negative_prompt: str | None
    seed: int | None
    size: tuple[int, int] | None
    width: int | None
    height: int | None
    steps: int | None
    guidance: float | None
    images: int
    task: str | None
    scheduler: str | None
    options: Mapping[str, Option] | None
    adapters: Sequence[AdapterLike] | None
    inputs: Mapping[str, Images] | None
    image: Images | None
    mask: Images | None
    control_image: Images | None
    priority: int
    deadline_s: float | None
    format: str
    quality: int | None
    progress: bool
    request_id: str | None


class Request(RequestFields, total=False):
    """A whole request as a dict: `Request(model="sd15", prompt="a red circle", seed=7)`."""

    model: Required[str]
    prompt: str


_INPUT_NAMES = {"image": "image", "mask": "mask_image", "control_image": "control_image"}
_COMPOSED = {"request_id", "seed", "size", "options", "adapters", "inputs", *_INPUT_NAMES}
_KNOWN = RequestFields.__annotations__.keys()


def compose(
    model: str, prompt: str, fields: Mapping[str, Any], timeout_s: float | None
) -> tuple[Generate, tuple[bytes, ...]]:
    """The message and its payload frames; `timeout_s` is the deadline of a request that names none.

    Raises `CallerError` for an unknown field or an input that is no image. Types are checked on sending.
    """
    for name in fields:
        if name not in _KNOWN:
            raise _unknown(name)
    as_they_are = {name: value for name, value in fields.items() if name not in _COMPOSED}
    if as_they_are.get("format") == "jpg":
        as_they_are["format"] = "jpeg"
    if as_they_are.get("deadline_s") is None:
        as_they_are["deadline_s"] = timeout_s
    seed = fields.get("seed")
    inputs = inputs_from(_images(fields))
    message = Generate(
        id=fields.get("request_id") or uuid.uuid4().hex,
        model=model,
        prompt=prompt,
        seed=secrets.randbits(32) if seed is None else seed,
        options=_mapping("options", fields),
        inputs=inputs.infos,
        adapters=_adapters(fields.get("adapters") or ()),
        **(as_they_are | _size(fields)),
    )
    return message, inputs.payload


def parts_of(request: "Request | Mapping[str, Any] | tuple[str, str]") -> tuple[str, str, dict[str, Any]]:
    """Model, prompt and the other fields. Raises `CallerError`."""
    match request:
        case Mapping():
            fields = dict(request)
            if "model" not in fields:
                raise CallerError(f"a request without a model: {fields!r:.80}", code="bad_request")
            return fields.pop("model"), fields.pop("prompt", ""), fields
        case (str(model), str(prompt)):
            return model, prompt, {}
    raise CallerError(
        f"a request is a dict with a model, or (model, prompt), not {request!r:.80}", code="bad_request"
    )


def _adapters(given: Any) -> tuple[Adapter, ...]:
    if isinstance(given, str | Adapter) or not isinstance(given, Sequence):
        raise CallerError(
            f'adapters is {given!r:.40}; it is a list of names and pairs, ["wrong", ("pixel-art", 0.8)]',
            code="bad_request",
        )
    return tuple(map(_adapter, given))


def _adapter(given: Any) -> Adapter:
    match given:
        case Adapter():
            return given
        case str(name):
            return Adapter(name)
        case (str(name), int() | float() as scale):
            return Adapter(name, float(scale))
    raise CallerError(f"an adapter is a name or (name, scale), not {given!r:.80}", code="bad_request")


def _images(fields: Mapping[str, Any]) -> dict[str, Images]:
    images = _mapping("inputs", fields)
    for field, name in _INPUT_NAMES.items():
        if fields.get(field) is None:
            continue
        if name in images:
            raise CallerError(f"{name!r} is given twice: as {field}= and in inputs", code="bad_request")
        images[name] = fields[field]
    return images


def _mapping(name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    value = fields.get(name) or {}
    if not isinstance(value, Mapping):
        raise CallerError(f"{name} is {value!r:.40}; it is a dict by argument name", code="bad_request")
    return dict(value)


def _size(fields: Mapping[str, Any]) -> dict[str, Any]:
    size = fields.get("size")
    if size is None:
        return {}
    if fields.get("width") is not None or fields.get("height") is not None:
        raise CallerError("size and width or height are given; give one of them", code="bad_request")
    if not isinstance(size, tuple | list) or len(size) != 2:
        raise CallerError(f"size is {size!r:.40}; it is a pair, (width, height)", code="bad_request")
    return {"width": size[0], "height": size[1]}


def _unknown(name: str) -> CallerError:
    near = difflib.get_close_matches(str(name), _KNOWN, n=1)
    advice = f"did you mean {near[0]!r}? " if near else ""
    return CallerError(
        f"a request has no field {name!r}; {advice}the pipeline's own arguments go into options={{...}}",
        code="bad_request",
    )

"""What the client library hands out."""

from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from understudy.arrays import as_numpy, safetensors_file
from understudy.errors import CallerError, TransportError, UnderstudyError
from understudy.wire import Accepted, Adapter, Finished, ImageInfo, ModelEntry, Progress, Timings

SUFFIXES: dict[str, tuple[str, ...]] = {
    "png": (".png",),
    "jpeg": (".jpg", ".jpeg"),
    "webp": (".webp",),
    "mp4": (".mp4",),
    "raw": (".safetensors",),
    "latent": (".safetensors",),
}
"""What files of each format are called; the first is the usual one."""

_PILLOW_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """A finished request: `images[i]` is a file's bytes, or raw rows, or a latent, as `infos[i]` says.

    `tier` is where the model was on receipt, `switched` whether another model was on stage before, `adapters`
    the LoRAs that were folded into it.
    """

    id: str
    model: str
    seed: int
    images: list[bytes]
    infos: tuple[ImageInfo, ...]
    timings: Timings
    tier: str
    switched: bool
    adapters: tuple[Adapter, ...] = ()

    def __repr__(self) -> str:
        """Short: what came and how long it took, without the images' bytes."""
        sizes = ", ".join(
            f"{info.format} {info.width}x{info.height}" + (f" ({count} times)" if count > 1 else "")
            for info, count in Counter(self.infos).items()
        )
        images = "1 image" if len(self.images) == 1 else f"{len(self.images)} images"
        return (
            f"Result(id={self.id!r}, model={self.model!r}, seed={self.seed}, {images}: {sizes}, "
            f"{self.timings.total_s:.3f} s)"
        )

    @property
    def clips(self) -> list["Result"]:
        """One result for each video, holding its frames in order, or its mp4 file."""
        numbers = dict.fromkeys(info.clip for info in self.infos)
        return [self._only(number) for number in numbers]

    def save(self, path: str | Path) -> list[Path]:
        """Write one file for each image and return the paths: `out.png`, or `out-0.png`, `out-1.png`, ...

        The format's suffix is added where `path` has none. Raw rows and latents become safetensors files
        with one array, "image" [height, width, channels] or "latent". Raises `CallerError` for the suffix of
        another format, `OSError` when a file cannot be written.
        """
        many = len(self.images) > 1
        digits = len(str(len(self.images) - 1))
        paths = []
        for index, (info, data) in enumerate(zip(self.infos, self.images, strict=True)):
            target = _with_suffix(Path(path), info.format)
            if many:
                target = target.with_name(f"{target.stem}-{index:0{digits}}{target.suffix}")
            target.write_bytes(_file(info, data))
            paths.append(target)
        return paths

    def pil(self) -> list[Any]:
        """The images as `PIL.Image.Image`. Needs Pillow, which the client does not install.

        Raises `CallerError` for latents and mp4 files, which are no images.
        """
        return [_pillow(info, data) for info, data in zip(self.infos, self.images, strict=True)]

    def numpy(self) -> list[Any]:
        """The images as arrays [height, width, channels] of uint8; latents with their shape and dtype.

        Needs numpy, and Pillow for files. Raises `CallerError` for mp4 files.
        """
        return [_array(info, data) for info, data in zip(self.infos, self.images, strict=True)]

    def latents(self) -> list[Any]:
        """Latents as numpy arrays. Raises `CallerError` for a result of another format."""
        if any(info.format != "latent" for info in self.infos):
            raise CallerError('this result holds no latents; ask with format="latent"', code="bad_request")
        return self.numpy()

    def _only(self, clip: int) -> "Result":
        chosen = [i for i, info in enumerate(self.infos) if info.clip == clip]
        images, infos = [self.images[i] for i in chosen], tuple(self.infos[i] for i in chosen)
        return msgspec.structs.replace(self, images=images, infos=infos)


class Pinged(msgspec.Struct, frozen=True, kw_only=True):
    """The daemon's word that it is there; `daemon` changes when it restarts."""

    daemon: str
    round_trip_s: float


Hint = Accepted | Progress
Answer = Result | Pinged | list[ModelEntry] | UnderstudyError


def result_from(reply: Finished, payload: list[bytes]) -> Result | TransportError:
    """Join header and images; a daemon that sends another number of images broke the protocol."""
    if len(payload) != len(reply.images):
        return TransportError(
            f"the daemon announced {len(reply.images)} images and sent {len(payload)}; "
            "install the client of the daemon's release",
            code="bad_reply",
        )
    return Result(
        id=reply.id,
        model=reply.model,
        seed=reply.seed,
        images=payload,
        infos=reply.images,
        timings=reply.timings,
        tier=reply.tier,
        switched=reply.switched,
        adapters=reply.adapters,
    )


def _with_suffix(path: Path, image_format: str) -> Path:
    allowed = SUFFIXES.get(image_format)
    if allowed is None:
        raise CallerError(
            f"format {image_format!r} is unknown here; install the client of the daemon's release"
        )
    suffix = path.suffix.lower()
    if suffix in allowed:
        return path
    if any(suffix in others for others in SUFFIXES.values()):
        raise CallerError(
            f"{path.name} is no name for a {image_format} result; end it in {allowed[0]}, or ask for another "
            "format",
            code="bad_request",
        )
    return path.with_name(path.name + allowed[0])


def _file(info: ImageInfo, data: bytes) -> bytes:
    if info.format == "raw":
        return safetensors_file("image", data, "uint8", (info.height, info.width, info.channels))
    if info.format == "latent":
        return safetensors_file("latent", data, info.dtype, info.shape)
    return data


def _pillow(info: ImageInfo, data: bytes) -> Any:
    import io

    if info.format in ("latent", "mp4"):
        raise CallerError(
            f"a {info.format} result is no image; "
            + (
                "use latents() or save()"
                if info.format == "latent"
                else 'use save(), or ask for format="png"'
            ),
            code="bad_request",
        )
    try:
        from PIL import Image
    except ImportError as error:
        raise CallerError("pil() needs Pillow: pip install pillow", code="missing_package") from error
    if info.format == "raw":
        return Image.frombytes(_PILLOW_MODES[info.channels], (info.width, info.height), data)
    return Image.open(io.BytesIO(data), formats=[info.format])


def _array(info: ImageInfo, data: bytes) -> Any:
    if info.format == "latent":
        return as_numpy(data, info.dtype, info.shape)
    shape = (info.height, info.width, info.channels)
    if info.format == "raw":
        return as_numpy(data, "uint8", shape)
    image = _pillow(info, data)
    return as_numpy(image.tobytes(), "uint8", (image.height, image.width, len(image.getbands())))

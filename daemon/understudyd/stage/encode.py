"""From what a pipeline made to bytes, off the stage."""

from io import BytesIO

from PIL import Image

from understudy.wire import ImageInfo
from understudyd.stage.pictures import Made, clips, latents
from understudyd.stage.video import encode_mp4

_PNG_EFFORT = 1  # zlib's fastest: ten times quicker than the default for a fifth more bytes
_QUALITY = 90


def encode_images(
    made: Made, image_format: str, quality: int | None = None
) -> tuple[list[bytes], list[ImageInfo]]:
    """Bytes and their descriptions, as `understudy.wire.ImageInfo` defines them.

    `quality` is for jpeg and webp, 1 to 100.
    """
    if image_format == "latent":
        return _encode_latents(made)
    if image_format == "mp4":
        return _encode_clips(made)
    payload: list[bytes] = []
    infos: list[ImageInfo] = []
    for clip, pictures in enumerate(clips(made)):
        for picture in pictures:
            payload.append(_encode(picture, image_format, quality))
            infos.append(
                ImageInfo(
                    format=image_format,
                    width=picture.width,
                    height=picture.height,
                    channels=len(picture.getbands()),
                    clip=clip,
                )
            )
    return payload, infos


def _encode(picture: Image.Image, image_format: str, quality: int | None) -> bytes:
    if image_format == "raw":
        rows: bytes = picture.tobytes()
        return rows
    effort = {"compress_level": _PNG_EFFORT}
    options = effort if image_format == "png" else {"quality": _QUALITY if quality is None else quality}
    if image_format == "jpeg" and picture.mode == "RGBA":
        picture = picture.convert("RGB")
    buffer = BytesIO()
    picture.save(buffer, image_format.upper(), **options)
    return buffer.getvalue()


def _encode_latents(made: Made) -> tuple[list[bytes], list[ImageInfo]]:
    arrays = list(latents(made))
    infos = [
        ImageInfo(
            format="latent",
            width=array.shape[-1] if array.ndim else 1,
            height=array.shape[-2] if array.ndim > 1 else 1,
            channels=array.shape[0] if array.ndim > 2 else 1,
            shape=array.shape,
            dtype=str(array.dtype),
            clip=clip if made.is_video else 0,
        )
        for clip, array in enumerate(arrays)
    ]
    return [array.tobytes() for array in arrays], infos


def _encode_clips(made: Made) -> tuple[list[bytes], list[ImageInfo]]:
    payload: list[bytes] = []
    infos: list[ImageInfo] = []
    for clip, pictures in enumerate(clips(made)):
        frames = [picture.convert("RGB") for picture in pictures]
        payload.append(encode_mp4(frames, made.fps))
        width, height = frames[0].size
        infos.append(
            ImageInfo(format="mp4", width=width, height=height, clip=clip, frames=len(frames), fps=made.fps)
        )
    return payload, infos

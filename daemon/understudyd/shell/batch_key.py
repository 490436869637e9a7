"""Which requests for a model one call of its pipeline could serve: those whose keys are equal."""

import msgspec

from understudy.wire import Generate

_NOISE_BLOCK = 16
_LATENT_PIXELS = 64
_encoder = msgspec.json.Encoder(order="deterministic")


def batch_key(request: Generate) -> str:
    """Everything that one call has once: all but texts, seed, and how the images are encoded.

    Empty for a request that shares with nobody: with input images, for a video, or for several images whose
    noise would be another one if it were drawn image by image.
    """
    if request.inputs or request.format == "mp4" or not _draws_image_by_image(request):
        return ""
    settings = (
        request.task,
        request.width,
        request.height,
        request.steps,
        request.guidance,
        request.scheduler,
        request.options,
        request.negative_prompt is None,
        request.format == "latent",
    )
    return _encoder.encode(settings).decode()


def _draws_image_by_image(request: Generate) -> bool:
    """Torch draws normal numbers on the CPU in blocks of 16, and an unfinished block otherwise.

    So two images at once get the numbers of one after the other only where an image's latents fill blocks: of
    four channels, and an eighth of the image's width and height, at the least.
    """
    if request.images == 1 or request.width is None or request.height is None:
        return True
    return request.width * request.height * 4 // _LATENT_PIXELS % _NOISE_BLOCK == 0

"""What the client library hands out."""

from pathlib import Path
from typing import Any

import msgspec

from understudy.errors import CallerError, TransportError, UnderstudyError
from understudy.wire import Accepted, Finished, ImageInfo, ModelEntry, Progress, Timings


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """Finished images: `images[i]` is a PNG file's bytes, or raw rows, as `infos[i]` says.

    `tier` is where the model was on receipt, `switched` whether another model was on stage before.
    """

    id: str
    model: str
    seed: int
    images: list[bytes]
    infos: tuple[ImageInfo, ...]
    timings: Timings
    tier: str
    switched: bool

    def save(self, path: str | Path) -> list[Path]:
        """Write the PNG files and return their paths: `out.png`, or `out-0.png`, `out-1.png`, ..."""
        path = Path(path)
        if any(info.format != "png" for info in self.infos):
            raise CallerError('only PNG images can be saved; ask with format="png", or use pil()')
        paths = [path]
        if len(self.images) > 1:
            paths = [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(len(self.images))]
        for target, image in zip(paths, self.images, strict=True):
            target.write_bytes(image)
        return paths

    def pil(self) -> list[Any]:
        """The images as `PIL.Image.Image`. Needs Pillow, which the client does not install."""
        import io

        from PIL import Image

        def opened(info: ImageInfo, data: bytes) -> Any:
            if info.format == "png":
                return Image.open(io.BytesIO(data))
            return Image.frombytes("RGB" if info.channels == 3 else "RGBA", (info.width, info.height), data)

        return [opened(info, data) for info, data in zip(self.infos, self.images, strict=True)]


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
    )

"""Format and size of an image file, read from its first bytes. Nothing is decoded.

For both ends of the wire: the client describes a file without Pillow, the daemon compares the description
with the file before any decoder sees it. Sources: PNG (ISO/IEC 15948, IHDR), JPEG (ITU-T T.81, B.2), WebP
(RFC 9649).
"""

from dataclasses import dataclass

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 4, 6: 4}  # grey with alpha and palettes have no raw form here
_JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_JPEG_BARE = {0x01, *range(0xD0, 0xD8)}  # markers without a length
_JPEG_MAX_SEGMENTS = 2048
_WEBP_HAS_ALPHA, _WEBP_IS_ANIMATED = 0x10, 0x02


class HeaderError(ValueError):
    """These bytes are no image file that can be sent; the message says why."""


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """`format` is "png", "jpeg" or "webp"; sizes are pixels; `channels` is 1, 3 or 4."""

    format: str
    width: int
    height: int
    channels: int


def read_header(data: bytes) -> ImageHeader:
    """The header of a file's bytes. Raises `HeaderError`, nothing else, whatever the bytes are."""
    if data.startswith(_PNG_SIGNATURE):
        header = _png(data)
    elif data.startswith(b"\xff\xd8\xff"):
        header = _jpeg(data)
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        header = _webp(data)
    else:
        raise HeaderError("these bytes are no PNG, JPEG or WebP file")
    if header.width < 1 or header.height < 1:
        raise HeaderError(f"the {header.format} file says that it is {header.width}x{header.height}")
    return header


def _png(data: bytes) -> ImageHeader:
    if len(data) < 33 or data[8:16] != b"\x00\x00\x00\rIHDR":
        raise HeaderError("the png file is cut off or broken: it has no IHDR chunk")
    channels = _PNG_CHANNELS.get(data[25])
    if channels is None:
        raise HeaderError(f"the png file's colour type {data[25]} does not exist")
    return ImageHeader("png", int.from_bytes(data[16:20]), int.from_bytes(data[20:24]), channels)


def _jpeg(data: bytes) -> ImageHeader:
    at = 2
    for _ in range(_JPEG_MAX_SEGMENTS):
        marker, length = data[at : at + 2], int.from_bytes(data[at + 2 : at + 4])
        if len(marker) < 2 or marker[0] != 0xFF:
            break
        if marker[1] == 0xFF:  # a fill byte
            at += 1
        elif marker[1] in _JPEG_BARE:
            at += 2
        elif length < 2:
            break
        elif marker[1] in _JPEG_FRAMES:
            return _jpeg_frame(data[at + 4 : at + 10])
        else:
            at += 2 + length
    raise HeaderError("the jpeg file is cut off or broken: it has no frame header")


def _jpeg_frame(frame: bytes) -> ImageHeader:
    if len(frame) < 6 or frame[5] not in (1, 3, 4):
        raise HeaderError("the jpeg file is cut off or broken: its frame header has no 1, 3 or 4 components")
    channels = 1 if frame[5] == 1 else 3  # four are CMYK, which becomes RGB
    return ImageHeader("jpeg", int.from_bytes(frame[3:5]), int.from_bytes(frame[1:3]), channels)


def _webp(data: bytes) -> ImageHeader:
    kind, body = data[12:16], data[20:30]
    if kind == b"VP8X" and len(body) == 10:
        if body[0] & _WEBP_IS_ANIMATED:
            raise HeaderError("the webp file is an animation; send one image")
        width, height = (int.from_bytes(body[at : at + 3], "little") + 1 for at in (4, 7))
        return ImageHeader("webp", width, height, 4 if body[0] & _WEBP_HAS_ALPHA else 3)
    if kind == b"VP8 " and len(body) == 10 and body[3:6] == b"\x9d\x01\x2a":
        width, height = (int.from_bytes(body[at : at + 2], "little") & 0x3FFF for at in (6, 8))
        return ImageHeader("webp", width, height, 3)
    if kind == b"VP8L" and len(body) >= 5 and body[0] == 0x2F:
        bits = int.from_bytes(body[1:5], "little")
        return ImageHeader("webp", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, 4 if bits >> 28 & 1 else 3)
    raise HeaderError("the webp file is cut off or broken: it has no image chunk")

"""Small files that would become large: refused before anything is decoded, or decoded within bounds."""

import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import pytest

from understudy.wire import Failed, InputInfo
from understudyd.shell.limits import Limits
from wire_kit import Dealer, ipc, request, serving

SIDE = 60_000
TEXT = zlib.compress(b"A" * 200_000_000, 9)


def png(width: int, height: int, rows: bytes, chunks: Iterable[tuple[bytes, bytes]] = ()) -> bytes:
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in (header, *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    )


ROWS = (b"\0" + bytes(32 * 3)) * 32
BOMBS = {
    "zTXt": png(32, 32, ROWS, [(b"zTXt", b"key\0\0" + TEXT)]),
    "iTXt": png(32, 32, ROWS, [(b"iTXt", b"key\0\1\0\0\0" + TEXT)]),
    "iCCP": png(32, 32, ROWS, [(b"iCCP", b"profile\0\0" + TEXT)]),
    "rows": png(32, 32, b"\0" * 200_000_000),
}


@pytest.mark.parametrize(
    ("told", "says"), [(SIDE, "pixels, the limit is"), (32, "announce what the file says")]
)
def test_large_pixels_are_refused_at_the_door(tmp_path: Path, told: int, says: str) -> None:
    """Honestly announced, or not."""
    info = InputInfo(name="image", format="png", width=told, height=told)
    with serving(ipc(tmp_path)) as served, Dealer(served.endpoint) as dealer:
        dealer.send(request(inputs=(info,)), png(SIDE, SIDE, b""))
        reply = dealer.receive()
        assert isinstance(reply, Failed) and reply.code == "bad_request" and says in reply.message
        assert served.sink.submitted == []


def test_many_small_images_are_refused_together(tmp_path: Path) -> None:
    info = InputInfo(name="image", format="png", width=32, height=32)
    with serving(ipc(tmp_path), limits=Limits()) as served, Dealer(served.endpoint) as dealer:
        dealer.send(request(inputs=(info,) * 17), *[png(32, 32, ROWS)] * 17)
        reply = dealer.receive()
        assert isinstance(reply, Failed) and "17 inputs, the limit is 16" in reply.message
        assert served.sink.submitted == []


@pytest.mark.parametrize("kind", BOMBS)
def test_what_hides_in_a_small_image_does_not_unfold(kind: str) -> None:
    """The door cannot see it; the decoder stays within bounds: an image or a typed error, little memory."""
    from understudyd.stage.errors import BadRequest
    from understudyd.stage.inputs import _decode

    data = BOMBS[kind]
    assert len(data) < 1_000_000
    info = InputInfo(name="image", format="png", width=32, height=32)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew (proc(5))
    before_kb = high_water_kb()
    try:
        assert _decode(info, data).size == (32, 32)
    except BadRequest as error:
        assert "no readable png" in str(error)
    assert high_water_kb() - before_kb < 100_000


def high_water_kb() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    return int(line.split()[1])

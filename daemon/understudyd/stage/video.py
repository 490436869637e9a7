"""Frames into an MP4 file, by the machine's own ffmpeg where there is one."""

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from understudyd.stage.errors import BadRequest, StageError

DEFAULT_FPS = 8.0
MAX_FPS = 120.0
_TIME_LIMIT_S = 120.0
_MESSAGE_CHARS = 200


def check_ffmpeg() -> str:
    """The path of ffmpeg. Raises `BadRequest` where there is none."""
    path = shutil.which("ffmpeg")
    if path is None:
        raise BadRequest(
            "this daemon finds no ffmpeg, so it cannot make mp4; install ffmpeg on its machine, or ask for "
            "png, jpeg, webp or raw frames"
        )
    return path


def encode_mp4(frames: Sequence[Image.Image], fps: float) -> bytes:
    """H.264 in an MP4 file that starts to play before it is whole. `frames` are RGB, of one size.

    ffmpeg wants to seek in what it writes, so it writes a file. Raises `StageError` when it fails.
    """
    width, height = frames[0].size
    with tempfile.TemporaryDirectory(prefix="understudy-") as folder:
        path = Path(folder) / "clip.mp4"
        command = [
            check_ffmpeg(), "-hide_banner", "-loglevel", "error",
            "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{fps:g}",
            "-i", "pipe:0",
            "-an", "-c:v", "libx264", "-crf", "18",
            # Players know 4:2:0 and little else; it wants even sizes.
            "-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2", "-pix_fmt", "yuv420p",
            "-movflags", "+faststart", str(path),
        ]  # fmt: skip
        rows = b"".join(frame.tobytes() for frame in frames)
        try:
            subprocess.run(command, input=rows, capture_output=True, timeout=_TIME_LIMIT_S, check=True)
            return path.read_bytes()
        except subprocess.CalledProcessError as error:
            said = error.stderr.decode(errors="replace").strip()[-_MESSAGE_CHARS:]
            raise StageError(f"ffmpeg failed with {error.returncode}: {said}") from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise StageError(f"ffmpeg made no video: {error}"[:_MESSAGE_CHARS]) from error

"""Where the trained family's weights lie."""

from pathlib import Path

FOLDER = Path(__file__).parent / "models"

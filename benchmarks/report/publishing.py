"""What results may tell: figures, and texts without places."""

import re
from typing import Any

from benchmarks.kit import rounded

_PATH = re.compile(r"(?<![\w.:/])/(?:[^\s/'\":,;()]+/)+([^\s/'\":,;()]*)")


def without_places(text: str) -> str:
    """The text with every absolute path reduced to its last part: results are published."""
    return _PATH.sub(r"\1", text)


def publishable(value: Any) -> Any:
    """Floats to four decimals, texts without paths."""
    match value:
        case str():
            return without_places(value)
        case dict():
            return {key: publishable(item) for key, item in value.items()}
        case list():
            return [publishable(item) for item in value]
        case _:
            return rounded(value)

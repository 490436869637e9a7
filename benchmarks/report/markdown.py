"""Tables as markdown, prose in lines."""

import textwrap
from collections.abc import Sequence

_WIDTH = 118


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, texts: int = 1) -> str:
    """Lines of one table; the first columns are `texts`, the others figures."""
    rules = ["---" if number < texts else "---:" for number in range(len(headings))]
    return "\n".join(map(_line, [headings, rules, *rows]))


def prose(text: str) -> str:
    """A paragraph in lines of readable length."""
    return textwrap.fill(" ".join(text.split()), _WIDTH, break_long_words=False, break_on_hyphens=False)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

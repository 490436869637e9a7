"""What the checkers say of the pictures that came back: what was asked for, by the model that was asked?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from understudy_demo.checker import check
from understudy_demo.drawing import SIDE
from understudy_demo.members import Member
from understudy_demo.style_checker import style_of
from understudy_demo.wishes import parse
from understudy_demo.workload import Request


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of `images`, how many show all that was asked for, are in a style of the asked model, and are both."""

    images: int
    shown: int
    in_style: int
    both: int

    def __str__(self) -> str:
        return f"{self.both} of {self.images}"


class Judge:
    """Looks at pictures of a family's members; at one that it has seen before it does not look again."""

    def __init__(self, members: Sequence[Member]) -> None:
        self._styles = {member.name: member.styles for member in members}
        self._known: dict[tuple[str, str, bytes], tuple[bool, bool]] = {}

    def verdict(self, requests: Sequence[Request], images: Mapping[int, bytes]) -> Verdict:
        """Of raw RGB rows, SIDE x SIDE, by the index of their requests."""
        seen = [self._look(r.model, r.prompt, images[r.index]) for r in requests if r.index in images]
        shown, in_style = sum(s for s, _ in seen), sum(i for _, i in seen)
        return Verdict(len(seen), shown, in_style, sum(s and i for s, i in seen))

    def _look(self, model: str, prompt: str, rows: bytes) -> tuple[bool, bool]:
        """Whether it shows what the prompt says, and whether it is in a style of the model.

        A mixture may look like any of its parts.
        """
        key = (model, prompt, rows)
        if key not in self._known:
            picture = np.frombuffer(rows, np.uint8).reshape(SIDE, SIDE, 3).astype(np.float32)
            wish, allowed = parse(prompt), self._styles[model]
            shown = any(not check(picture, wish, style) for style in allowed)
            self._known[key] = shown, style_of(picture) in allowed
        return self._known[key]

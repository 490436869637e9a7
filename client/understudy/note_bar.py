"""How far a long admin command is."""

from typing import Any, Self

from rich.console import Console


class NoteBar:
    """Progress notes of a long command as a bar on stderr; nothing at all if no note comes."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._bars: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def update(self, note: Any) -> None:
        """Show an `admin.Note`."""
        if self._bars is None:
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

            columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
            self._bars = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bars.start()
            self._task = self._bars.add_task(self._what, total=None)
        description = f"{self._what}: {note.phase}"
        self._bars.update(self._task, description=description, completed=note.done, total=note.total or None)

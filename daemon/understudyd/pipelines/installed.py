"""Finding installed pipeline classes: entry points and nothing else, so never code from a model's folder."""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from understudyd.pipelines.pipeline import CustomPipeline

GROUP = "understudy.pipelines"
"""The entry-point group; also what records name as the library of these classes."""


class PipelineUnavailable(Exception):
    """A pipeline class cannot be used here; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class InstalledPipeline:
    """An entry point of the group. `package` is its distribution's name and version, for people."""

    name: str
    package: str
    entry_point: EntryPoint

    def __str__(self) -> str:
        return f"{self.name} (of {self.package})"

    def load(self) -> type[CustomPipeline]:
        """Import the class. Raises `PipelineUnavailable`."""
        with blamed_on(f"{self} cannot be imported", "install it anew"):
            found = self.entry_point.load()
        if not (isinstance(found, type) and issubclass(found, CustomPipeline)):
            raise PipelineUnavailable(
                f"{self}: {self.entry_point.value} is no subclass of understudyd.pipelines.CustomPipeline"
            )
        return found


def find_installed(name: str) -> InstalledPipeline:
    """The installed pipeline of this name. Raises `PipelineUnavailable`; imports nothing of it."""
    entries = entry_points(group=GROUP)
    found = [entry for entry in entries if entry.name == name]
    if len(found) > 1:
        packages = " and ".join(sorted(_package(entry) for entry in found))
        raise PipelineUnavailable(f"{packages} both provide the pipeline {name!r}; uninstall one of them")
    if not found:
        names = sorted({entry.name for entry in entries})
        raise PipelineUnavailable(
            f"no installed package provides the pipeline {name!r:.80} (entry-point group {GROUP}); "
            f"{_suggestion(name, names)}, into the Python environment that runs the daemon, "
            "or restart the daemon if it was installed after the daemon started"
        )
    return InstalledPipeline(name, _package(found[0]), found[0])


@contextmanager
def blamed_on(what: str, advice: str, *, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn whatever foreign code raises into `PipelineUnavailable`, except errors of the types `but`."""
    let_through: tuple[type[Exception], ...] = (PipelineUnavailable, MemoryError, *but)
    try:
        yield
    except let_through:
        raise
    except (Exception, SystemExit) as error:  # a class may call sys.exit; that must not end a thread of ours
        raise PipelineUnavailable(f"{what} ({type(error).__name__}: {str(error)[:500]}); {advice}") from error


def _package(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else "an unnamed package"


def _suggestion(name: str, names: list[str]) -> str:
    if near := difflib.get_close_matches(name, names, n=1):
        return f"did you mean {near[0]!r}? Otherwise install the package that has it"
    if names:
        return f"there are {', '.join(names)}; install the package that has it"
    return "there are none at all; install the package that has it"

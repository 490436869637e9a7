"""`python -m zoo.document FILE` writes the page of what is served and refused, from the test tables."""

import sys
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import transformers

from understudyd.stage.tasks import fits_unet, missing_components, task_classes
from zoo.kinds import KINDS, Kind
from zoo.refusals import REFUSALS

_HEAD = """\
# Models

<!-- Written by `make docs-models` from tests/zoo; do not edit. -->

Any diffusers folder works whose pipeline and components are classes of diffusers or transformers, unless it
is refused for one of the reasons below. What follows is what the tests prove, with tiny models of the
libraries' own classes: {kinds} kinds, two fine-tunes of each, in one daemon whose arena holds only a few.

For every row `tests/test_kinds.py` checks, through the daemon:

* the images, or every frame, are equal to plain diffusers' `from_pretrained` on the CPU, bit for bit, but for
  one kind that says so;
* so they are again after the other fine-tune has had the stage (A, B, A);
* a request cancelled half-way leaves nothing behind: the next ones are right;
* afterwards every tensor of every bound component lies in the arena.

"Tasks" are what a request may ask for by name over the same resident components; every model also serves
its own pipeline without a task.

| kind | pipeline | tasks | what is special |
| --- | --- | --- | --- |
"""

_WAYS_IN = """
## Ways in

`understudyctl add NAME SOURCE`, or `understudyd ingest` without a daemon; `tests/test_store_*.py` prove each.

* **A diffusers folder**, kept in the dtype of its files, component by component (`--dtype` converts).
* **A hub id**, `org/name`, `org/name@revision`, or a cache entry: what is needed of one commit, which the
  record names. `HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` mean what they mean everywhere.
* **A single `.safetensors` checkpoint** of SD 1.x, SD 2.x or SDXL, with configs and missing components from a
  model of the store (`--like MODEL`) or a folder (`--config`). It equals diffusers' `from_single_file`: one
  dtype for all components, by default that of its UNet; no safety checker.
* **A folder tree** (`--scan DIR`): all of the above below it, in one process; `--dry-run` shows what would
  happen.
* **A class of your own** (`--pipeline NAME`): see [custom pipelines](custom-pipelines.md).
* **Other stores**, read-only: `[store] read_only` in the configuration; `understudyctl rescan` looks again.

A name that exists is replaced with `--replace`, between two requests.
"""

_REFUSED = """
## Refused when it is added

Nothing of a refused model stays in the store. The messages are the real ones, said by `understudyctl add`
and checked by `tests/test_kinds_document.py`.

| what | code | message |
| --- | --- | --- |
"""


def page() -> str:
    """The whole page."""
    rows = [_row(kind) for kind in KINDS]
    return _HEAD.format(kinds=len(KINDS)) + "".join(rows) + _WAYS_IN + _REFUSED + "".join(_refusals())


def _row(kind: Kind) -> str:
    pipeline = kind.build(1)
    tasks = ", ".join(_tasks(pipeline)) or "its own"
    return f"| {kind.name} | `{type(pipeline).__name__}` | {tasks} | {kind.special} |\n"


def _tasks(pipeline: Any) -> list[str]:
    name = type(pipeline).__name__
    arguments = {key: value for key, value in pipeline.config.items() if not key.startswith("_")}
    given = arguments | {key: part for key, part in pipeline.components.items() if part is not None}
    return [
        task
        for task, served in task_classes(name).items()
        if served.__name__ == name
        or not (missing_components(served, given.keys()) or not fits_unet(task, given))
    ]


def _refusals() -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        workplace = Path(folder)
        good = next(kind for kind in KINDS if kind.name == "sd15").save(1, workplace / "good")
        found = [(refusal.what, *refusal.message(good, workplace)) for refusal in REFUSALS]
    return [f"| {what} | `{code}` | {_without_versions(message)} |\n" for what, code, message in found]


def _without_versions(message: str) -> str:
    for library in (diffusers, transformers):
        message = message.replace(f" {library.__version__}", "")
    return message


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())

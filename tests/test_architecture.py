"""The house rules that a reader may rely on: who imports whom, how long files are, what is never called."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_LINES = 400
TORCH = {"torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "torchvision"}
TORCH_FREE_STORE = {"records", "store", "guard", "safetensors_file", "union", "usage", "writer", "reporting"}
TORCH_FREE_ADAPTERS = {"records", "plain", "facts", "files", "shelf", "overlays", "ingest", "cli"}
PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
RUNS_TEXT = {"eval", "exec", "compile", "__import__"}
SHELLS = {
    ("os", "system"),
    ("os", "popen"),
    ("asyncio", "create_subprocess_shell"),
    ("subprocess", "getoutput"),
    ("subprocess", "getstatusoutput"),
}
UNPICKLES = {("torch", "load"), ("torch", "save"), ("numpy", "load"), ("np", "load"), ("yaml", "load")}


@dataclass(frozen=True)
class Source:
    """One Python file of ours; `module` is its dotted name."""

    path: Path
    module: str

    @cached_property
    def text(self) -> str:
        return self.path.read_text()

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def imports(self) -> set[str]:
        """Dotted names of everything that is imported, anywhere in the file; relative ones resolved."""
        names = set()
        package = self.module.split(".") if self.path.name == "__init__.py" else self.module.split(".")[:-1]
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                start = ".".join([*base, *([node.module] if node.module else [])])
                names |= {start, *(f"{start}.{alias.name}" for alias in node.names)}
        return names

    def does_import(self, *prefixes: str) -> set[str]:
        return {n for n in self.imports if any(n == p or n.startswith(f"{p}.") for p in prefixes)}

    def __str__(self) -> str:
        return self.module


def sources(*folders: str) -> Iterator[Source]:
    for folder in folders:
        base = ROOT / folder
        for path in sorted(base.rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            yield Source(path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts))


CLIENT, DAEMON = list(sources("client")), list(sources("daemon"))
OURS = [*CLIENT, *DAEMON]
SHIPPED = [
    *OURS,
    *sources("demo"),
    *(Source(s.path, f"benchmarks.{s.module}") for s in sources("benchmarks")),
]


def room(name: str) -> list[Source]:
    return [
        s for s in DAEMON if s.module == f"understudyd.{name}" or s.module.startswith(f"understudyd.{name}.")
    ]


def broken(found: dict[Source, set[str]]) -> str:
    return "\n".join(
        f"{source} imports {', '.join(sorted(names))}" for source, names in found.items() if names
    )


@pytest.mark.parametrize(
    ("name", "above"),
    [
        ("core", ["store", "loader", "stage", "shell", "main", "config", "simulate"]),
        ("loader", ["core", "store", "stage", "shell", "main", "config", "simulate"]),
        ("pipelines", ["core", "loader", "store", "stage", "shell", "main", "config", "simulate"]),
        ("store", ["core", "stage", "shell", "main", "config", "simulate"]),
        ("stage", ["shell", "main", "config", "simulate"]),
        ("shell", ["main", "simulate"]),
        ("simulate", ["store", "loader", "stage", "shell", "main"]),
    ],
)
def test_imports_point_downwards(name: str, above: list[str]) -> None:
    found = {s: s.does_import(*(f"understudyd.{room}" for room in above)) for s in room(name)}
    assert found and not broken(found), broken(found)


def test_the_core_knows_nobody() -> None:
    found = {
        s: {n for n in s.does_import("understudyd", "understudy") if ".core" not in n} for s in room("core")
    }
    assert not broken(found), broken(found)


def test_a_loader_is_light() -> None:
    """It starts in a tenth of a second because it imports next to nothing."""
    light = {*sys.stdlib_module_names, "msgspec", "xxhash", "cuda", "understudyd"}
    found = {s: {n for n in s.imports if n.split(".")[0] not in light} for s in room("loader")}
    assert found and not broken(found), broken(found)


def test_the_simulator_needs_no_daemon_and_draws_only_when_asked() -> None:
    light = {*sys.stdlib_module_names, "msgspec", "click", "rich", "understudyd"}
    found = {s: {n for n in s.imports if n.split(".")[0] not in light} for s in room("simulate")}
    drawing = {s.module for s, names in found.items() if names}
    assert drawing == {"understudyd.simulate.plot"}


def test_the_client_knows_neither_daemon_nor_torch() -> None:
    found = {s: s.does_import("understudyd", *TORCH) for s in CLIENT}
    assert found and not broken(found), broken(found)


def may_import_torch(source: Source) -> bool:
    parts = source.module.split(".")
    match parts[1:]:
        case ["stage" | "pipelines", *_]:
            return True
        case ["store", "adapters", file]:
            return file not in TORCH_FREE_ADAPTERS
        case ["store", *rest]:
            return not (rest and rest[0] in TORCH_FREE_STORE)
        case ["shell", file]:
            return file.startswith("memory")
        case _:
            return False


def test_torch_is_imported_where_tensors_are_and_nowhere_else() -> None:
    found = {s: s.does_import(*TORCH) for s in OURS if not may_import_torch(s)}
    assert not broken(found), broken(found)


@pytest.mark.parametrize("source", OURS, ids=str)
def test_files_are_short(source: Source) -> None:
    lines = source.text.count("\n")
    assert lines <= MAX_LINES, f"{source.path.relative_to(ROOT)} has {lines} lines: find its natural split"


def forbidden(source: Source) -> Iterator[str]:
    """What could run somebody else's code."""
    for name in source.imports:
        if name.split(".")[0] in PICKLES:
            yield f"imports {name}"
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in RUNS_TEXT:
            yield f"line {node.lineno}: {node.func.id}()"
        if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            called = (node.func.value.id, node.func.attr)
            if called in SHELLS | UNPICKLES:
                yield f"line {node.lineno}: {'.'.join(called)}()"
        for keyword in node.keywords:
            is_false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg in ("shell", "allow_pickle", "trust_remote_code") and not is_false:
                yield f"line {node.lineno}: {keyword.arg}="


@pytest.mark.parametrize("source", SHIPPED, ids=str)
def test_nothing_unpickles_evaluates_or_calls_a_shell(source: Source) -> None:
    assert not list(forbidden(source))


def test_the_rules_see_what_they_forbid(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text(
        "import pickle\nfrom ..core import machine\nfrom torch import nn\n"
        "eval('1')\nsubprocess.run('x', shell=True)\nos.system('x')\ntorch.load('x')\nmodel.eval()\n"
        "__import__('x')\nload(x, trust_remote_code=True)\nload(x, allow_pickle=False)\nre.compile('x')\n"
    )
    bad = Source(path, "understudyd.loader.bad")
    assert len(list(forbidden(bad))) == 7
    assert bad.does_import("understudyd.core", "torch") == {
        "understudyd.core", "understudyd.core.machine", "torch", "torch.nn",
    }  # fmt: skip
    assert not may_import_torch(bad) and may_import_torch(Source(path, "understudyd.shell.memory_cuda"))

"""Which hardware and which sources, in words that tell no place."""

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

from benchmarks.report.results import Machine

ROOT = Path(__file__).parents[2]
_PACKAGES = (
    "torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "pyzmq", "msgspec", "uvloop",
    "numpy",
)  # fmt: skip
_WRITTEN_BY_THE_REPORT = ("benchmarks/results", "docs", "README.md")


def describe_machine() -> Machine:
    """From /proc and the installed packages."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    memory_kib = int(_field(Path("/proc/meminfo").read_text(), "MemTotal").split()[0])
    return Machine(
        cpu=_field(cpuinfo, "model name") or platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(memory_kib / 2**20),
        is_virtual="hypervisor" in _field(cpuinfo, "flags").split(),
        kernel=".".join(platform.release().split(".")[:2]),
        python=platform.python_version(),
        packages={name: version for name in _PACKAGES if (version := _version(name))},
    )


def host_of(machine: Machine) -> str:
    """A name for the hardware that makes a file name: "amd-epyc-9654-2-cores"."""
    plain = re.sub(r"\((r|tm)\)|\b(cpu|processor)\b|@.*", " ", machine.cpu.lower())
    return f"{re.sub(r'[^a-z0-9]+', '-', plain).strip('-')}-{machine.cores}-cores"


def revision(root: Path = ROOT) -> str:
    """The commit's short name, "-dirty" behind it when sources differ; "unknown" outside a repository."""
    unchanged = [f":(exclude){path}" for path in _WRITTEN_BY_THE_REPORT]
    try:
        commit = _git(root, "rev-parse", "--short=10", "HEAD")
        changed = _git(root, "status", "--porcelain", "--", ".", *unchanged)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}-dirty" if changed else commit


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _field(text: str, name: str) -> str:
    found = re.search(rf"^{name}\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""

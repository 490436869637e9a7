"""Understudy's check on a real GPU: `python -m benchmarks.gpu`, straight from the source tree.

The packages of the tree are put on the path, for this process and for those that it starts: nothing need be
installed but torch, diffusers, transformers, msgspec, xxhash, rich and, for a GPU, cuda-bindings.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_FOLDERS = [str(ROOT), *(str(ROOT / name) for name in ("client", "daemon", "demo"))]

sys.path[:0] = [folder for folder in _FOLDERS if folder not in sys.path]
os.environ["PYTHONPATH"] = os.pathsep.join([*_FOLDERS, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)

"""A configuration that cannot start on this machine: `config check` says so, and `serve` makes nothing."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from daemon_kit import configuration
from loader_cuda_kit import FakeDriver, FakeGpu
from understudyd import config
from understudyd.loader import cuda
from understudyd.loader.cuda import CudaError


@pytest.mark.parametrize(
    ("gpus", "gpu", "says"),
    [
        ("no package", "0", "install Understudy with its extra cuda"),
        ("no driver", "0", "Failed to dlopen libcuda.so.1"),
        (0, "0", "no GPU is visible"),
        (2, "2", "there is no such GPU"),
        (2, "GPU-7", "no visible GPU has the UUID GPU-7"),
    ],
)
def test_check_refuses_a_device_that_is_not_here(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    gpus: str | int,
    gpu: str,
    says: str,
) -> None:
    def driver() -> Any:
        match gpus:
            case "no package":
                raise CudaError("import", "ImportError", "install Understudy with its extra cuda")
            case "no driver":
                raise CudaError("cuInit", "RuntimeError", "Failed to dlopen libcuda.so.1")
            case _:
                return FakeDriver(FakeGpu(count=int(gpus)))

    monkeypatch.setattr(cuda, "load_driver", driver)
    path = tmp_path / "u.toml"
    path.write_text(f'[device]\nkind = "cuda"\ngpu = "{gpu}"\n')
    assert config.main(["check", str(path)]) == 1
    told = capsys.readouterr()
    assert 'device.kind is "cuda" and this machine cannot serve on CUDA' in told.err and says in told.err
    assert told.out == "", "it is not called good as well"


def test_check_takes_a_device_that_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "load_driver", lambda: FakeDriver(FakeGpu(count=2)))
    path = tmp_path / "u.toml"
    path.write_text('[device]\nkind = "cuda"\ngpu = "1"\n')
    assert config.main(["check", str(path)]) == 0


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"device": {"kind": "cuda", "gpu": "GPU-7"}}, "cannot serve on CUDA"),
        ({"device": {"arena": "9000TiB"}}, "is not possible"),
        ({"server": {"endpoints": ["tcp://0.0.0.0:7001"]}}, "understudy keygen"),
        ({"metrics": {"endpoints": ["tcp://0.0.0.0:7002"]}}, "allow_remote"),
        ({"curve": {"secret_key": "/no/such.key"}}, "client_keys"),
    ],
)
def test_what_cannot_start_makes_no_store(tmp_path: Path, sections: dict[str, Any], says: str) -> None:
    store, path = tmp_path / "store", tmp_path / "u.toml"
    path.write_text(configuration(store, tmp_path / "run", **sections))
    command = [sys.executable, "-m", "understudyd.main", "serve", "--config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr
    assert not store.exists()

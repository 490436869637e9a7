"""The shipped units as systemd itself judges them, without running anything."""

import configparser
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

UNITS = Path(__file__).parent.parent / "systemd"
SERVICES = ["understudyd.service", "understudyd@.service"]
needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


def sections(path: Path) -> configparser.RawConfigParser:
    """Of a unit; of keys that come several times the last."""
    parser = configparser.RawConfigParser(strict=False, delimiters="=", comment_prefixes="#")
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(path.read_text())
    return parser


@needs_systemd
@pytest.mark.parametrize("name", SERVICES)
def test_systemd_finds_nothing_wrong(name: str, tmp_path: Path) -> None:
    """Where the daemon is installed, which here is a folder of the test's."""
    program = tmp_path / "bin" / "understudyd"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    unit = tmp_path / name
    unit.write_text((UNITS / name).read_text().replace("/opt/understudy/bin", str(program.parent)))
    found = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False
    )
    said = [line for line in (found.stderr + found.stdout).splitlines() if "understudy" in line]
    assert found.returncode == 0 and not said, "\n".join(said)


@needs_systemd
@pytest.mark.parametrize("name", SERVICES)
def test_little_is_exposed(name: str) -> None:
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=20", str(UNITS / name)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    level = re.search(r"Overall exposure level for \S+: (\d+\.\d)", found.stdout)
    assert level is not None, found.stderr
    assert found.returncode == 0 and float(level[1]) <= 2.0, level[0]


@pytest.mark.parametrize("name", SERVICES)
def test_what_breaks_a_gpu_is_left_out(name: str) -> None:
    service = sections(UNITS / name)["Service"]
    assert "MemoryDenyWriteExecute" not in service and "PrivateDevices" not in service
    assert service["ProcSubset"] == "all"
    assert service["DeviceAllow"] == "char-nvidia* rw" and service["LimitMEMLOCK"] == "infinity"


def test_instances_differ_in_their_sockets_and_their_gpu_alone() -> None:
    one, many = (sections(UNITS / name)["Service"] for name in SERVICES)
    different = {key for key in {*one, *many} if one.get(key) != many.get(key)}
    assert different == {"RuntimeDirectory", "Environment", "EnvironmentFile"}
    text = (UNITS / SERVICES[1]).read_text()
    assert "UNDERSTUDY_RUNTIME_DIR=/run/understudy-%i" in text and "UNDERSTUDY__DEVICE__GPU=%i" in text


def test_the_drop_in_is_for_those_who_have_it() -> None:
    """Its keys stop an older systemd, or mean nothing to it: they are in no unit."""
    drop_in = sections(UNITS / "newer-systemd.conf")["Service"]
    assert drop_in["Type"] == "notify-reload" and drop_in["FileDescriptorStorePreserve"] == "yes"
    for name in SERVICES:
        service = sections(UNITS / name)["Service"]
        assert service["Type"] == "notify" and "FileDescriptorStorePreserve" not in service


@pytest.mark.parametrize("name", SERVICES)
def test_metrics_can_be_scraped_over_loopback_and_their_socket(name: str) -> None:
    """And probed from elsewhere, where the configuration allows that: who may is a firewall's business."""
    service = sections(UNITS / name)["Service"]
    assert {"AF_UNIX", "AF_INET", "AF_INET6"} <= set(service["RestrictAddressFamilies"].split())
    assert not {"PrivateNetwork", "IPAddressDeny", "SocketBindDeny"} & set(service)
    assert "RuntimeDirectory" in service and service["ProtectProc"] == "invisible", "/proc/self stays visible"

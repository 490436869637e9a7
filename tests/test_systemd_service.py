"""The real daemon, the shipped units and a real service manager: what an operator relies on, step by step."""

import json
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import understudy
from family_kit import Family, pixels
from systemd_kit import NotHere, UserManager, user_manager
from understudy import admin

UNIT, INSTANCE = "understudyd.service", "understudyd@0.service"
LOG = "var/log/understudyd.log"
CONFIG = """
[device]
kind = "cpu"
arena = "32MiB"
[host]
pool = "48MiB"
[stage]
warm_up = false
[log]
level = "{level}"
[server]
drain_s = {drain_s}
"""
FOR_TESTS = f"""
[Service]
WatchdogSec=5s
TimeoutAbortSec=2s
RestartSec=1s
StandardOutput=append:/{LOG}
StandardError=append:/{LOG}
Environment=OMP_NUM_THREADS=1
"""
PROMPT = "a red circle on blue"
OPTIONS: dict[str, Any] = {"seed": 7, "steps": 8, "width": 32, "height": 32}
REFERENCE = {"prompt": PROMPT, "seed": 7, "num_inference_steps": 8, "width": 32, "height": 32}


@dataclass
class Service:
    """The unit and a client of it."""

    manager: UserManager
    family: Family

    @property
    def endpoint(self) -> str:
        return f"ipc://{self.manager.root}/run/understudy/understudy.sock"

    def configure(self, level: str = "info", drain_s: float = 20.0) -> None:
        self.manager.write("etc/understudy/understudyd.toml", CONFIG.format(level=level, drain_s=drain_s))

    def show(self, name: str, unit: str = UNIT) -> str:
        return self.manager.show(unit, name)[name]

    def until_ready(self, restarts: int = 0) -> None:
        def is_ready() -> bool:
            found = self.manager.show(UNIT, "SubState", "NRestarts")
            return found == {"SubState": "running", "NRestarts": str(restarts)}

        self.manager.wait("ready", is_ready, timeout_s=120.0)

    def log(self) -> list[dict[str, Any]]:
        """What the daemon logged, every line of which is JSON, but for a traceback on the way down."""
        lines = (self.manager.root / LOG).read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def said(self, text: str) -> bool:
        return any(text in line["message"] for line in self.log())

    def right(self, result: understudy.Result, model: str) -> None:
        assert [pixels(i) for i in result.images] == self.family.reference(model, **REFERENCE), model


@pytest.fixture
def service(family: Family, tmp_path: Path) -> Iterator[Service]:
    try:
        with user_manager(tmp_path) as manager:
            service = Service(manager, family)
            shutil.copytree(family.store, manager.root / "var/lib/understudy/store", dirs_exist_ok=True)
            manager.run("chown", "-R", "understudy:understudy", "/var/lib/understudy")
            service.configure()
            for unit in (UNIT, INSTANCE):
                manager.write(f"run/systemd/user/{unit}.d/for-tests.conf", FOR_TESTS)
            manager.systemctl("daemon-reload")
            yield service
    except NotHere as reason:
        pytest.skip(str(reason))


@pytest.mark.timeout(600)
def test_a_life_in_service(service: Service) -> None:
    """One test: each step finds the daemon as the one before has left it, and starting it takes long."""
    service.manager.systemctl("start", "--no-block", UNIT)
    service.until_ready()
    it_is_ready_and_its_sockets_are_its_groups(service)
    what_it_cannot_see_gets_the_command_that_works(service)
    a_new_configuration_is_checked_then_swapped(service)
    killed_it_comes_back_warm_without_a_readable_file(service)
    a_hang_is_ended_by_the_watchdog(service)
    stopped_it_finishes_what_is_open(service)
    an_instance_has_its_own_sockets(service)


def it_is_ready_and_its_sockets_are_its_groups(service: Service) -> None:
    manager = service.manager
    assert service.show("StatusText").startswith("serving: ")
    assert service.show("NFileDescriptorStore") == "2"
    places = [f"/run/understudy{name}" for name in ("", "/admin.sock", "/understudy.sock")]
    modes = manager.run("stat", "-c", "%n %a %U:%G", *places)
    assert modes.stdout.splitlines() == [
        "/run/understudy 750 understudy:understudy",
        "/run/understudy/admin.sock 660 understudy:understudy",
        "/run/understudy/understudy.sock 660 understudy:understudy",
    ]
    command = "UNDERSTUDY_RUNTIME_DIR=/run/understudy exec understudyd serve"
    second = manager.run("runuser", "-u", "understudy", "--", "bash", "-c", command, check=False)
    holder = f"pid {service.show('MainPID')} ({UNIT})"
    assert (
        second.returncode == 1 and f"a daemon with {holder} serves /run/understudy already" in second.stderr
    )


def what_it_cannot_see_gets_the_command_that_works(service: Service) -> None:
    manager, source = service.manager, "/home/operator/model"
    shutil.copytree(service.family.folders["sd-a"], manager.root / source[1:])
    with pytest.raises(admin.AdminError) as refused:
        manager.ask(admin.Add(name="new", source=source))
    command = str(refused.value).partition("from a shell: ")[2].partition("; then: ")[0]
    assert command.startswith("sudo -u understudy understudyd ingest --store /var/lib/understudy/store ")
    sudo, as_user, user, *words = shlex.split(command)
    assert (sudo, as_user) == ("sudo", "-u") and "then: understudyctl rescan" in str(refused.value)
    manager.run("chmod", "go-r", f"{source}/unet/diffusion_pytorch_model.safetensors")
    secret = manager.run("runuser", "-u", user, "--", *words, check=False)
    assert secret.returncode != 0 and "may not be read by the user who adds it" in secret.stderr
    manager.run("chmod", "-R", "a+rX", source)
    manager.run("runuser", "-u", user, "--", *words)
    assert manager.ask(admin.Rescan())["added"] == ["new"]
    with understudy.Client(endpoint=service.endpoint) as client:
        service.right(client.generate("new", PROMPT, **OPTIONS), "sd-a")


def a_new_configuration_is_checked_then_swapped(service: Service) -> None:
    manager = service.manager
    manager.write("etc/understudy/understudyd.toml", "[device]\nkin = 1\n")
    assert manager.systemctl("reload", UNIT, check=False).returncode != 0
    manager.systemctl("kill", "--signal=HUP", "--kill-who=main", UNIT)
    manager.wait("the refusal", lambda: service.said("the configuration stays as it is"))
    service.configure(level="debug", drain_s=30.0)
    manager.systemctl("reload", UNIT)
    manager.wait("the reload", lambda: service.said("in force now: server.drain_s, log.level"))
    manager.wait("to be running", lambda: service.show("SubState") == "running")


def killed_it_comes_back_warm_without_a_readable_file(service: Service) -> None:
    manager = service.manager
    with understudy.Client(endpoint=service.endpoint) as client:
        for model in ("sd-a", "sd-b"):
            client.generate(model, PROMPT, **OPTIONS)
        handles = [(model, client.submit(model, PROMPT, **OPTIONS)) for model in ("sd-b", "sd-a", "sd-b")]
        manager.run("bash", "-c", "chmod 000 /var/lib/understudy/store/blobs/*")
        manager.systemctl("kill", "--signal=KILL", "--kill-who=main", UNIT)
        for model, handle in handles:
            service.right(handle.result(), model)
    service.until_ready(restarts=1)
    spans = manager.ask(admin.Trace(seconds=600))["spans"]
    routes = {span["route"] for span in spans if span["lane"].startswith("loader")}
    assert routes == {"host > arena"}
    assert service.said("the host pool of the last daemon is taken over")
    manager.run("bash", "-c", "chmod 640 /var/lib/understudy/store/blobs/*")


def a_hang_is_ended_by_the_watchdog(service: Service) -> None:
    manager = service.manager
    before = service.show("MainPID")
    manager.systemctl("kill", "--signal=STOP", "--kill-who=main", UNIT)
    manager.wait("the watchdog", lambda: service.show("Result") == "watchdog")
    service.until_ready(restarts=2)
    assert service.show("MainPID") != before and service.show("NFileDescriptorStore") == "2"


def stopped_it_finishes_what_is_open(service: Service) -> None:
    manager = service.manager
    with understudy.Client(endpoint=service.endpoint) as client:
        handle = client.submit("sd-a", PROMPT, **OPTIONS | {"steps": 60, "width": 64, "height": 64})
        next(event for event in handle if isinstance(event, understudy.Progress))
        manager.systemctl("stop", "--no-block", UNIT)
        manager.wait("the drain", lambda: service.show("SubState") != "running")
        assert handle.result().images
    manager.wait("the end", lambda: service.show("ActiveState") == "inactive")
    assert service.show("Result") == "success" and service.show("NFileDescriptorStore") == "0"
    assert not (manager.root / "run/understudy").exists()


def an_instance_has_its_own_sockets(service: Service) -> None:
    manager = service.manager
    manager.systemctl("start", "--no-block", INSTANCE)
    socket = manager.root / "run/understudy-0/admin.sock"
    manager.wait("its socket", socket.exists)
    manager.wait("its models", lambda: manager.ask(admin.Status(), "run/understudy-0")["models"] == 7)
    manager.systemctl("stop", INSTANCE)
    assert service.show("Result", INSTANCE) == "success"

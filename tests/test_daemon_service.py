"""A daemon in service: its locks, a reload by signal, and the end of what does not end in time."""

import signal
from pathlib import Path

import pytest

import understudy
from daemon_kit import configuration, running_daemon
from family_kit import Family

OPTIONS = {"seed": 7, "width": 32, "height": 32}


def test_a_life_between_signals(family: Family, tmp_path: Path) -> None:
    """One life, because starting takes long: locked out, reloaded, stopped with a request that goes on."""
    endpoint = f"ipc://{tmp_path}/extra.sock"
    sections = {
        "stage": {"warm_up": False},
        "server": {"endpoints": [endpoint]},
        "policy": {"prefetch": False},
    }
    with running_daemon(family.store, tmp_path / "run", **sections) as daemon:
        with running_daemon(family.store, tmp_path / "other", wait=False, **sections) as second:
            assert second.wait() == 1
        assert f"pid {daemon.process.pid} serves {endpoint} already" in "".join(second.log)

        config = tmp_path / "run" / "understudyd.toml"
        good = config.read_text()
        config.write_text("[server]\ndrain_s = -1\n")
        daemon.signal(signal.SIGHUP)
        assert "server.drain_s" in daemon.wait_for_log("the configuration stays as it is")
        sections["server"] |= {"drain_s": 0.5, "max_steps": 400}  # type: ignore[operator]
        config.write_text(configuration(family.store, tmp_path / "run", **sections, arena="48MiB"))
        assert config.read_text() != good
        daemon.signal(signal.SIGHUP)
        line = daemon.wait_for_log("the configuration was read again")
        assert "in force now: server.max_steps, server.drain_s; after a restart: device.arena" in line

        with understudy.Client(endpoint=daemon.endpoint) as client:
            with pytest.raises(understudy.CallerError, match="400"):
                client.generate("sd-a", "x", steps=401, **OPTIONS)
            running = client.submit("sd-a", "x", steps=400, **OPTIONS | {"width": 256, "height": 256})
            waiting = client.submit("sd-b", "x", steps=1, **OPTIONS)
            next(event for event in running if isinstance(event, understudy.Progress))
            daemon.signal(signal.SIGTERM)
            for handle in (running, waiting):
                with pytest.raises(understudy.CapacityError, match=r"did not end within 0\.5 s") as stopped:
                    handle.result()
                assert stopped.value.code == "draining" and stopped.value.retryable
        assert daemon.wait() == 0

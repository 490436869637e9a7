"""A new configuration for a running daemon: what is put into force, what waits, what is refused."""

import asyncio
from pathlib import Path

import pytest

from understudyd import config as configuration
from understudyd.config import Config, ConfigError
from understudyd.shell.reload import LIVE, Reload


def reload_to(text: str, folder: Path, applied: list[Config]) -> Reload:
    """From the defaults."""
    path = folder / "understudyd.toml"
    path.write_text(text)
    return Reload(Config(), lambda: configuration.load(path, {}), applied.append)


def test_what_can_be_is_put_into_force_and_the_rest_is_named(tmp_path: Path) -> None:
    applied: list[Config] = []
    live, fixed = '[log]\nlevel = "debug"\n[server]\ndrain_s = 5\n', '[device]\narena = "1GiB"\n'
    text = f"{live}{fixed}[policy]\nmax_skips = 3\n"
    reload = reload_to(text, tmp_path, applied)
    done = asyncio.run(reload())
    assert done.applied == ("server.drain_s", "log.level")
    assert done.needs_restart == ("device.arena", "policy.max_skips")
    assert "in force now: server.drain_s, log.level; after a restart: device.arena" in done.describe()
    (config,) = applied
    assert config is reload.config
    assert (config.log.level, config.server.drain_s) == ("debug", 5.0)
    assert config.device == Config().device and config.policy == Config().policy
    again = asyncio.run(reload())
    assert again.applied == () and again.needs_restart == done.needs_restart and len(applied) == 1


@pytest.mark.parametrize("text", ["[log]\nlevel = 3\n", "[nonsense]\n", "not toml"])
def test_a_bad_one_changes_nothing(tmp_path: Path, text: str) -> None:
    applied: list[Config] = []
    reload = reload_to(text, tmp_path, applied)
    with pytest.raises(ConfigError):
        asyncio.run(reload())
    assert applied == [] and reload.config == Config()


def test_nothing_new_is_nothing_to_do(tmp_path: Path) -> None:
    applied: list[Config] = []
    done = asyncio.run(reload_to("", tmp_path, applied)())
    assert done.describe() == "nothing to apply" and applied == []


def test_what_is_called_live_exists() -> None:
    for section, keys in LIVE.items():
        assert keys <= set(getattr(Config(), section).__struct_fields__)

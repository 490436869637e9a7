"""The configuration file: sizes, overrides, and errors that name the key."""

from pathlib import Path

import pytest

from understudyd import config, config_reference
from understudyd.config import AUTO, ConfigError, load, parse_size
from understudyd.shell.parts import limits_of


def write(folder: Path, text: str) -> Path:
    path = folder / "understudyd.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("60GiB", 60 * 2**30), ("1.5 MiB", 3 * 2**19), ("512MB", 512_000_000), ("2KiB/s", 2048)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1 XB", "1GiB please", "1e9"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="no size"):
        parse_size(text)


def test_a_file_with_units_and_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, '[device]\narena = "2GiB"\n[loader]\nrate_limit = "200MiB/s"\ncount = 3\n')
    environ = {"UNDERSTUDY__DEVICE__KIND": "cpu", "UNDERSTUDY__LOADER__COUNT": "1", "PATH": "/bin"}
    loaded = load(path, environ)
    assert loaded.device.arena == 2 * 2**30 and loaded.device.kind == "cpu"
    assert loaded.loader.rate_limit == 200 * 2**20 and loaded.loader.count == 1


def test_auto_is_the_default_size() -> None:
    assert load(None, {}).device.arena == AUTO


def test_loaders_and_the_host_pool(tmp_path: Path) -> None:
    path = write(tmp_path, '[host]\npool = "0"\n[loader]\ntransport = "thread"\nstalled_after_s = 5\n')
    chosen, default = load(path, {"UNDERSTUDY__POLICY__PAUSE_PRIORITY": "7"}), load(None, {})
    assert (chosen.host.pool, default.host.pool) == (0, AUTO)
    assert (chosen.loader.transport, default.loader.transport) == ("thread", "auto")
    assert chosen.loader.stalled_after_s == 5.0 and chosen.loader.copies_in_flight == 2
    assert (chosen.policy.pause_priority, default.policy.pause_priority) == (7, None)
    assert default.loader.dead_after_s < 3.0, "a hung loader is declared dead within three seconds"


def test_limits_of_input_images_reach_the_front_end(tmp_path: Path) -> None:
    sizes = 'max_input_bytes = "8MiB"\nmax_open_input_bytes = "4MiB"\n'
    text = f"[server]\nmax_input_pixels = 4096\nmax_steps = 9\n{sizes}"
    limits = limits_of(load(write(tmp_path, text), {}).server)
    assert limits.inputs.max_pixels == 4096 and limits.max_open_input_bytes == 4 * 2**20
    assert limits.inputs.max_total_bytes == 4 * 2**20, "what never fits must not be asked to wait"
    assert limits.inputs.max_option_items == limits.max_steps == 9


def test_several_stores(tmp_path: Path) -> None:
    text = '[store]\npath = "/var/s"\nread_only = ["/mnt/a", "/mnt/b"]\ncache = "200GiB"\n'
    chosen, default = load(write(tmp_path, text), {}).store, load(None, {}).store
    assert chosen.read_only == (Path("/mnt/a"), Path("/mnt/b")) and chosen.cache == 200 * 2**30
    assert default.read_only == () and default.cache == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[device]\nmagic = 1\n", "magic"),
        ("[nonsense]\n", "nonsense"),
        ('[device]\narena = "big"\n', "device.arena: .*no size"),
        ("[loader]\ncount = 0\n", "loader.count"),
        ('[loader]\ntransport = "pigeon"\n', "loader.transport"),
        ("[loader]\ncopies_in_flight = 0\n", "loader.copies_in_flight"),
        ('[host]\npool = "half"\n', "host.pool: .*no size"),
        ('[policy]\norder = "random"\n', "policy.order"),
        ("[policy\n", "not TOML"),
        ("[stage]\nwarm_up_limit_s = 0\n", "warm_up_limit_s"),
        ('[store]\ncache = "many"\n', "store.cache: .*no size"),
        ('[store]\nread_only = "/mnt"\n', "store.read_only"),
        ("[startup]\nlimit_s = 0\n", "startup.limit_s"),
        ("[startup]\nsteps = 0\n", "startup.steps"),
        (
            '[device]\narean = "1GiB"\n',
            "no key 'arean'; did you mean 'arena'. known are kind, gpu, arena, res",
        ),
        ("[devise]\n", "no section .devise.; did you mean 'device'. known are store, startup"),
        ('[device]\nkind = "gpu"\n', 'device.kind is \'gpu\'; it must be one of "auto", "cpu", "cuda"'),
        ("device = 3\n", "it is a section"),
    ],
)
def test_errors_name_the_key(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load(write(tmp_path, text), {})


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load(tmp_path / "none.toml", {})


def test_an_override_must_name_section_and_key() -> None:
    with pytest.raises(ConfigError, match="SECTION__KEY"):
        load(None, {"UNDERSTUDY__DEVICE": "cpu"})


def test_check_says_yes_or_no(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = write(tmp_path, '[device]\nkind = "cpu"\n'), tmp_path / "bad.toml"
    bad.write_text("[device]\nkind = 3\n")
    assert config.main(["check", str(good)]) == 0
    assert config.main(["check", str(bad)]) == 1
    assert "device.kind" in capsys.readouterr().err
    assert config.main(["chekc"]) == 2


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    text = '[device]\narean = 1\nkind = "tpu"\n[loader]\ncount = 99\nthreads = 3\n'
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, text), {})
    lines = str(caught.value).splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["[device]", "device.kind", "loader.count:"]


def test_check_warns_of_what_will_not_work_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large = write(tmp_path, '[device]\nkind = "cpu"\narena = "9000TiB"\n')
    assert config.main(["check", str(large)]) == 0
    assert "device.arena is 9216000.0 GiB and this machine has" in capsys.readouterr().err
    assert config.main(["check", str(write(tmp_path, '[device]\nkind = "cpu"\n'))]) == 0
    assert capsys.readouterr().err == ""


def test_the_page_is_what_the_types_say() -> None:
    page = Path(__file__).parent.parent / "docs" / "configuration.md"
    assert page.read_text() == config_reference.page(), "run `make docs-configuration`"

"""The daemon's configuration: one TOML file, checked whole, overridden by environment variables.

Unknown keys are refused. Sizes are written "60GiB", rates "200MiB/s". `UNDERSTUDY__SECTION__KEY` overrides
a key; its value is read as TOML, or as a string where it is none. `python -m understudyd.config check FILE`
says what is wrong and where.
"""

import os
import re
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import msgspec

from understudy.paths import runtime_dir
from understudyd.config_check import device_mistakes, door_mistakes, mistakes, warnings
from understudyd.names import unknown_model

ENV_PREFIX = "UNDERSTUDY__"
SYSTEM_PATH = Path("/etc/understudy/understudyd.toml")
_UNITS = {"": 1, "B": 1} | {f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)}
_UNITS |= {f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}
_PIXELS = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")
_MODE = re.compile(r"0?[0-7]{3}")
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B|B|)\s*(/s)?\s*")


class ConfigError(Exception):
    """The configuration cannot be used; the message names the key and says what is allowed."""


class Size(int):
    """Bytes, written with a unit: "60GiB", "512MB"."""


class Rate(int):
    """Bytes per second, written "200MiB/s"; 0 is no limit."""


class Mode(int):
    """Permissions of a socket's file, written "0660" as for chmod."""


AUTO = Size(-1)
Positive = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(gt=0)]


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


def default_store() -> Path:
    """The system's store where the package made it, else one in the user's home."""
    system = Path("/var/lib/understudy")
    if os.access(system, os.W_OK):
        return system / "store"
    home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share"
    return Path(home) / "understudy" / "store"


class StoreConfig(_Section, frozen=True, kw_only=True):
    """Where models are kept: `path` is written to, `read_only` stores (a network mount) are not.

    Up to `cache` bytes of what is loaded from these are copied to `path`/cache, at `cache_rate`; "0" is none.
    """

    path: Path = msgspec.field(default_factory=default_store)
    read_only: tuple[Path, ...] = ()
    cache: Size = Size(0)
    cache_rate: Rate = Rate(200 * 1024**2)


class StartupConfig(_Section, frozen=True, kw_only=True):
    """Models that are loaded and prepared, and that run each of `prompts` once, before the daemon is ready.

    With `forecast` they are followed by those that the last life's requests make likeliest, as many as the
    arena has room for. Runs take the pipeline's own `size` ("512x512") and `steps` where none are given.
    After `limit_s` the daemon serves without what is missing, and says what that is.
    """

    models: tuple[str, ...] = ()
    forecast: bool = False
    prompts: tuple[str, ...] = ()
    size: str | None = None
    steps: Positive | None = None
    limit_s: Seconds = 300.0

    def width_and_height(self) -> tuple[int, int] | tuple[None, None]:
        """Pixels of `size`. Raises `ConfigError`."""
        if self.size is None:
            return None, None
        if (matched := _PIXELS.fullmatch(self.size)) is None:
            raise ConfigError(f'startup.size {self.size!r} is no size of an image; write it like "512x512"')
        return int(matched[1]), int(matched[2])


class ServerConfig(_Section, frozen=True, kw_only=True):
    """Doors and limits. `endpoints` are added to the ipc socket in `runtime_dir`.

    The file of that socket gets `socket_mode` and `socket_group`. A `tcp://` endpoint that other machines can
    reach needs keys, see [curve]. There may be `max_connections` in all.

    `max_open_per_user` requests may be open over all connections of one user: a uid, a key, or over TCP
    without keys an address. `max_open_per_client` requests of one connection may be open, with
    `max_open_pixels` to be made and `max_open_steps` to be taken, both summed over all images; a size
    that is not named counts as 1024x1024, steps as 30. Input images: `max_input_pixels` of one,
    `max_input_bytes` of one request, `max_open_input_bytes` of one client's open requests,
    `max_all_input_bytes` of all of them. `outbox_bytes` of answers may wait for one client, and answers
    are kept for `answer_ttl_s` to be sent again. A client that is silent, or reads nothing, for
    `client_timeout_s` loses its requests. On shutdown what is open has `drain_s` to finish.
    """

    runtime_dir: Path = msgspec.field(default_factory=runtime_dir)
    endpoints: tuple[str, ...] = ()
    socket_mode: Mode = Mode(0o660)
    socket_group: str | None = None
    max_pixels: Positive = 2048 * 2048
    max_steps: Positive = 500
    max_images: Positive = 16
    max_prompt_chars: Positive = 8192
    max_connections: Positive = 1000
    max_open_per_client: Positive = 256
    max_open_per_user: Positive = 512
    max_open_pixels: Positive = 2**31
    max_open_steps: Positive = 200_000
    max_input_pixels: Positive = 2048 * 2048
    max_input_bytes: Size = Size(64 * 1024**2)
    max_open_input_bytes: Size = Size(512 * 1024**2)
    max_all_input_bytes: Size = Size(2 * 1024**3)
    outbox_bytes: Size = Size(64 * 1024**2)
    answer_ttl_s: Seconds = 60.0
    client_timeout_s: Seconds = 30.0
    drain_s: Seconds = 30.0


class AdminConfig(_Section, frozen=True, kw_only=True):
    """The operators' socket. Its group may look; the daemon's own user and root may change things."""

    socket_mode: Mode = Mode(0o660)
    socket_group: str | None = None


class CurveConfig(_Section, frozen=True, kw_only=True):
    """Keys for clients over TCP, made by `understudy keygen`; with them every `tcp://` endpoint is encrypted.

    `secret_key` is the daemon's own, a file that its user alone may read. `client_keys` lists who may
    connect, a line with public key and name for each. Without them the service manager's credentials
    `curve-secret-key` and `curve-client-keys` are used where there are any.
    """

    secret_key: Path | None = None
    client_keys: Path | None = None


class DeviceConfig(_Section, frozen=True, kw_only=True):
    """Which device computes and how much of it holds weights.

    `kind = "auto"` is CUDA where there is an NVIDIA GPU. `arena = "auto"` is what is free less `reserve` for
    activations on a GPU, and half of the available memory on the CPU.
    """

    kind: Literal["auto", "cpu", "cuda"] = "auto"
    gpu: str = "0"
    arena: Size = AUTO
    reserve: Size = Size(8 * 1024**3)


class HostConfig(_Section, frozen=True, kw_only=True):
    """Host memory that keeps copies of weights one copy away from the arena; `pool = "0"` is none.

    `auto` is half of the available memory on a GPU, and none on the CPU, where the page cache serves as well.
    """

    pool: Size = AUTO


class LoaderConfig(_Section, frozen=True, kw_only=True):
    """Loaders. `rate_limit` bounds each of them, `copies_in_flight` are `chunk`s on their way to the GPU.

    `transport = "auto"` is processes, or threads of the daemon where processes cannot share the arena. A
    loader is dead after `dead_after_s` of silence, or when its load makes no progress for `stalled_after_s`.
    """

    count: Annotated[int, msgspec.Meta(ge=1, le=32)] = 2
    rate_limit: Rate = Rate(0)
    chunk: Size = Size(16 * 1024**2)
    threads: Positive = 2
    copies_in_flight: Positive = 2
    dead_after_s: Seconds = 2.5
    stalled_after_s: Seconds = 60.0
    transport: Literal["auto", "process", "thread"] = "auto"


class StageConfig(_Section, frozen=True, kw_only=True):
    """The stage. `threads` are torch's on the CPU; `warm_up` runs each architecture once before ready.

    `compile = "on"` has torch.compile make code for what denoises, once an architecture, before ready.
    When what runs makes no step for `stalled_after_s`, the service manager's watchdog is fed no more.
    """

    threads: Positive = 1
    warm_up: bool = True
    warm_up_limit_s: Seconds = 300.0
    compile: Literal["off", "on"] = "off"
    stalled_after_s: Seconds = 600.0


class PolicyConfig(_Section, frozen=True, kw_only=True):
    """What runs and loads when.

    `lookahead` counts models loaded ahead of the stage; 0 loads on demand. `max_wait_s` and `max_skips` bound
    overtaking. `order = "fcfs"` is that of arrival. `prefetch` fills free memory by forecast. While a request
    of at least `pause_priority` runs, loads rest; without it they never do.

    The last `decisions` decisions are kept with the numbers behind them, for `understudyctl decisions`.
    """

    order: Literal["resident_first", "fcfs"] = "resident_first"
    lookahead: Annotated[int, msgspec.Meta(ge=0)] = 4
    max_wait_s: Seconds = 30.0
    max_skips: Positive = 64
    prefetch: bool = True
    pause_priority: int | None = None
    decisions: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 0


class QueueConfig(_Section, frozen=True, kw_only=True):
    """How many requests may wait."""

    max_waiting: Positive = 1000


class LogConfig(_Section, frozen=True, kw_only=True):
    """What is logged, on stderr. `format = "auto"` is text on a terminal and a JSON object a line elsewhere.

    `requests` is a file for one line a finished request, which `understudyd simulate` plays; none is written
    without it. One of `requests_size` is set aside as `requests`.1 and begun anew.
    """

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "text", "json"] = "auto"
    requests: Path | None = None
    requests_size: Size = Size(64 * 1024**2)


class MetricsConfig(_Section, frozen=True, kw_only=True):
    """Metrics for Prometheus and health checks, over HTTP on `metrics.sock` in the runtime directory.

    `endpoints` are added to it, such as "tcp://127.0.0.1:9464"; one that other machines can reach is refused
    without `allow_remote`, as all may read there. The `most_models` most asked for have series of their own.
    """

    enabled: bool = True
    endpoints: tuple[str, ...] = ()
    allow_remote: bool = False
    most_models: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 50
    socket_mode: Mode = Mode(0o660)
    socket_group: str | None = None


class Config(_Section, frozen=True, kw_only=True):
    """The whole file."""

    store: StoreConfig = msgspec.field(default_factory=StoreConfig)
    startup: StartupConfig = StartupConfig()
    server: ServerConfig = msgspec.field(default_factory=ServerConfig)
    admin: AdminConfig = AdminConfig()
    curve: CurveConfig = CurveConfig()
    device: DeviceConfig = DeviceConfig()
    host: HostConfig = HostConfig()
    loader: LoaderConfig = LoaderConfig()
    stage: StageConfig = StageConfig()
    policy: PolicyConfig = PolicyConfig()
    queue: QueueConfig = QueueConfig()
    log: LogConfig = LogConfig()
    metrics: MetricsConfig = MetricsConfig()


def parse_size(text: str) -> int:
    """Bytes of "60GiB", "512 MB", "4096". Raises `ConfigError`."""
    matched = _SIZE.fullmatch(text)
    if matched is None:
        raise ConfigError(f'{text!r} is no size; write it like "60GiB" or "512MB"')
    return int(float(matched[1]) * _UNITS[matched[2]])


def find(environ: Mapping[str, str] = os.environ) -> Path | None:
    """`$UNDERSTUDY_CONFIG`, else the system's file where there is one, else None: defaults."""
    if chosen := environ.get("UNDERSTUDY_CONFIG"):
        return Path(chosen)
    return SYSTEM_PATH if SYSTEM_PATH.exists() else None


def load(path: Path | None, environ: Mapping[str, str] = os.environ) -> Config:
    """The configuration of `path` (defaults alone when None), with overrides. Raises `ConfigError`."""
    document: dict[str, Any] = {}
    if path is not None:
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not TOML: {error}") from error
    for key, text in environ.items():
        if key.startswith(ENV_PREFIX):
            _override(document, key, text)
    if lines := mistakes(document, Config, _decode):
        told = lines[0] if len(lines) == 1 else "".join(f"\n  {line}" for line in lines)
        raise ConfigError(f"{path or 'environment'}: {told}")
    config = msgspec.convert(document, Config, dec_hook=_decode)
    config.startup.width_and_height()
    return config


def check_startup(config: Config) -> None:
    """Look for the models of `[startup]` in the stores, if all of these can be read. Raises `ConfigError`.

    One may be a model with LoRAs, "sd15+pixel-art@0.8", or a LoRA alone.
    """
    from understudyd.store.adapters.shelf import AdapterShelf
    from understudyd.store.store import Store

    names: set[str] = set()
    for path in (config.store.path, *config.store.read_only):
        try:
            names |= {*Store(path).names(), *AdapterShelf(Store(path)).names()}
        except OSError:
            return
    for name in config.startup.models:
        for part in (term.partition("@")[0] for term in name.split("+")):
            if part not in names:
                raise ConfigError(f"startup.models: {unknown_model(part, names, 'add it first')}")


def _override(document: dict[str, Any], key: str, text: str) -> None:
    section, _, name = key.removeprefix(ENV_PREFIX).lower().partition("__")
    table = document.setdefault(section, {})
    if not isinstance(table, dict) or not name:
        raise ConfigError(f"{key} must be {ENV_PREFIX}SECTION__KEY")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    is_text = _is_text(section, name) and not isinstance(value, str)
    table[name] = text if is_text else value


def _is_text(section: str, name: str) -> bool:
    """The key takes a text: a GPU's number is one, too."""
    kind = get_type_hints(Config).get(section)
    return kind is not None and get_type_hints(kind).get(name) in (str, str | None)


def _decode(kind: type, value: Any) -> Any:
    """Sizes, rates and paths for msgspec. ConfigError becomes a ValidationError with the key's path."""
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is Mode:
        if not isinstance(value, str) or not _MODE.fullmatch(value):
            raise ValueError(f'{value!r:.40} is no mode of a socket; write it like "0660"')
        return Mode(int(value, 8))
    if kind is Size and value == "auto":
        return AUTO
    if kind in (Size, Rate) and isinstance(value, str | int) and not isinstance(value, bool):
        try:
            parsed = parse_size(str(value))
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return kind(parsed)
    raise ValueError(f"cannot make a {kind.__name__} of {value!r}")


def main(argv: list[str] | None = None) -> int:
    """`check [FILE]`: 0 when the file can be used, 1 with the reason when not."""
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] != "check" or len(args) > 2:
        print("usage: python -m understudyd.config check [FILE]", file=sys.stderr)
        return 2
    path = Path(args[1]) if len(args) == 2 else find()
    try:
        config = load(path)
        check_startup(config)
        if lines := door_mistakes(config) + device_mistakes(config):
            raise ConfigError("; ".join(lines))
    except ConfigError as error:
        print(f"bad configuration: {error}", file=sys.stderr)
        return 1
    for line in warnings(config):
        print(f"warning: {line}", file=sys.stderr)
    print(f"{path or 'no file, defaults'}: good; store {config.store.path}, device {config.device.kind}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Everything that reads what others wrote, against bytes at random: a value or the one typed error."""

import contextlib
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zmq.utils import z85

from store_kit import fake_source
from understudy import admin
from understudy.errors import CallerError
from understudy.keys import read_public_keys, read_secret_key
from understudy.wire import (
    DECODE_ERRORS,
    Cancel,
    Finished,
    Generate,
    ImageInfo,
    Message,
    ModelEntry,
    Ping,
    Timings,
    WireError,
    decode_entries,
    decode_reply,
    decode_request,
    encode,
    encode_entries,
    peek_id,
)
from understudyd.config import Config, ConfigError, load
from understudyd.loader import wire as loader_wire
from understudyd.shell.zap import DOMAIN, Gatekeeper
from understudyd.store.errors import StoreError
from understudyd.store.guard import check_source
from understudyd.store.safetensors_file import parse_header, read_header
from understudyd.store.store import Store

FILES = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

TIMINGS = Timings(queued_s=0.0, switch_s=0.0, run_s=1.0, encode_s=0.0, total_s=1.0)
REQUESTS = [
    encode(Generate(id="a", model="m", prompt="p", seed=1, options={"eta": [1.0, None]}, width=64)),
    encode(Cancel(id="a")),
    encode(Ping(id="a")),
]
REPLIES = [
    encode(
        Finished(
            id="a",
            model="m",
            seed=1,
            images=(ImageInfo(format="png", width=1, height=1),),
            timings=TIMINGS,
            tier="disk",
        )
    )
]
COMMANDS = [
    admin.encode_line(admin.Add(name="a", source="/b", like=("c",))),
    admin.encode_line(admin.Drain(wait_s=1.0)),
    admin.encode_line(admin.LogLevel(level="info")),
]


def bent(samples: list[bytes]) -> st.SearchStrategy[bytes]:
    """A good sample with a few places changed, or bytes at random, or nesting without end."""

    def bend(sample: bytes, changes: list[tuple[int, bytes, int]]) -> bytes:
        data = bytearray(sample)
        for at, put, cut in changes:
            at %= len(data) + 1
            data[at : at + cut] = put
        return bytes(data)

    changes = st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=4), st.integers(0, 4)), max_size=5)
    nested = st.builds(
        lambda unit, times: unit * times,
        st.sampled_from([b"\x91", b"\x81\xa1x", b"[", b'{"a":', b'{"cmd":']),
        st.integers(1, 30_000),
    )
    return st.one_of(st.builds(bend, st.sampled_from(samples), changes), st.binary(max_size=80), nested)


values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**63), 2**63 - 1),
        st.floats(allow_nan=False),
        st.text(max_size=8),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)


# -- what clients and operators send ------------------------------------------------------------------------


@settings(max_examples=500, deadline=None)
@given(bent(REQUESTS))
def test_a_request(data: bytes) -> None:
    try:
        message = decode_request(data)
    except WireError as error:
        assert error.code in ("bad_request", "unsupported_version") and len(str(error)) < 5000
        encode_failure(error)
    else:
        assert (isinstance(message, Message) and decode_request(encode(message)) == message) or is_odd(
            message
        )
    assert isinstance(peek_id(data), str)


def encode_failure(error: WireError) -> None:
    """What is said about it can be sent."""
    from understudy.wire import Failed
    from understudyd.shell.answers import answer_frames

    answer_frames(Failed(id=error.message_id, code=error.code, message=str(error)))


def is_odd(message: Any) -> bool:
    """A NaN is not equal to itself."""
    return any(value != value for value in (message.guidance, message.deadline_s)) or "nan" in repr(message)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(list(Generate.__struct_fields__)), values))
def test_fields_of_any_kind(fields: dict[str, Any]) -> None:
    header = msgspec.msgpack.encode({"type": "generate", "v": 1, "id": "x", "model": "m", "seed": 1} | fields)
    try:
        assert isinstance(decode_request(header), Generate)
    except WireError as error:
        encode_failure(error)


@settings(max_examples=300, deadline=None)
@given(bent(REPLIES))
def test_a_reply(data: bytes) -> None:
    with contextlib.suppress(WireError):
        decode_reply(data)


@settings(max_examples=200, deadline=None)
@given(bent([encode_entries([ModelEntry(name="m", pipeline="P", size_bytes=1, tier="disk")])]))
def test_a_list_of_models(data: bytes) -> None:
    with contextlib.suppress(WireError):
        decode_entries(data)


@settings(max_examples=400, deadline=None)
@given(bent(COMMANDS))
def test_an_admin_command(line: bytes) -> None:
    try:
        command = admin.decode_command(line)
    except admin.AdminError as error:
        assert error.code == "bad_request"
        admin.encode_line(admin.Error(code=error.code, message=str(error)))
    else:
        assert isinstance(command, admin.AdminRequest)
        admin.encode_line(command)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=10), st.sampled_from([b"CURVE", b"NULL", b"PLAIN"]))
def test_a_question_about_a_key(frames: list[bytes], mechanism: bytes) -> None:
    """Nobody is let in but the one key of the one well-formed question."""
    gatekeeper = object.__new__(Gatekeeper)
    gatekeeper.clients, gatekeeper.admitted, gatekeeper.refused = {z85.encode(b"k" * 32).decode(): "a"}, 0, 0
    good = [b"1.0", b"1", DOMAIN, b"127.0.0.1", b"", b"CURVE", b"k" * 32]
    assert gatekeeper.answer([b"r", b"", *good])[4] == b"200"
    for fields in (frames, [*good[:5], mechanism, *frames[:1]], [*good[:6], *frames], [*good, b""]):
        if fields != good:
            reply = gatekeeper.answer([b"r", b"", *fields])
            assert reply[4] == b"400" and reply[6:] == [b"", b""]


@settings(max_examples=200, deadline=None)
@given(bent([msgspec.msgpack.encode({"type": "heartbeat"})]))
def test_a_loaders_report(packet: bytes) -> None:
    with contextlib.suppress(*DECODE_ERRORS):
        loader_wire.decode_report(packet)


# -- files --------------------------------------------------------------------------------------------------


def reads(path: Path, data: bytes, read: Callable[[Path], object], error: type[Exception]) -> bool:
    """Whether it could be read; nothing but the typed error is raised."""
    path.write_bytes(data)
    path.chmod(0o600)
    try:
        read(path)
    except error as found:
        assert str(found)
        return False
    return True


TOML = (
    b'[server]\nmax_steps = 5\nendpoints = ["tcp://[::1]:1"]\nsocket_mode = "0660"\n[host]\npool = "1GiB"\n'
)


@FILES
@given(data=bent([TOML]))
def test_a_configuration(tmp_path: Path, data: bytes) -> None:
    if reads(tmp_path / "u.toml", data, lambda path: load(path, {}), ConfigError):
        tomllib.loads(data.decode())


sections = {name: list(type(getattr(Config(), name)).__struct_fields__) for name in Config.__struct_fields__}


@FILES
@given(data=st.data())
def test_a_configuration_of_any_values(tmp_path: Path, data: st.DataObject) -> None:
    """Every key there is, with values of every kind TOML has; and the same by the environment."""
    section = data.draw(st.sampled_from(list(sections)))
    key = data.draw(st.sampled_from(sections[section]))
    value = data.draw(
        st.one_of(st.integers(-5, 2**70), st.booleans(), st.text(max_size=6), st.lists(st.text(max_size=3)))
    )
    text = f"[{section}]\n{key} = {json.dumps(value)}\n"
    reads(tmp_path / "u.toml", text.encode(), lambda path: load(path, {}), ConfigError)
    with contextlib.suppress(ConfigError):
        load(None, {f"UNDERSTUDY__{section}__{key}".upper(): str(value)})


@FILES
@given(document=values, key=st.sampled_from(["_class_name", "unet", "vae", "../x", "custom_pipeline"]))
def test_a_model_index(tmp_path: Path, document: Any, key: str) -> None:
    folder = tmp_path / "source"
    if not folder.exists():
        fake_source(folder)
        (folder / "model_index.json").rename(folder / "good")
    good = json.loads((folder / "good").read_text())
    for made in (document, good | {key: document}):
        (folder / "model_index.json").write_text(json.dumps(made))
        try:
            plan = check_source(folder)
        except StoreError:
            continue
        assert plan.pipeline_class.isidentifier()
        for part in plan.parts:
            assert part.name.isidentifier() and part.class_name.isidentifier()
            assert part.folder.is_relative_to(folder)
    (folder / "model_index.json").unlink()


HEADER = b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"__metadata__":{"k":"v"}}'


@FILES
@given(data=bent([len(HEADER).to_bytes(8, "little") + HEADER + b"data"]))
def test_a_safetensors_file(tmp_path: Path, data: bytes) -> None:
    reads(tmp_path / "x.safetensors", data, read_header, StoreError)


@settings(max_examples=300, deadline=None)
@given(bent([HEADER]), st.integers(0, 100))
def test_a_safetensors_header(raw: bytes, size: int) -> None:
    try:
        header = parse_header(raw, data_size_bytes=size)
    except ValueError:
        return
    assert sum(span.size_bytes for span in header.tensors) == size


MANIFEST = b"""{"name": "m", "pipeline_class": "P", "components": [], "parts": [], "absent": [],
"init_kwargs": {}, "format_version": 1}"""


@FILES
@given(data=bent([MANIFEST]))
def test_a_manifest(tmp_path: Path, data: bytes) -> None:
    store = Store.open(tmp_path / "store", writable=True)
    store.model_folder("m").mkdir(exist_ok=True)
    reads(store.model_folder("m") / "manifest.json", data, lambda _: store.model("m"), StoreError)
    found, damaged = store.scan()
    assert set(found) | set(damaged) == {"m"}, "it is there, or it is told"


@pytest.mark.parametrize("read", [read_public_keys, read_secret_key])
@FILES
@given(data=bent([z85.encode(b"k" * 32) + b" alice\n", z85.encode(b"s" * 32)]))
def test_a_file_of_keys(tmp_path: Path, read: Callable[[Path], object], data: bytes) -> None:
    reads(tmp_path / "keys", data, read, CallerError)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=20))
def test_a_models_name_stays_in_the_store(name: str) -> None:
    store = Store(Path("/nowhere/store"))
    for text in (name, f"../{name}", f"{name}/..", f"/{name}", f"{name}\0", "." + name):
        try:
            folder = store.model_folder(text)
        except StoreError:
            continue
        assert folder.parent == Path("/nowhere/store/models") and folder.name == text not in (".", "..")

"""Adapters on the wire: what a client may ask, what the front end lets through, what comes back."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from test_cli_completion import completed
from understudy import Adapter, AdapterMisfit, CallerError, Client, Request, UnderstudyError, UnknownAdapter
from understudy.cli import main
from understudy.wire import Failed, Generate, ModelEntry
from wire_kit import MODELS, Dealer, FakeSink, Served, finished, ipc, request, serving

LORAS = [
    ModelEntry(name="pixel-art", pipeline="L", size_bytes=9, tier="disk", kind="lora", base="sd15-red"),
    ModelEntry(name="wrong", pipeline="L", size_bytes=9, tier="host", kind="lora"),
]


def echoes(sink: FakeSink, client: str, wish: Generate) -> None:
    reply, images = finished(wish)
    sink.reply(client, msgspec.structs.replace(reply, adapters=wish.adapters), images)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    sink = FakeSink(echoes)
    sink.entries = [*MODELS, *LORAS]
    with serving(ipc(tmp_path), sink) as served:
        yield served


def test_adapters_are_asked_for_in_order_and_echoed(served: Served) -> None:
    with Client(served.endpoint) as client:
        given = ["wrong", ("pixel-art", 1), Adapter("x", 0.25)]
        result = client.generate("sd15-red", "x", adapters=given)
        expected = (Adapter("wrong", 1.0), Adapter("pixel-art", 1.0), Adapter("x", 0.25))
        assert result.adapters == served.sink.submitted[0][1].adapters == expected
        assert client.generate("sd15-red", "x").adapters == ()


def test_many_requests_may_name_adapters(served: Served) -> None:
    with Client(served.endpoint) as client:
        requests = [Request(model="sd15-red", adapters=[("wrong", scale)]) for scale in (0.5, 2.0)]
        results = list(client.generate_many(requests, ordered=True))
    assert [result.adapters for result in results if not isinstance(result, UnderstudyError)] == [
        (Adapter("wrong", 0.5),),
        (Adapter("wrong", 2.0),),
    ]


@pytest.mark.parametrize("adapters", ["wrong", Adapter("wrong"), [("a", "b")], [("a", 1, 2)], [3], {"a": 1}])
def test_what_is_no_list_of_adapters_is_refused_before_it_is_sent(served: Served, adapters: Any) -> None:
    with Client(served.endpoint) as client, pytest.raises(CallerError, match="adapter"):
        client.generate("sd15-red", adapters=adapters)
    assert not served.sink.submitted


@pytest.mark.parametrize(
    ("adapters", "says"),
    [
        ([("a", float("nan"))], "scale of a is nan"),
        ([("a", float("inf"))], "scale of a is inf"),
        ([("a", -100.5)], "-100 to 100"),
        ([("", 1.0)], "1 to 256 characters"),
        ([("x" * 257, 1.0)], "1 to 256 characters"),
        ([(f"a{i}", 1.0) for i in range(17)], "17 adapters"),
    ],
    ids=str,
)
def test_bounds_are_held_before_the_sink(served: Served, adapters: Any, says: str) -> None:
    with Dealer(served.endpoint) as dealer:
        dealer.send(request(adapters=tuple(Adapter(*pair) for pair in adapters)))
        reply = dealer.receive_until(Failed)
        assert reply.code == "bad_request" and says in reply.message and not reply.retryable
        assert not served.sink.submitted


def test_the_bounds_themselves_are_let_through(served: Served) -> None:
    with Client(served.endpoint) as client:
        result = client.generate("sd15-red", adapters=[(f"a{i}", (-1) ** i * 100.0) for i in range(16)])
    assert len(result.adapters) == 16


@pytest.mark.parametrize(
    ("code", "kind"), [("unknown_adapter", UnknownAdapter), ("adapter_misfit", AdapterMisfit)]
)
def test_errors_are_typed(tmp_path: Path, code: str, kind: type[Exception]) -> None:
    def fails(sink: FakeSink, client: str, wish: Generate) -> None:
        sink.reply(client, Failed(id=wish.id, code=code, message="so it is"))

    with serving(ipc(tmp_path), FakeSink(fails)) as served, Client(served.endpoint) as client:
        with pytest.raises(kind, match="so it is") as caught:
            client.generate("sd15-red", adapters=["a"])
        assert isinstance(caught.value, CallerError) and not caught.value.retryable


def test_the_command_line(served: Served, tmp_path: Path) -> None:
    words = [
        "generate",
        "x",
        "-m",
        "sd15-red",
        "-q",
        "-o",
        str(tmp_path / "a.png"),
        "--endpoint",
        served.endpoint,
    ]
    result = CliRunner().invoke(main, [*words, "--lora", "pixel-art:0.8", "--lora", "wrong"])
    assert result.exit_code == 0, result.output
    assert served.sink.submitted[0][1].adapters == (Adapter("pixel-art", 0.8), Adapter("wrong", 1.0))
    assert "sd15-red + pixel-art:0.8 + wrong:1 (was" in result.stdout
    refused = CliRunner().invoke(main, [*words, "--lora", "pixel-art:much"])
    assert refused.exit_code == 2 and "pixel-art:0.8" in refused.output


def test_models_and_completion_tell_adapters_apart(served: Served) -> None:
    listed = CliRunner().invoke(main, ["models", "--endpoint", served.endpoint]).stdout
    assert "LoRA for sd15-red" in listed and "StableDiffusionXL" in listed
    assert completed(served.endpoint, "understudy generate --lora ")[0] == ["pixel-art", "wrong"]
    assert completed(served.endpoint, "understudy generate -m ")[0] == [e.name for e in [*MODELS, *LORAS]]

"""Both clients against a real front end over real ZeroMQ."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from understudy import (
    Accepted,
    AsyncClient,
    CallerError,
    Cancelled,
    CapacityError,
    Client,
    DaemonError,
    DeadlineExceeded,
    Progress,
    Result,
    TransportError,
    UnknownModel,
)
from understudy.session import Patience
from understudy.wire import Failed, Generate
from wire_kit import MODELS, FakeSink, Served, accepts, finished, image_of, ipc, serving

QUICK = Patience(heartbeat_s=0.05, silence_s=0.2, reconnect_s=10, refresh_s=1.0, deadline_grace_s=0.1)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serving(ipc(tmp_path)) as served:
        yield served


def fails_with(code: str, message: str = "do this", retryable: bool = False) -> Any:
    def script(sink: FakeSink, client: str, wish: Generate) -> None:
        sink.reply(client, Failed(id=wish.id, code=code, message=message, retryable=retryable))

    return script


# -- the blocking client -------------------------------------------------------------------------------------


def test_generate(served: Served, tmp_path: Path) -> None:
    with Client(served.endpoint) as client:
        result = client.generate("sd15-red", "a red circle", images=2, seed=5, steps=3)
    wish = served.sink.submitted[0][1]
    assert result.images == [image_of(wish, 0), image_of(wish, 1)]
    assert (result.seed, result.model, result.tier, result.switched) == (5, "sd15-red", "resident", True)
    assert result.timings.run_s == 1.5
    assert result.save(tmp_path / "out.png") == [tmp_path / "out-0.png", tmp_path / "out-1.png"]
    assert (tmp_path / "out-1.png").read_bytes() == image_of(wish, 1)


def test_a_seed_is_chosen_before_the_first_send(served: Served) -> None:
    with Client(served.endpoint) as client:
        seeds = {client.generate("sd15-red", "x").seed for _ in range(3)}
    assert len(seeds) == 3
    assert seeds == {wish.seed for _, wish in served.sink.submitted}


def test_stream_ends_with_the_result(served: Served) -> None:
    with Client(served.endpoint) as client:
        events = list(client.stream("sd15-red", "x", steps=4))
    assert isinstance(events[-1], Result)
    hints = [event for event in events[:-1] if isinstance(event, Progress)]
    assert [hint.step for hint in hints] == sorted({hint.step for hint in hints})
    assert all(isinstance(event, Accepted | Progress) for event in events[:-1])


def test_models_and_ping(served: Served) -> None:
    with Client(served.endpoint) as client:
        assert client.models() == MODELS
        pinged = client.ping()
    assert pinged.daemon == "daemon-1" and 0 < pinged.round_trip_s < 5


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("unknown_model", UnknownModel),
        ("model_removed", UnknownModel),
        ("queue_full", CapacityError),
        ("draining", CapacityError),
        ("out_of_memory", CapacityError),
        ("model_corrupt", DaemonError),
        ("internal", DaemonError),
        ("a_code_of_the_future", DaemonError),
    ],
)
def test_errors_are_typed_by_fault(tmp_path: Path, code: str, kind: type[Exception]) -> None:
    with serving(ipc(tmp_path), FakeSink(fails_with(code))) as served, Client(served.endpoint) as client:
        with pytest.raises(kind, match="do this") as caught:
            client.generate("nope", "x")
        assert type(caught.value) is kind
        assert client.models() == MODELS


def test_bad_input_is_the_callers_fault_and_the_client_goes_on(served: Served) -> None:
    with Client(served.endpoint) as client:
        for options in ({"width": 100}, {"steps": -1}, {"deadline_s": -1.0}, {"deadline_s": float("nan")}):
            with pytest.raises(CallerError):
                client.generate("sd15-red", "x", **options)
        with pytest.raises(CallerError, match="cannot be sent"):
            client.generate("sd15-red", 5)  # type: ignore[arg-type]
        with pytest.raises(CallerError, match="shorten"):
            client.generate("sd15-red", "x" * 100_000)
        assert client.generate("sd15-red", "x").images
        assert len(served.sink.submitted) == 1


def test_many_threads_share_a_client(served: Served) -> None:
    results: dict[int, list[bytes]] = {}

    def ask(client: Client, seed: int) -> None:
        results[seed] = client.generate("sd15-red", f"prompt {seed}", seed=seed).images

    with Client(served.endpoint) as client:
        threads = [threading.Thread(target=ask, args=(client, seed)) for seed in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(15)
    assert results == {seed: [f"PNG sd15-red {seed} prompt {seed} 0".encode()] for seed in range(20)}


def test_leaving_a_stream_cancels(tmp_path: Path) -> None:
    with serving(ipc(tmp_path), FakeSink(accepts)) as served, Client(served.endpoint) as client:
        for event in client.stream("sd15-red", "x"):
            assert isinstance(event, Accepted) and event.position == 3
            break
        served.sink.wait_for(lambda sink: bool(sink.cancelled))


def test_a_handle_is_cancelled(tmp_path: Path) -> None:
    with serving(ipc(tmp_path), FakeSink(accepts)) as served, Client(served.endpoint) as client:
        handle = client.submit("sd15-red", "x")
        assert not handle.done
        handle.cancel()
        with pytest.raises(Cancelled):
            handle.result()
        assert handle.done
        with pytest.raises(Cancelled):  # the answer stays
            handle.result()


def test_closing_cancels_what_is_open_and_tells_who_waits(tmp_path: Path) -> None:
    caught: list[BaseException] = []

    def wait(client: Client) -> None:
        try:
            client.generate("sd15-red", "x")
        except TransportError as error:
            caught.append(error)

    with serving(ipc(tmp_path), FakeSink(accepts)) as served:
        with Client(served.endpoint) as client:
            waiter = threading.Thread(target=wait, args=(client,))
            waiter.start()
            served.sink.wait_for(lambda sink: bool(sink.submitted))
            client.ping()
        waiter.join(15)
        assert [str(error) for error in caught] == ["the client was closed"]
        served.sink.wait_for(lambda sink: bool(sink.cancelled))
        with pytest.raises(TransportError, match="closed"):
            client.ping()


def test_a_deadline_is_kept_even_if_the_daemon_forgets_it(tmp_path: Path) -> None:
    with serving(ipc(tmp_path), FakeSink(accepts)) as served:
        with Client(served.endpoint, patience=QUICK) as client:
            with pytest.raises(DeadlineExceeded):
                client.generate("sd15-red", "x", deadline_s=0.2)
            served.sink.wait_for(lambda sink: bool(sink.cancelled))
        with Client(served.endpoint, timeout_s=0.2, patience=QUICK) as hasty, pytest.raises(DeadlineExceeded):
            hasty.generate("sd15-red", "x")
        assert [wish.deadline_s for _, wish in served.sink.submitted] == [0.2, 0.2]


def test_no_daemon_at_all(tmp_path: Path) -> None:
    with Client(ipc(tmp_path), reconnect_s=0.3) as client:
        handle = client.submit("sd15-red", "x")
        with pytest.raises(TransportError, match="is understudyd running"):
            client.ping()
        with pytest.raises(TransportError, match="no word from a daemon"):
            handle.result()


def test_a_client_may_start_before_its_daemon(tmp_path: Path) -> None:
    with Client(ipc(tmp_path), patience=QUICK) as client:
        handle = client.submit("sd15-red", "x", seed=3)
        with serving(ipc(tmp_path)) as served:
            assert handle.result().seed == 3
            assert len(served.sink.submitted) == 1


@pytest.mark.parametrize("endpoint", ["nonsense", "ipc://", "tcp://127.0.0.1"])
def test_an_endpoint_that_is_none(endpoint: str) -> None:
    with Client(endpoint) as client, pytest.raises(CallerError, match="no endpoint"):
        client.ping()


def test_after_the_daemon_restarts_the_same_request_gets_exactly_one_answer(tmp_path: Path) -> None:
    with Client(ipc(tmp_path), patience=QUICK) as client:
        with serving(ipc(tmp_path), FakeSink(accepts), daemon_id="first") as first:
            handle = client.submit("sd15-red", "x", seed=11)
            first.sink.wait_for(lambda sink: bool(sink.submitted))
            assert client.ping().daemon == "first"
        with serving(ipc(tmp_path), FakeSink(accepts), daemon_id="second") as second:
            second.sink.wait_for(lambda sink: bool(sink.submitted))
            assert client.ping().daemon == "second"
            name, wish = second.sink.submitted[0]
            assert wish == first.sink.submitted[0][1]  # the same id, the same seed
            second.call(lambda: second.sink.finish(name, wish))
            assert handle.result().images == [image_of(wish)]
            client.ping()
            assert len(second.sink.submitted) == 1


def test_a_client_the_daemon_expired_comes_back_by_itself(tmp_path: Path) -> None:
    with (
        serving(ipc(tmp_path), FakeSink(accepts)) as served,
        Client(served.endpoint, patience=QUICK) as client,
    ):
        handle = client.submit("sd15-red", "x")
        served.sink.wait_for(lambda sink: bool(sink.submitted))
        served.call(lambda: served.frontend._gone(next(iter(served.frontend._by_name.values())), "a test"))
        served.sink.wait_for(lambda sink: len(sink.submitted) == 2)
        (old, wish), (new, again) = served.sink.submitted
        assert old != new and wish == again and served.sink.gone == [old]
        served.call(lambda: served.sink.finish(old, wish))  # not this one's answer
        served.call(lambda: served.sink.reply(new, *finished(again, [b"the new run"])))
        assert handle.result().images == [b"the new run"]


CLIENT = """
import sys
from understudy import Client
with Client(sys.argv[1]) as client:
    client.generate("sd15-red", "x", progress=True)
"""


def test_a_killed_client_is_gone_within_one_progress(tmp_path: Path) -> None:
    with serving(ipc(tmp_path), FakeSink(accepts)) as served:
        child = subprocess.Popen([sys.executable, "-c", CLIENT, served.endpoint])
        try:
            served.sink.wait_for(lambda sink: bool(sink.submitted))
        finally:
            child.kill()
            child.wait(10)
        name, wish = served.sink.submitted[0]
        # The connection was closed before wait() returned; ZeroMQ's thread hears of it in its own time.
        served.until(lambda: bool(served.sink.gone), lambda: served.progress(name, wish.id))
        assert served.sink.gone == [name]


def test_ctrl_c_cancels(tmp_path: Path) -> None:
    with serving(ipc(tmp_path), FakeSink(accepts)) as served:
        child = subprocess.Popen([sys.executable, "-c", CLIENT, served.endpoint], stderr=subprocess.PIPE)
        try:
            served.sink.wait_for(lambda sink: bool(sink.submitted))
            child.send_signal(signal.SIGINT)
            _, errors = child.communicate(timeout=60)
        finally:
            child.kill()
        assert b"KeyboardInterrupt" in errors
        # Told by the cancel, or by the closed connection where that is seen first.
        served.sink.wait_for(lambda sink: bool(sink.cancelled or sink.gone))


# -- the asyncio client --------------------------------------------------------------------------------------


def test_async_generate_stream_models_ping(served: Served) -> None:
    async def main() -> None:
        async with AsyncClient(served.endpoint) as client:
            results = await asyncio.gather(
                *(client.generate("sd15-red", "x", seed=seed) for seed in range(50))
            )
            assert [result.seed for result in results] == list(range(50))
            events = [event async for event in client.stream("sd15-red", "x")]
            assert isinstance(events[-1], Result)
            assert await client.models() == MODELS
            assert (await client.ping()).daemon == "daemon-1"

    asyncio.run(main())


def test_a_cancelled_task_cancels_its_request(tmp_path: Path) -> None:
    async def main(endpoint: str) -> None:
        async with AsyncClient(endpoint) as client:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.generate("sd15-red", "x"), 0.2)
            await client.ping()

    with serving(ipc(tmp_path), FakeSink(accepts)) as served:
        asyncio.run(main(served.endpoint))
        served.sink.wait_for(lambda sink: bool(sink.cancelled))


def test_two_waiters_of_one_handle(served: Served) -> None:
    async def main() -> None:
        async with AsyncClient(served.endpoint) as client:
            handle = await client.submit("sd15-red", "x")
            one, two = await asyncio.gather(handle.result(), handle.result())
            assert one is two and handle.done

    asyncio.run(main())


# -- results and imports -------------------------------------------------------------------------------------


def test_importing_understudy_loads_nothing_heavy() -> None:
    code = (
        "import sys, understudy; heavy = {'torch', 'zmq', 'rich', 'click', 'asyncio', 'msgspec'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules); "
        "understudy.Client; assert 'zmq' in sys.modules and 'torch' not in sys.modules; "
        "assert 'understudyd' not in sys.modules; assert 'AsyncClient' in dir(understudy)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


def test_where_the_sockets_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from understudy import paths

    for name in ("UNDERSTUDY_RUNTIME_DIR", "UNDERSTUDY_ENDPOINT", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(paths, "SYSTEM_RUNTIME_DIR", tmp_path / "run")
    assert paths.runtime_dir() == Path(f"/tmp/understudy-{os.getuid()}")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/5")
    assert paths.default_endpoint() == "ipc:///run/user/5/understudy/understudy.sock"
    (tmp_path / "run").mkdir()
    assert paths.admin_socket() == tmp_path / "run" / "admin.sock"
    monkeypatch.setenv("UNDERSTUDY_RUNTIME_DIR", "/elsewhere")
    assert paths.default_endpoint() == "ipc:///elsewhere/understudy.sock"
    monkeypatch.setenv("UNDERSTUDY_ENDPOINT", "tcp://127.0.0.1:7000")
    assert paths.default_endpoint() == "tcp://127.0.0.1:7000"
    assert AsyncClient().endpoint == "tcp://127.0.0.1:7000"

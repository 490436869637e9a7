"""Clients that ask and never read: one whose program does not, one whose process is frozen."""

import asyncio
import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from family_kit import Family
from faults_kit import Stricken, stricken_daemon, until
from understudy import admin

REQUESTS, IMAGES, SIDE_PX = 60, 1, 128
OUTBOX = "1MiB"  # twenty answers
CLIENT_TIMEOUT_S = 2.0

DEAF = f"""
import select, sys, zmq
from understudy.wire import Generate, Ping, encode

socket = zmq.Context().socket(zmq.DEALER)
socket.setsockopt(zmq.RCVHWM, 1)
socket.connect(sys.argv[1])
for number in range({REQUESTS}):
    wish = Generate(
        id=f"r{{number}}", model="sd-a", prompt="x", seed=number, steps=1, images={IMAGES},
        width={SIDE_PX}, height={SIDE_PX}, format="raw", priority=-1,
    )
    socket.send(encode(wish))
print("asked", flush=True)
while not select.select([sys.stdin], [], [], 0.1)[0]:
    socket.send(encode(Ping(id="still-here")))
"""


@contextlib.contextmanager
def deaf_client(endpoint: str) -> Iterator["subprocess.Popen[str]"]:
    """It has asked, and goes on talking."""
    command = [sys.executable, "-c", DEAF, endpoint]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "asked\n"
        try:
            yield client
        finally:
            client.kill()


@pytest.fixture(scope="module")
def stricken(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stricken]:
    limits = {"outbox_bytes": OUTBOX, "client_timeout_s": CLIENT_TIMEOUT_S}
    with stricken_daemon(family, tmp_path_factory.mktemp("deaf"), server=limits) as stricken:
        yield stricken


@pytest.mark.parametrize("is_frozen", [False, True], ids=["talks on", "frozen"])
def test_a_client_never_reads(stricken: Stricken, is_frozen: bool) -> None:
    """Others are served beside it, and soon it is forgotten with all that it has asked for."""

    async def scenario() -> None:
        async with stricken.visited():
            await stricken.served("sd-a", "sd-c")
            with deaf_client(stricken.daemon.endpoint) as client:
                await until(lambda: stricken.ask(admin.Queue()), lambda rows: len(rows) > REQUESTS / 2)
                if is_frozen:
                    client.send_signal(signal.SIGSTOP)
                await stricken.served("sd-a", "sd-c", "sd-b")
                reason = "silent" if is_frozen else "read nothing"
                await asyncio.to_thread(stricken.daemon.wait_for_log, f"it has {'been ' * is_frozen}{reason}")
                await until(lambda: stricken.ask(admin.Queue()), lambda rows: not rows)
                await stricken.served("sd-a", "xl")
            await stricken.served("sd-c")
        stricken.daemon.log.clear()
        await stricken.emptied()

    asyncio.run(scenario())

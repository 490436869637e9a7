"""Who is behind a connection: bounds over all of one user's, and routing ids that are no use to others."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peer_kit import STRANGER, needs_root, open_folder
from understudy import CapacityError, Keys
from understudy.sync import Client
from understudy.wire import Accepted, Failed, Finished, decode_reply, encode
from understudyd.shell.client_book import UserBook
from understudyd.shell.curve import ServerKeys
from understudyd.shell.limits import Limits
from understudyd.shell.socket_access import SocketAccess
from wire_kit import Dealer, FakeSink, accepts, ipc, request, serving

_AS_ANOTHER = """
import json, os, sys, zmq
endpoint, uid, identity, headers = json.loads(sys.argv[1])
context = zmq.Context()
os.setgroups([]); os.setgid(uid); os.setuid(uid)
dealer = context.socket(zmq.DEALER)
dealer.setsockopt(zmq.ROUTING_ID, identity.encode())
dealer.connect(endpoint)
for header in headers:
    dealer.send(bytes.fromhex(header))
replies = []
while dealer.poll(1500 if replies else 15000):
    replies.append(dealer.recv_multipart()[0].hex())
print(json.dumps(replies))
dealer.close(linger=0); context.term()
"""


def replies_to(endpoint: str, identity: str, *headers: bytes) -> list[Any]:
    """What another user hears who sends these under a routing id."""
    arguments = json.dumps([endpoint, STRANGER, identity, [header.hex() for header in headers]])
    done = subprocess.run(
        [sys.executable, "-c", _AS_ANOTHER, arguments], capture_output=True, text=True, timeout=60, check=True
    )
    return [decode_reply(bytes.fromhex(reply)) for reply in json.loads(done.stdout)]


def test_connections_of_one_user_share_a_bound(tmp_path: Path) -> None:
    limits = Limits(max_open_per_client=3, max_open_per_user=4)
    with (
        serving(ipc(tmp_path), FakeSink(accepts), limits=limits) as served,
        Dealer(served.endpoint, b"one") as one,
        Dealer(served.endpoint, b"two") as two,
    ):
        for name in ("a", "b", "c"):
            one.send(request(name))
        served.sink.wait_for(lambda sink: len(sink.submitted) == 3)
        two.send(request("d"))
        two.send(request("e"))
        assert isinstance(two.receive_until(Accepted), Accepted)
        full = two.receive_until(Failed)
        assert (full.id, full.code, full.retryable) == ("e", "queue_full", True)
        assert f"4 requests of uid {os.getuid()} are open" in full.message
        client, wish = served.sink.submitted[0]
        served.call(lambda: served.sink.finish(client, wish))
        one.receive_until(Finished)
        two.send(request("e"))
        assert two.receive_until(Accepted).id == "e"


def test_who_goes_makes_room_for_who_stays(tmp_path: Path) -> None:
    limits = Limits(max_open_per_user=2)
    with (
        serving(ipc(tmp_path), FakeSink(accepts), limits=limits) as served,
        Dealer(served.endpoint, b"two") as two,
    ):
        with Dealer(served.endpoint, b"one") as one:
            one.send(request("a"))
            one.send(request("b"))
            served.sink.wait_for(lambda sink: len(sink.submitted) == 2)
        served.call(lambda: served.frontend._gone(served.frontend._by_identity[b"one"], "a test"))
        two.send(request("c"))
        assert two.receive_until(Accepted).id == "c"
        assert served.call(lambda: len(served.frontend._users)) == 1


@needs_root
def test_another_user_has_bounds_of_his_own_and_hears_no_kept_answer_of_a_stolen_routing_id() -> None:
    limits, access = Limits(max_open_per_user=1), SocketAccess(mode=0o666)
    with (
        open_folder() as folder,
        serving(ipc(folder), limits=limits, access=access) as served,
        Dealer(served.endpoint, b"victim") as victim,
    ):
        victim.send(request("mine", progress=False))
        victim.receive_until(Finished)
        served.sink.script = accepts
        victim.send(request("open"))
        victim.receive_until(Accepted)
        asks = served.sink.submitted[0][0]
        # The answer of "mine" is kept for who asks again; "open" is still to be answered.
        heard = replies_to(served.endpoint, "victim", encode(request("mine", seed=99)))
        assert [type(reply) for reply in heard] == [Accepted], "a request of his own, not the kept answer"
        assert served.sink.submitted[-1][1].seed == 99 and served.sink.submitted[-1][0] != asks
        assert served.sink.gone == [asks], "the victim's requests are taken back, not handed over"


def test_a_user_over_tcp_is_his_key() -> None:
    import zmq

    (server_public, server_secret), (public, secret) = (
        tuple(key.decode() for key in zmq.curve_keypair()) for _ in range(2)
    )
    keys = ServerKeys(server_secret, {public: "alice"})
    limits = Limits(max_open_per_user=1)
    with serving("tcp://127.0.0.1:*", FakeSink(accepts), keys=keys, limits=limits) as served:
        mine = Keys(secret, server_public)
        with Client(served.endpoint, keys=mine) as one, Client(served.endpoint, keys=mine) as two:
            next(iter(one.submit("sd15-red", "x")))
            with pytest.raises(CapacityError, match="1 requests of key alice"):
                two.generate("sd15-red", "x")


def test_the_book_of_users_forgets_who_has_nothing_open() -> None:
    book = UserBook()
    for _ in range(3):
        book.opened("uid 1")
    book.closed("uid 1", 2)
    assert book.open_requests("uid 1") == 1 and len(book) == 1
    book.closed("uid 1")
    book.closed("uid 2", 0)
    assert len(book) == 0

"""The blocking client: `AsyncClient` on its own thread, so that heartbeats go on while the caller thinks.

    with Client() as client:
        client.generate("sd15-anime", "a red circle", steps=20).save("out.png")

Threads may share one `Client`: every method may be called from any of them. One `Handle` or one stream
belongs to one thread at a time. Ctrl-C in `generate` or `stream` cancels the request and raises
`KeyboardInterrupt`; a `Handle` is cancelled by its owner. A client does not survive `os.fork`:
make one in each process.
"""

import asyncio
import itertools
import threading
from collections.abc import Coroutine, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from understudy.aio import AsyncClient, AsyncHandle
from understudy.errors import TransportError, UnderstudyError
from understudy.keys import Keys
from understudy.many import check_in_flight, outcome
from understudy.paths import RECONNECT_S
from understudy.request import Request, RequestFields
from understudy.results import Hint, Pinged, Result
from understudy.session import Patience
from understudy.wire import ModelEntry

_T = TypeVar("_T")


class Handle:
    """One submitted request."""

    def __init__(self, client: "Client", handle: AsyncHandle) -> None:
        self._client = client
        self._handle = handle
        self.id = handle.id
        self.seed = handle.seed

    def result(self) -> Result:
        """Wait for the images. Raises `UnderstudyError` when there are none."""
        return self._client._call(self._handle.result())

    def events(self) -> Iterator[Hint | Result]:
        """`Accepted` and `Progress` as they come, then `Result`. Raises `UnderstudyError` instead of it."""
        while True:
            yield (event := self._client._call(self._handle.next_event()))
            if isinstance(event, Result):
                return

    def __iter__(self) -> Iterator[Hint | Result]:
        return self.events()

    @property
    def done(self) -> bool:
        """Whether the answer is there."""
        return self._handle.done

    def cancel(self) -> None:
        """Take the request back; `result()` then raises `Cancelled`, unless it was finished before."""
        self._client._soon(self._handle.cancel)


class Client:
    """Asks a daemon for images; `AsyncClient` explains the arguments. Close it, or use `with`."""

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        timeout_s: float | None = None,
        reconnect_s: float = RECONNECT_S,
        patience: Patience | None = None,
        keys: Keys | None = None,
    ) -> None:
        self._client = AsyncClient(
            endpoint, timeout_s=timeout_s, reconnect_s=reconnect_s, patience=patience, keys=keys
        )
        self._loop = asyncio.new_event_loop()
        self._closed = False
        self._thread = threading.Thread(target=self._loop.run_forever, name="understudy-client", daemon=True)
        self._thread.start()
        self.endpoint = self._client.endpoint

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def generate(self, model: str, prompt: str = "", **fields: Unpack[RequestFields]) -> Result:
        """Images for a prompt. Raises `UnderstudyError`.

        Fields, all optional: `negative_prompt`, `seed`, `size` or `width` and `height`, `steps`, `guidance`,
        `images`, `adapters`, `scheduler`, `options`; `image`, `mask`, `control_image`, `inputs`, `task`;
        `format`, `quality`, `progress`; `priority`, `deadline_s`, `request_id`.
        `understudy.request.RequestFields` explains them.
        """
        return self._call(self._client.generate(model, prompt, **fields))

    def stream(
        self, model: str, prompt: str = "", **fields: Unpack[RequestFields]
    ) -> Generator[Hint | Result, None, None]:
        """`Accepted`, `Progress`, ..., `Result`. Leaving the loop early cancels the request."""
        handle = self.submit(model, prompt, **fields)
        try:
            yield from handle.events()
        finally:
            handle.cancel()

    def submit(self, model: str, prompt: str = "", **fields: Unpack[RequestFields]) -> Handle:
        """Send a request and return at once; see `RequestFields`. Raises `CallerError`."""
        return Handle(self, self._call(self._client.submit(model, prompt, **fields)))

    def generate_many(
        self,
        requests: Iterable[Request | tuple[str, str]],
        *,
        in_flight: int = 32,
        ordered: bool = False,
        return_errors: bool = False,
    ) -> Generator[Result | UnderstudyError, None, None]:
        """Results as they finish, or in order; `AsyncClient.generate_many` explains the arguments."""
        source = iter(requests)
        waiting: dict[Future[Result], None] = {}
        check_in_flight(in_flight)
        try:
            while True:
                for request in itertools.islice(source, in_flight - len(waiting)):
                    waiting[self._start(self._client._generate_one(request))] = None
                if not waiting:
                    return
                among = [next(iter(waiting))] if ordered else list(waiting)
                future = wait(among, return_when=FIRST_COMPLETED).done.pop()
                del waiting[future]
                yield outcome(future, return_errors)
        finally:
            for future in waiting:
                future.cancel()

    def models(self) -> list[ModelEntry]:
        """What may be asked for, with tiers. Raises `TransportError`."""
        return self._call(self._client.models())

    def ping(self) -> Pinged:
        """Is the daemon there, and how far? Raises `TransportError`."""
        return self._call(self._client.ping())

    def close(self) -> None:
        """Take all open requests back and disconnect. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        asyncio.run_coroutine_threadsafe(self._finish(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _finish(self) -> None:
        """Close, then let every waiting caller hear of it before the loop stops."""
        self._client.close()
        waiting = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*waiting, return_exceptions=True)

    def _start(self, work: Coroutine[Any, Any, _T]) -> "Future[_T]":
        if self._closed:
            work.close()
            raise TransportError("this client was closed; make another", code="closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _call(self, work: Coroutine[Any, Any, _T]) -> _T:
        future = self._start(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C: the coroutine takes its request back
            raise

    def _soon(self, work: Any) -> None:
        if not self._closed:
            self._loop.call_soon_threadsafe(work)

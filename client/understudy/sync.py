"""The blocking client: `AsyncClient` on its own thread, so that heartbeats go on while the caller thinks.

    with Client() as client:
        client.generate("sd15-anime", "a red circle", steps=20).save("out.png")

Threads may share one `Client`: every method may be called from any of them. One `Handle` or one stream
belongs to one thread at a time. Ctrl-C in `generate` or `stream` cancels the request and raises
`KeyboardInterrupt`; a `Handle` is cancelled by its owner. A client does not survive `os.fork`:
make one in each process.
"""

import asyncio
import threading
from collections.abc import Coroutine, Generator, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

from understudy.aio import AsyncClient, AsyncHandle
from understudy.errors import TransportError
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
        reconnect_s: float = 30.0,
        patience: Patience | None = None,
    ) -> None:
        self._client = AsyncClient(endpoint, timeout_s=timeout_s, reconnect_s=reconnect_s, patience=patience)
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

    def generate(self, model: str, prompt: str, **options: Any) -> Result:
        """Images for a prompt; `AsyncClient.submit` lists the options. Raises `UnderstudyError`."""
        return self._call(self._client.generate(model, prompt, **options))

    def stream(self, model: str, prompt: str, **options: Any) -> Generator[Hint | Result, None, None]:
        """`Accepted`, `Progress`, ..., `Result`. Leaving the loop early cancels the request."""
        handle = self.submit(model, prompt, **options)
        try:
            yield from handle.events()
        finally:
            handle.cancel()

    def submit(self, model: str, prompt: str, **options: Any) -> Handle:
        """Send a request and return at once; `AsyncClient.submit` lists the options."""
        return Handle(self, self._call(self._client.submit(model, prompt, **options)))

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

    def _call(self, work: Coroutine[Any, Any, _T]) -> _T:
        if self._closed:
            work.close()
            raise TransportError("this client was closed; make another", code="closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C: the coroutine takes its request back
            raise

    def _soon(self, work: Any) -> None:
        if not self._closed:
            self._loop.call_soon_threadsafe(work)

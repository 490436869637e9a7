"""Work that may hang for as long as a network mount does, without keeping the daemon from leaving."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any


async def in_daemon_thread(work: Callable[..., Any], *arguments: Any) -> Any:
    """Do `work(*arguments)` on a thread of its own; its result, or what it raises.

    An executor's threads are waited for when the process ends. One that reads a mount which is gone could be
    waited for in vain.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(result)
        else:
            done.set_exception(error)

    def run() -> None:
        result, failure = None, None
        try:
            result = work(*arguments)
        except BaseException as error:  # noqa: BLE001  a task's boundary: whoever waits gets it
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, name=f"waits for {work.__name__}", daemon=True).start()
    return await done

"""Understudy's client library: ask a daemon for images. Imports neither torch nor the daemon.

    from understudy import Client

    with Client() as client:
        client.generate("sd15-anime", "a red circle", steps=20).save("out.png")

Names are loaded when they are first used, so that `import understudy` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from understudy.aio import AsyncClient, AsyncHandle
    from understudy.errors import (
        AdapterMisfit,
        CallerError,
        Cancelled,
        CapacityError,
        DaemonError,
        DeadlineExceeded,
        NotAllowed,
        TransportError,
        UnderstudyError,
        UnknownAdapter,
        UnknownModel,
    )
    from understudy.keys import Keys
    from understudy.request import Request
    from understudy.results import Pinged, Result
    from understudy.sync import Client, Handle
    from understudy.wire import Accepted, Adapter, ModelEntry, Progress, Timings

__version__ = "0.1.0"

_HOME = {
    "AsyncClient": "aio",
    "AsyncHandle": "aio",
    "Client": "sync",
    "Handle": "sync",
    "Keys": "keys",
    "Pinged": "results",
    "Request": "request",
    "Result": "results",
    "Accepted": "wire",
    "Adapter": "wire",
    "ModelEntry": "wire",
    "Progress": "wire",
    "Timings": "wire",
    "AdapterMisfit": "errors",
    "CallerError": "errors",
    "Cancelled": "errors",
    "CapacityError": "errors",
    "DaemonError": "errors",
    "DeadlineExceeded": "errors",
    "NotAllowed": "errors",
    "TransportError": "errors",
    "UnderstudyError": "errors",
    "UnknownAdapter": "errors",
    "UnknownModel": "errors",
}

__all__ = [
    "Accepted",
    "Adapter",
    "AdapterMisfit",
    "AsyncClient",
    "AsyncHandle",
    "CallerError",
    "Cancelled",
    "CapacityError",
    "Client",
    "DaemonError",
    "DeadlineExceeded",
    "Handle",
    "Keys",
    "ModelEntry",
    "NotAllowed",
    "Pinged",
    "Progress",
    "Request",
    "Result",
    "Timings",
    "TransportError",
    "UnderstudyError",
    "UnknownAdapter",
    "UnknownModel",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

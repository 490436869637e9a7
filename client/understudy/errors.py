"""What can go wrong, sorted by whose fault it is.

`code` is the wire protocol's stable string; `retryable` says whether the same request may succeed
later. Every class says what to do about it.
"""


class UnderstudyError(Exception):
    """Base of all errors of this library. `request_id` is empty where no request was sent."""

    def __init__(self, message: str, *, code: str = "internal", retryable: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.retryable = retryable
        self.request_id = ""


class CallerError(UnderstudyError):
    """The request is wrong and will stay wrong: change it."""


class UnknownModel(CallerError):
    """The daemon has no such model: see `models()`."""


class UnknownAdapter(CallerError):
    """The daemon has no such LoRA: `models()` lists them, too."""


class AdapterMisfit(CallerError):
    """The LoRA was made for another kind of model: name one that it fits."""


class Cancelled(CallerError):
    """The request was taken back, by this client or by an operator."""


class CapacityError(UnderstudyError):
    """The daemon has no room or no time for it now: wait, or ask for less."""


class DeadlineExceeded(CapacityError):
    """The request's own deadline passed before it was finished."""


class DaemonError(UnderstudyError):
    """The daemon failed: its log says why."""


class TransportError(UnderstudyError):
    """The daemon cannot be reached, or speaks another protocol."""


class NotAllowed(TransportError):
    """The daemon asks for a key that this client does not have, or does not know the one it has."""


_BY_CODE: dict[str, type[UnderstudyError]] = {
    "bad_request": CallerError,
    "inputs_missing": CallerError,
    "unknown_model": UnknownModel,
    "model_removed": UnknownModel,
    "unknown_adapter": UnknownAdapter,
    "adapter_misfit": AdapterMisfit,
    "cancelled": Cancelled,
    "client_gone": Cancelled,
    "queue_full": CapacityError,
    "draining": CapacityError,
    "deadline_exceeded": DeadlineExceeded,
    "model_too_large": CapacityError,
    "out_of_memory": CapacityError,
    "model_corrupt": DaemonError,
    "load_failed": DaemonError,
    "internal": DaemonError,
    "unsupported_version": TransportError,
}


def error_from(code: str, message: str, retryable: bool) -> UnderstudyError:
    """The typed error for a `Failed` reply; codes of a newer daemon become `DaemonError`."""
    return _BY_CODE.get(code, DaemonError)(message, code=code, retryable=retryable)

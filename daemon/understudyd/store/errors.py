"""The one error the store raises: a stable code for programs, a sentence for people."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum


class StoreErrorCode(StrEnum):
    """What went wrong, by whose fault. The strings are stable: scripts and the admin protocol use them."""

    # the caller's fault
    BAD_NAME = "bad_name"
    NOT_FOUND = "not_found"
    EXISTS = "exists"
    # the source's fault
    UNSAFE_FILE = "unsafe_file"
    UNKNOWN_CLASS = "unknown_class"
    CORRUPT_SOURCE = "corrupt_source"
    UNSUPPORTED_SOURCE = "unsupported_source"
    UNREADABLE = "unreadable"
    NOT_PLAIN_LORA = "not_plain_lora"
    ADAPTER_MISFIT = "adapter_misfit"
    # the fault of an installed custom pipeline
    PIPELINE_FAILED = "pipeline_failed"
    # the hub's fault, or the way to it
    HUB_FORBIDDEN = "hub_forbidden"
    HUB_OFFLINE = "hub_offline"
    HUB_UNREACHABLE = "hub_unreachable"
    # not enough of something
    DISK_FULL = "disk_full"
    STORE_LOCKED = "store_locked"
    READ_ONLY = "read_only"
    # the store's own trouble
    CORRUPT_STORE = "corrupt_store"
    IO_ERROR = "io_error"
    INTERNAL = "internal"


class StoreError(Exception):
    """The store could not do what it was asked. `code` is stable, the message says what to do."""

    def __init__(self, code: StoreErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextmanager
def translated_write_errors(what: str) -> Iterator[None]:
    """Turn the operating system's refusals to write into `StoreError`; `what` names the operation."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in FULL_DISK:
            raise StoreError(
                StoreErrorCode.DISK_FULL,
                f"{what}: {reason}; free space on the store's disk (or raise its quota) and try again",
            ) from error
        raise StoreError(
            StoreErrorCode.IO_ERROR, f"{what}: {reason} ({error.filename or 'no file'}); see the kernel log"
        ) from error

"""How answers are put into frames, and what stands in for those that do not fit."""

from collections.abc import Sequence

import msgspec

from understudy.wire import Failed, Finished, WireError, encode

_MAX_MESSAGE_CHARS = 4096
_SHOWN_CHARS = 8


def answer_frames(reply: Finished | Failed, payload: Sequence[bytes] = ()) -> tuple[bytes, ...]:
    """Neither an error's text nor a long video may outgrow the header, whoever wrote it."""
    if isinstance(reply, Failed):
        if len(reply.message) > _MAX_MESSAGE_CHARS:
            reply = msgspec.structs.replace(reply, message=reply.message[:_MAX_MESSAGE_CHARS] + " ...")
        return (encode(reply),)
    try:
        return (encode(reply), *payload)
    except WireError:
        message = f"{len(payload)} images are too many for one answer; ask for fewer frames, or for mp4"
        return (encode(Failed(id=reply.id, code="bad_request", message=message)),)


def dropped(request_id: str, outbox_bytes: int) -> Failed:
    """In place of images that their client did not read in time."""
    return Failed(
        id=request_id,
        code="queue_full",
        message=f"the images were dropped: more than {outbox_bytes} bytes of answers waited for this client; "
        "read answers as they come, or raise outbox_bytes",
        retryable=True,
    )


def readable(identity: bytes) -> str:
    """The beginning of a routing id as text for people; the serial number behind it makes it unique.

    Not all of it: whoever knows a client's routing id can take its place.
    """
    text = identity.decode("ascii", errors="replace")
    return (text if text.isalnum() and text.isascii() else identity.hex())[:_SHOWN_CHARS]

"""How many bytes of input images wait with their requests, and when there is no room for more. Pure.

A request's images stay in memory until it is answered, so both a client and all of them together are
bounded; the second, because anybody can be many clients.
"""

from collections import defaultdict


class InputRoom:
    """Books by client and request. Sizes in bytes."""

    def __init__(self, per_client_bytes: int, in_all_bytes: int) -> None:
        self._per_client_bytes = per_client_bytes
        self._in_all_bytes = in_all_bytes
        self._held: defaultdict[str, dict[str, int]] = defaultdict(dict)
        self.held_bytes = 0

    def change(self, per_client_bytes: int, in_all_bytes: int) -> None:
        """Let so much wait from now on."""
        self._per_client_bytes, self._in_all_bytes = per_client_bytes, in_all_bytes

    def take(self, client: str, request_id: str, size_bytes: int) -> str | None:
        """Book a request's inputs; or book nothing and say why it must wait."""
        if not size_bytes:
            return None
        for whose, held_bytes, limit_bytes in (
            ("this client's", sum(self._held.get(client, {}).values()), self._per_client_bytes),
            ("all clients'", self.held_bytes, self._in_all_bytes),
        ):
            if held_bytes + size_bytes > limit_bytes:
                return (
                    f"there is no room for {size_bytes} bytes of input images: {held_bytes} of {whose} wait "
                    f"already, and {limit_bytes} may; wait for answers, or send smaller images"
                )
        self._held[client][request_id] = size_bytes
        self.held_bytes += size_bytes
        return None

    def give_back(self, client: str, request_id: str) -> None:
        """The request was answered."""
        held = self._held.get(client, {})
        self.held_bytes -= held.pop(request_id, 0)
        if not held:
            self._held.pop(client, None)

    def forget(self, client: str) -> None:
        """The client is gone, and its requests with it."""
        self.held_bytes -= sum(self._held.pop(client, {}).values())

"""What a daemon leaves to the next one: its host copies, and the models that were of most use.

It is the very event that the next machine is told. What is written down before each load is true whenever the
process dies: a copy whose place was given away is not in it any more.
"""

from collections.abc import Iterator

from understudyd.core.events import CopiesFound, KeptCopy
from understudyd.core.machine import Machine
from understudyd.core.states import ExtentState

_COMPLETE = (ExtentState.READY, ExtentState.LEASED)


def legacy(machine: Machine) -> CopiesFound:
    """As of now."""
    blobs, pool = machine.residency.blobs, machine.residency.copies.pool
    copies = (
        KeptCopy(copy.blob, copy.offset, blobs[copy.blob].info.size_bytes)
        for copy in pool
        if copy.state in _COMPLETE
    )
    return CopiesFound(tuple(copies), tuple(dict.fromkeys(_most_valuable_first(machine))))


def _most_valuable_first(machine: Machine) -> Iterator[str]:
    """Whose clients will ask again at once, in the order in which they would run; then by the forecast."""
    for request in (*machine.running.values(), *machine.on_deck.values()):
        yield request.model
    yield from machine.policy.expected_order(machine.queue, machine.demand, machine.on_stage)
    chance = machine.forecast.chance
    yield from sorted(machine.residency.ready, key=lambda name: (-chance(name), name))

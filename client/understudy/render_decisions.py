"""Decisions of the daemon as sentences, each with the numbers behind it."""

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from understudy.render import Document, duration, size

_MOST_NAMES = 3
_STYLE = {"Refused": "red", "FoundNoRoom": "yellow", "Stopped": "yellow", "Chosen": "green"}


def told(decisions: Sequence[Document]) -> RenderableType:
    """One line each, the newest last."""
    if not decisions:
        return Text("no decisions yet")
    grid = Table.grid(padding=(0, 2))
    grid.add_column(justify="right")
    for decision in decisions:
        kind = str(decision.get("decision"))
        ago = Text(f"{duration(decision.get('ago_s'))} ago", "dim")
        grid.add_row(ago, Text(sentence(decision), _STYLE.get(kind, "")))
    return grid


def sentence(decision: Document) -> str:
    """What was decided, for whom, by which numbers."""
    tell = _SENTENCES.get(str(decision.get("decision")))
    return tell(decision) if tell is not None else str(decision)


def _chosen(made: Document) -> str:
    who = f"{_models(made)} goes on stage for {made['client']} ({made['request']})"
    facts = [f"waited {duration(made['waited_s'])}"]
    if made.get("along_with"):
        facts.append(f"in one run with {made['along_with']}")
    if made["priority"]:
        facts.append(f"priority {made['priority']}")
    if made["skips"]:
        facts.append(f"was overtaken {_times(made['skips'])}")
    if made["was_on_stage"]:
        facts.append("its weights are there already")
    if not made["overtook"]:
        return f"{who}: {', '.join(facts)}; nobody who waits is before it"
    wait = f"{duration(made['longest_wait_s'])} since its turn came (bound {duration(made['max_wait_s'])})"
    most = f"one was overtaken {_times(made['most_skips'])} (bound {made['max_skips']})"
    return f"{who}: {', '.join(facts)}; overtakes {made['overtook']} before it: one waits {wait}, {most}"


def _loading(made: Document) -> str:
    way = "from the host pool" if made["is_from_host"] else "from disk"
    goal = " to the host pool" if made["is_to_host"] else ""
    reason = {
        "awaited": f"{_requests(made['waiting'])} for {_models(made)}",
        "pinned": f"{_models(made)} is pinned",
        "wanted": f"an operator wants {_models(made)}",
        "likely": f"{_models(made)} may be asked for next, and there is room",
    }[made["why"]]
    return f"loads {made['name']}, {size(made['size_bytes'])} {way}{goal}: {reason}, {_chance(made)}"


def _evicted(made: Document) -> str:
    victims = "; ".join(map(_victim, made["victims"]))
    if not made["room_for"]:
        return f"evicts {victims}: {made['why']}"
    return f"evicts {victims}: the cheapest room for {made['room_for']}, price {_price(made['price'])}"


def _victim(victim: Document) -> str:
    facts = [size(victim["size_bytes"]), _chance(victim)]
    if victim["waiting"]:
        facts.append(f"{_requests(victim['waiting'])} but later")
    if victim["has_copy"]:
        facts.append("stays in the host pool")
    if victim["price"] is not None:
        facts.append(f"price {_price(victim['price'])}")
    return f"{victim['name']} ({', '.join(facts)})"


def _found_no_room(made: Document) -> str:
    return (
        f"finds no room for {made['name']}, {size(made['size_bytes'])}: {size(made['free_bytes'])} are free, "
        f"{size(made['largest_gap_bytes'])} in one piece, and the rest is in use or needed sooner"
    )


def _stopped(made: Document) -> str:
    goal = " to the host pool" if made["is_to_host"] else ""
    waiting = f"{_requests(made['waiting'])}, but others first" if made["waiting"] else "nobody waits for it"
    return f"stops loading {made['name']}{goal}: {waiting}"


def _refused(made: Document) -> str:
    waited = "" if made["waited_s"] is None else f" after {duration(made['waited_s'])}"
    who = f"{made['client']} ({made['request']})"
    return f"refuses {_models(made)} to {who}{waited}: {made['code']}, {made['message']}"


_SENTENCES: dict[str, Callable[[Document], str]] = {
    "Chosen": _chosen,
    "Loading": _loading,
    "Evicted": _evicted,
    "FoundNoRoom": _found_no_room,
    "Stopped": _stopped,
    "Refused": _refused,
}


def _models(made: Document) -> str:
    names = list(made["models"])
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _requests(count: int) -> str:
    return "1 request waits" if count == 1 else f"{count} requests wait"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _chance(document: Document) -> str:
    return f"chance {100 * document['chance']:.2g} %"


def _price(price: Any) -> str:
    return "-" if price is None else f"{price:.3g}"

"""LoRAs, and combinations of a model and LoRAs, as tables for people."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from understudy.render import Document, Row, ago, facts, size, table, tier


def listing(document: Document) -> RenderableType:
    """What `understudyctl loras` shows."""
    loras = document.get("loras") or []
    if not loras:
        return Text("no LoRAs yet; `understudyctl add-lora SOURCE` adds some")
    parts: list[RenderableType] = [_adapters(loras)]
    if combinations := document.get("combinations"):
        parts += [Text(), _combinations(combinations)]
    return Group(*parts)


def adapter(document: Document) -> RenderableType:
    """One LoRA in full."""
    hidden = ("combinations", "decisions", "last_used_s_ago", "ranks", "tier")
    scalars = {key: value for key, value in document.items() if key not in hidden and value not in ("", [])}
    scalars |= {"rank": _ranks(document), "tier": document.get("tier"), "last_used": ago(document)}
    combinations = document.get("combinations")
    return Group(facts(scalars), *([Text(), _combinations(combinations)] if combinations else []))


def combination(document: Document) -> RenderableType:
    """One combination in full: the base's blobs, the overlays over them, and what these are made of."""
    scalars = {key: value for key, value in document.items() if not isinstance(value, list | dict)}
    scalars |= {"adapters": [f"{name} x {scale:g}" for name, scale in document.get("adapters") or []]}
    rows: list[Row] = [
        [
            str(part.get("name", "-")),
            str(part.get("role", "-")),
            tier(part),
            "yes" if part.get("host_copy") else "",
            size(part.get("size_bytes")),
            str(len(part.get("shared_by") or ())),
            " + ".join(f"{name} x {scale:g}" for name, scale in part.get("made_of") or []),
            f"{1e3 * part['fold_s']:.0f} ms" if "fold_s" in part else "",
            str(part.get("blob", ""))[:16],
        ]
        for part in document.get("components") or []
    ]
    columns = ["part", "what", "tier", "host copy", ">size", ">shared by", "made of", ">folds in", "blob"]
    return Group(facts(scalars), table(columns, rows))


def _adapters(loras: Sequence[Document]) -> RenderableType:
    rows: list[Row] = [
        [
            str(lora.get("name", "-")),
            str(lora.get("base") or "any that it fits"),
            _ranks(lora),
            size(lora.get("size_bytes")),
            tier(lora),
            f"{lora.get('overlays_resident', 0)} of {lora.get('overlays', 0)}",
            str(lora.get("requests", "-")),
            ago(lora),
        ]
        for lora in loras
    ]
    columns = ["lora", "base", ">rank", ">size", "tier", ">overlays resident", ">requests", ">last used"]
    return table(columns, rows)


def _combinations(combinations: Sequence[Document]) -> RenderableType:
    rows: list[Row] = [
        [
            str(one.get("name", "-")),
            _ranks(one),
            size(one.get("size_bytes")),
            tier(one),
            "pinned" if one.get("pinned") else "",
            str(one.get("requests", "-")),
            ago(one),
        ]
        for one in combinations
    ]
    columns = ["combination", ">rank", ">overlays", "tier", "pinned", ">requests", ">last used"]
    return table(columns, rows)


def _ranks(document: Document) -> str:
    ranks = document.get("ranks") or []
    if not ranks:
        return "-"
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"

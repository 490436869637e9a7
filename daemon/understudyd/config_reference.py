"""`python -m understudyd.config_reference [FILE]` writes the page of all configuration keys."""

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from understudyd.config import AUTO, Config, Mode, Rate, Size

_HEAD = """\
# Configuration

<!-- Written by `make docs-configuration` from daemon/understudyd/config.py; do not edit. -->

One TOML file: `understudyd serve --config FILE`, else `$UNDERSTUDY_CONFIG`, else
`/etc/understudy/understudyd.toml` where there is one, else the defaults. `UNDERSTUDY__SECTION__KEY` in the
environment overrides a key, for example `UNDERSTUDY__DEVICE__ARENA=60GiB`. Unknown keys are refused;
`understudyctl config check FILE` names all mistakes without starting anything.

A size is written with a unit, `"60GiB"` or `"512MB"`; a rate likewise, `"200MiB/s"`.

What belongs to one model is no key here: `understudyctl set MODEL --max-batch 4` lets one run make up to 4
images for several waiting requests with the same settings ([batches](policy.md#batches)). It takes effect at
once and is kept in `settings.json` in the store; 1, the default, turns it off.
"""

_WORDS: dict[Any, str] = {
    Size: "size",
    Rate: "rate",
    Mode: "mode",
    Path: "path",
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
}
_UNITS = ((1024**4, "TiB"), (1024**3, "GiB"), (1024**2, "MiB"), (1024, "KiB"))


def page() -> str:
    """The page, in Markdown: for each section its docstring, then key, type and default."""
    parts = [_HEAD]
    for section, kind in get_type_hints(Config).items():
        hints = get_type_hints(kind, include_extras=True)
        rows = [
            f"| `{field.name}` | {_type(hints[field.name])} | {_default(field)} |"
            for field in msgspec.structs.fields(kind)
        ]
        table = ["| key | type | default |", "| --- | --- | --- |", *rows]
        parts.append("\n".join([f"\n## [{section}]\n", inspect.getdoc(kind) or "", "", *table, ""]))
    return "".join(parts)


def _type(hint: Any) -> str:
    arguments = get_args(hint)
    match get_origin(hint):
        case origin if origin is Annotated:
            return _type(arguments[0]) + "".join(_bounds(meta) for meta in arguments[1:])
        case origin if origin is Literal:
            return ", ".join(f'`"{choice}"`' for choice in arguments)
        case origin if origin in (Union, UnionType):
            return _type(next(a for a in arguments if a is not NoneType))
        case origin if origin is tuple:
            return f"list of {_type(arguments[0])}s" if arguments[0] is not str else "list of texts"
    return _WORDS[hint]


def _bounds(meta: msgspec.Meta) -> str:
    limits = ((" above", meta.gt), (" from", meta.ge), (" to", meta.le))
    return "".join(f"{word} {limit}" for word, limit in limits if limit is not None)


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.default_factory is not msgspec.NODEFAULT:
        return _first_sentence(field.default_factory)
    value: Any = field.default
    if value is None:
        return "none"
    if isinstance(value, Size | Rate):
        return f'`"{_size(value)}"`'
    if isinstance(value, Mode):
        return f'`"{value:04o}"`'
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`{list(value)}`"
    return f'`"{value}"`' if isinstance(value, str) else f"`{value}`"


def _size(value: int) -> str:
    if value == AUTO:
        return "auto"
    rate = "/s" if isinstance(value, Rate) and value else ""
    for unit_bytes, unit in _UNITS:
        if value and value % unit_bytes == 0:
            return f"{value // unit_bytes}{unit}{rate}"
    return f"{int(value)}{rate}"


def _first_sentence(make: Callable[[], Any]) -> str:
    """What a computed default is, in the words of the function that computes it."""
    text = (inspect.getdoc(make) or "").partition("\n")[0]
    return text[:1].lower() + text[1:].removesuffix(".")


def main(arguments: list[str]) -> int:
    """Write the page to the file, or print it."""
    if arguments:
        Path(arguments[0]).write_text(page(), encoding="utf-8")
    else:
        print(page(), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""What is wrong with a configuration, all of it, and what is likely to be a mistake on this machine."""

import grp
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from understudyd.names import near

if TYPE_CHECKING:
    from understudyd.config import Config

Decode = Callable[[type, Any], Any]


def mistakes(document: Mapping[str, Any], whole: type["Config"], decode: Decode) -> list[str]:
    """A line for each key of the document that cannot be used, with what is allowed."""
    sections = get_type_hints(whole)
    lines: list[str] = []
    for name, table in document.items():
        if name not in sections:
            lines.append(f"there is no section [{name}]; {_instead(name, sections)}")
        elif not isinstance(table, dict):
            lines.append(f"{name} is {table!r:.40}; it is a section: write [{name}] and its keys below it")
        else:
            lines += _mistakes_in(name, table, sections[name], decode)
    return lines


def _mistakes_in(
    section: str, table: Mapping[str, Any], kind: type[msgspec.Struct], decode: Decode
) -> Iterator[str]:
    """Every key is read alone: all of them have defaults."""
    hints = get_type_hints(kind)
    for key, value in table.items():
        if key not in hints:
            yield f"[{section}] has no key {key!r}; {_instead(key, hints)}"
            continue
        try:
            msgspec.convert({key: value}, kind, dec_hook=decode)
        except msgspec.ValidationError as error:
            if get_origin(hints[key]) is Literal:
                allowed = ", ".join(f'"{choice}"' for choice in get_args(hints[key]))
                yield f"{section}.{key} is {value!r:.40}; it must be one of {allowed}"
            else:
                yield f"{section}.{key}: {str(error).partition(' - at ')[0]}"


def _instead(name: str, known: Mapping[str, Any]) -> str:
    meant = near(name, known)
    hint = "" if meant is None else f"did you mean {meant!r}? "
    return f"{hint}known are {', '.join(known)}"


def warnings(config: "Config") -> list[str]:
    """What can be read but will hardly work here."""
    from understudyd.shell.device import kind_of

    device = config.device
    lines: list[str] = []
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if kind_of(device) == "cpu" and device.arena > memory_bytes:
        lines.append(
            f"device.arena is {device.arena / 2**30:.1f} GiB and this machine has {memory_bytes / 2**30:.1f} "
            "GiB of memory: make it smaller"
        )
    if any(_may_need_keys(endpoint, config) for endpoint in config.server.endpoints):
        lines.append(
            "a tcp:// endpoint can be reached from other machines and [curve] names no keys: the daemon will "
            "not start unless the service manager has them as credentials (see SECURITY.md)"
        )
    return lines


def device_mistakes(config: "Config") -> list[str]:
    """Why nothing can be served on the device that is named, if it is not here. Asks the driver."""
    from understudyd.shell.device import gpu_uuid
    from understudyd.shell.memory import ArenaError

    try:
        gpu_uuid(config.device)
    except ArenaError as error:
        return [str(error)]
    return []


def door_mistakes(config: "Config") -> list[str]:
    """Endpoints that cannot be, and files of keys that cannot be used; what we may not read is left out."""
    from understudy.keys import KeyFileError, read_public_keys, read_secret_key
    from understudyd.shell.endpoints import EndpointError, check_endpoint, tcp_address

    lines: list[str] = []
    for endpoint in config.server.endpoints:
        try:
            check_endpoint(endpoint, has_keys=True)
        except EndpointError as error:
            lines.append(f"server.endpoints: {error}")
    for name, section in (("server", config.server), ("admin", config.admin), ("metrics", config.metrics)):
        group = section.socket_group
        if group is not None and not _is_group(group):
            lines.append(f"{name}.socket_group: there is no group {group!r} on this machine")
    for endpoint in config.metrics.endpoints:
        try:
            tcp_address(endpoint, allow_remote=config.metrics.allow_remote)
        except EndpointError as error:
            lines.append(f"metrics.endpoints: {error}")
    readers = (
        ("secret_key", config.curve.secret_key, read_secret_key),
        ("client_keys", config.curve.client_keys, read_public_keys),
    )
    for key, path, read in readers:
        if path is None or (path.exists() and not os.access(path, os.R_OK)):
            continue
        try:
            read(path)
        except KeyFileError as error:
            lines.append(f"curve.{key}: {error}")
    return lines


def _may_need_keys(endpoint: str, config: "Config") -> bool:
    from understudyd.shell.endpoints import is_loopback

    scheme, _, address = endpoint.partition("://")
    is_open = scheme == "tcp" and not is_loopback(address.rpartition(":")[0])
    return is_open and config.curve.secret_key is None


def _is_group(name: str) -> bool:
    try:
        grp.getgrnam(name)
    except KeyError:
        return False
    return True

"""A model's small parts: tokenizers, schedulers, processors. Built once per content, shared by models."""

import threading
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from understudyd.stage.classes import resolve
from understudyd.store.records import ModelRecord, PartRecord

_TOKENIZER_CALLS = ("__call__", "encode", "tokenize", "apply_chat_template", "pad")


class PartShelf:
    """Builds parts from a model's folder; a part lives as long as a prepared model uses it.

    Not thread-safe: only the preparing thread calls it.
    """

    def __init__(self) -> None:
        self._parts: WeakValueDictionary[tuple[str, str], Any] = WeakValueDictionary()

    def part(self, record: PartRecord, folder: Path) -> Any:
        """The part, shared by content. Schedulers are templates: give a request its own copy."""
        key = (record.class_name, record.content)
        part = self._parts.get(key)
        if part is None:
            part = resolve(record.library, record.class_name).from_pretrained(folder / record.name)
            if "Tokenizer" in record.class_name:
                _serialize_calls(part)
            self._parts[key] = part
        return part

    def parts(self, model: ModelRecord, folder: Path) -> dict[str, Any]:
        """All parts of a model by their names in the pipeline."""
        return {record.name: self.part(record, folder) for record in model.parts}


def is_scheduler(part: Any) -> bool:
    """Parts that step: each request needs its own."""
    return hasattr(part, "set_timesteps") and (hasattr(part, "step") or hasattr(part, "step_pred"))


def _serialize_calls(tokenizer: Any) -> None:
    """Make a shared tokenizer safe for two requests at a time.

    A call first sets padding and truncation on the one Rust object and then encodes; another thread's call
    in between would get the wrong length. The class keeps its name, which pipelines record.
    """
    lock = threading.RLock()
    base = type(tokenizer)
    guarded = {name: _under(lock, getattr(base, name)) for name in _TOKENIZER_CALLS if hasattr(base, name)}
    tokenizer.__class__ = type(base.__name__, (base,), {"__module__": base.__module__, **guarded})


def _under(lock: Any, method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with lock:
            return method(*args, **kwargs)

    return call

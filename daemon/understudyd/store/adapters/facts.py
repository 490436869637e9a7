"""What a LoRA's file and the notes beside it tell people: trigger words, licence, training settings.

Read are the header's `ss_*` entries (kohya's sd-scripts) and `modelspec.*` (Stability's ModelSpec), A1111's
`<file>.json` ("activation text", "description") and `<file>.civitai.info` ("trainedWords"). Whatever is
malformed is left out: none of it takes part in computing. No torch here.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from understudyd.store.adapters.records import AdapterFacts

_LONGEST_VALUE = 500
_LONGEST_NOTE_BYTES = 4 * 1024 * 1024
_MOST_WORDS = 50


def read_facts(path: Path, metadata: Mapping[str, str]) -> AdapterFacts:
    """Everything that is known of the LoRA at `path` whose header has this `metadata`."""
    a1111, civitai = _note(path.with_suffix(".json")), _note(path.with_suffix(".civitai.info"))
    words = [
        *_split(metadata.get("modelspec.trigger_phrase")),
        *_split(a1111.get("activation text")),
        *_trained_words(civitai.get("trainedWords")),
    ]
    return AdapterFacts(
        trigger_words=tuple(dict.fromkeys(words))[:_MOST_WORDS],
        licence=_text(metadata.get("modelspec.license")),
        description=_text(metadata.get("modelspec.description") or a1111.get("description")),
        metadata=dict(sorted(_kept(metadata))),
    )


def _kept(metadata: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for key, value in metadata.items():
        if key.startswith(("ss_", "modelspec.")) and len(value) <= _LONGEST_VALUE:
            yield key, value


def _note(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file() or path.stat().st_size > _LONGEST_NOTE_BYTES:
            return {}
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _trained_words(value: Any) -> Iterator[str]:
    for item in value if isinstance(value, list) else ():
        yield from _split(item)


def _split(value: Any) -> Iterator[str]:
    for word in value.split(",") if isinstance(value, str) else ():
        if word.strip():
            yield word.strip()[:_LONGEST_VALUE]


def _text(value: Any) -> str:
    return value[:_LONGEST_VALUE] if isinstance(value, str) else ""

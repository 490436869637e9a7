"""What the store writes down about adapters. No torch here.

A store folder gains::

    adapters/<name>/manifest.json  AdapterRecord; its tensors are an ordinary blob in blobs/

An adapter belongs to no model: it fits every model of its pipeline family whose components have the weights
that it changes, in whatever dtype.
"""

import hashlib
from collections.abc import Mapping
from typing import Literal

import msgspec

from understudyd.store.records import FORMAT_VERSION, BlobRecord, SignatureRecord, TensorRecord

TargetKind = Literal["linear", "conv"]


class TargetRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One weight that an adapter changes, and the two factors that change it.

    `path` and `shape` are those of the weight in the base component ("...attn1.to_q.weight"). `down` (A)
    has shape [rank, in, ...], `up` (B) [out, rank, ...]; their offsets count in the adapter's blob. With a
    scale s the weight gains B @ A times s * alpha / rank, or with `is_rank_stabilised` s * alpha /
    sqrt(rank). `alpha_dtype` is set where diffusers keeps alpha as a tensor of that dtype, in which it then
    computes.
    """

    component: str
    path: str
    kind: TargetKind
    shape: tuple[int, ...]
    rank: int
    alpha: float
    down: TensorRecord
    up: TensorRecord
    is_rank_stabilised: bool = False
    alpha_dtype: str | None = None


class BaseRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A component of the base that an adapter was checked against; see `structure_id`."""

    component: str
    class_name: str
    structure: str


class AdapterFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a file and the notes beside it say about an adapter, for people.

    `metadata` are the header's `ss_*` (kohya) and `modelspec.*` entries, the long ones left out.
    """

    trigger_words: tuple[str, ...] = ()
    licence: str = ""
    description: str = ""
    metadata: dict[str, str] = {}


class AdapterRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A LoRA, whole: what `adapters/<name>/manifest.json` holds.

    `family` is diffusers' loader class for the pipelines that it fits ("StableDiffusionLoraLoaderMixin").
    `base_model` is the model whose name it was added for, or the only one that it fitted; empty where that is
    open. `source_sha256` is that of the file, `content` is equal for adapters that compute equally
    (`content_id`): one blob may come with several alphas. `targets` are in order of their bytes in the blob.
    """

    name: str
    family: str
    bases: tuple[BaseRecord, ...]
    base_model: str
    targets: tuple[TargetRecord, ...]
    blob: BlobRecord
    content: str
    facts: AdapterFacts = AdapterFacts()
    source: str = ""
    source_sha256: str = ""
    added_at_unix_s: float = 0.0
    format_version: int = FORMAT_VERSION

    @property
    def ranks(self) -> tuple[int, ...]:
        """Every rank that occurs, ascending."""
        return tuple(sorted({target.rank for target in self.targets}))

    @property
    def components(self) -> tuple[str, ...]:
        """The components it changes."""
        return tuple(dict.fromkeys(target.component for target in self.targets))


def content_id(targets: tuple[TargetRecord, ...], blob: BlobRecord) -> str:
    """Equal for adapters that change equal weights by equal amounts."""
    return hashlib.sha256(msgspec.json.encode((targets, blob.sha256))).hexdigest()


def structure_id(signature: SignatureRecord) -> str:
    """Equal for components whose parameters have equal paths and shapes: a signature without its dtypes."""
    shapes = sorted((t.path, t.shape) for t in signature.tensors if t.kind == "parameter")
    content = msgspec.json.encode((signature.class_name, shapes))
    return hashlib.sha256(content).hexdigest()[:32]


def misfit(adapter: AdapterRecord, components: Mapping[str, SignatureRecord]) -> str | None:
    """The first thing that keeps an adapter off these components (by name); None if it fits."""
    structures = {base.component: base.structure for base in adapter.bases}
    for name in adapter.components:
        if name not in components:
            return f"has no {name}, which the adapter changes"
    if all(structure_id(components[name]) == structures.get(name) for name in adapter.components):
        return None
    return target_misfit(adapter.targets, components)


def target_misfit(targets: tuple[TargetRecord, ...], components: Mapping[str, SignatureRecord]) -> str | None:
    """The first target that these components have not, or in another shape."""
    shapes = {name: {t.path: t.shape for t in signature.tensors} for name, signature in components.items()}
    for target in targets:
        found = shapes.get(target.component, {}).get(target.path)
        where = f"{target.component}.{target.path}"
        if found is None:
            return f"has no {where}, which the adapter changes"
        if found != target.shape:
            return f"has {where} in shape {list(found)}, the adapter changes {list(target.shape)}"
    return None

"""What the store writes down about models, as frozen structs with one JSON form.

This module imports no torch: the parent reads manifests while torch is still being imported, and
tools can read a store without it.

Layout of a store folder::

    blobs/<sha256>.safetensors     weights of one component, content-addressed
    signatures/<id>.json           SignatureRecord, shared by every fine-tune
    models/<name>/manifest.json    ModelRecord
    models/<name>/<part>/...       small files (tokenizer, scheduler, feature extractor)
    tmp/                           work in progress; emptied when a writer opens the store
    writer.lock                    flock held by whoever writes
    serving.lock                   flock shared by daemons that serve from here; only whoever is alone deletes
    settings.json                  what an operator has set for single models (shell/model_settings.py)
    forecast.json                  what the forecast has learned (shell/forecast_file.py)
    cache/<sha256>.safetensors     local copies of blobs of read-only stores
"""

from typing import Any, Literal

import msgspec

FORMAT_VERSION = 1
TENSOR_ALIGN_BYTES = 512
DATA_ALIGN_BYTES = 4096

TensorKind = Literal["parameter", "buffer", "temporary_buffer", "attribute"]


class TensorRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor of a component, or a tie to another one.

    `path` is the dotted path from the component's root. `offset` counts bytes from the start of the
    blob's data section (so also from the start of its extent) and is a multiple of 512. `dtype` is
    the safetensors name ("F16", "BF16", "F32", "I64", ...). `alias_of` names the path that holds the
    bytes when this path is tied to it; then `offset` and `size_bytes` repeat that path's.
    `temporary_buffer` is a buffer that `state_dict` leaves out (persistent=False); `attribute` is a
    plain tensor attribute of a module.
    """

    path: str
    kind: TensorKind
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int
    alias_of: str | None = None


class SignatureRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of a component without its weights: enough to build a skeleton.

    `library` is "diffusers" or "transformers" (or a "diffusers.pipelines.*" module path);
    `config` is canonical: no `_name_or_path`, no versions. `size_bytes` is the length of the data
    section, a multiple of 4096, equal for every blob of this signature. `tensors` are in blob order,
    ties after the tensors they point to.
    """

    id: str
    library: str
    class_name: str
    config: dict[str, Any]
    attn_implementation: str | None = None
    size_bytes: int
    tensors: tuple[TensorRecord, ...]
    format_version: int = FORMAT_VERSION


class BlobRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Where a component's bytes are and how to check them.

    The file's data section starts at `data_start_bytes` (a multiple of 4096) and is `size_bytes` long;
    `xxh3` holds the XXH3-64 of each `chunk_bytes` piece of the data section, the last one shorter.
    """

    sha256: str
    data_start_bytes: int
    size_bytes: int
    chunk_bytes: int
    xxh3: tuple[int, ...]


class ComponentRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One component of a model: its name in the pipeline, its signature's id and its blob."""

    name: str
    signature: str
    blob: BlobRecord


class PartRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A small part without weights: tokenizer, scheduler, image processor.

    `content` is the sha256 over its files' names and bytes: equal parts are built once.
    """

    name: str
    library: str
    class_name: str
    content: str


class ModelRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A model, whole: what `manifest.json` holds.

    `pipeline_library` is "diffusers", or "understudy.pipelines" for an installed class, whose entry point is
    `pipeline_class` and whose config is in `init_kwargs`.
    `components` are in order of first use. `absent` names optional pipeline parts that are None.
    `init_kwargs` are the pipeline constructor's other arguments (`requires_safety_checker`, ...).
    `dtype` is what the operator asked for ("keep", "fp16", "bf16", "fp32").
    """

    name: str
    pipeline_class: str
    components: tuple[ComponentRecord, ...]
    parts: tuple[PartRecord, ...]
    absent: tuple[str, ...] = ()
    init_kwargs: dict[str, Any] = {}
    pipeline_library: str = "diffusers"
    dtype: str = "keep"
    source: str = ""
    added_at_unix_s: float = 0.0
    format_version: int = FORMAT_VERSION

    @property
    def size_bytes(self) -> int:
        """Arena bytes of the model if it shared nothing."""
        return sum({c.blob.sha256: c.blob.size_bytes for c in self.components}.values())

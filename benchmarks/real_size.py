"""Stable Diffusion 1.5 and SDXL in their real sizes, with cheap random bits for weights.

The configs are those of the published models; nothing is downloaded. Weights are written straight into an
arena, without a module that holds them. `narrow` keeps every tensor and shrinks its channels, for tests;
`sample_size` (latent pixels) is the side of the default image, and changes no tensor.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from understudy_demo import tiny
from understudyd.store.records import (
    DATA_ALIGN_BYTES,
    BlobRecord,
    ComponentRecord,
    ModelRecord,
    PartRecord,
    SignatureRecord,
    TensorRecord,
)
from understudyd.store.safetensors_file import plan_blob
from understudyd.store.signature import canonical_config, dtype_name, held_tensors, library_of

_BLOCK_BYTES = 8 << 20
_STRIDE_BYTES = 4096


@dataclass(frozen=True)
class Architecture:
    """A pipeline class and how its components are built, in order of first use."""

    pipeline_class: str
    builders: dict[str, Callable[[], nn.Module]]
    tokenizers: tuple[str, ...]
    init_kwargs: dict[str, Any] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float16

    @cached_property
    def signatures(self) -> dict[str, SignatureRecord]:
        """Each component's shape."""
        return {part: _signature(build, self.dtype) for part, build in self.builders.items()}

    @property
    def tensor_count(self) -> int:
        return sum(len(signature.tensors) for signature in self.signatures.values())

    @property
    def size_bytes(self) -> int:
        return sum(signature.size_bytes for signature in self.signatures.values())


def sd15(*, narrow: bool = False, sample_size: int = 64) -> Architecture:
    """Stable Diffusion 1.5: 860 M parameters in the UNet."""
    channels = (32, 64, 128, 128) if narrow else (320, 640, 1280, 1280)
    text_width = 64 if narrow else 768
    builders: dict[str, Callable[[], nn.Module]] = {
        "text_encoder": lambda: _text(CLIPTextModel, text_width, 12, 12, "quick_gelu"),
        "unet": lambda: UNet2DConditionModel(
            sample_size=sample_size,
            block_out_channels=channels,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            cross_attention_dim=text_width,
            attention_head_dim=8,
        ),
        "vae": lambda: _vae(narrow, sample_size=8 * sample_size, scaling_factor=0.18215),
    }
    return Architecture(
        "StableDiffusionPipeline",
        builders,
        tokenizers=("tokenizer",),
        init_kwargs={"requires_safety_checker": False},
        absent=("safety_checker", "feature_extractor", "image_encoder"),
    )


def sdxl(*, narrow: bool = False, sample_size: int = 128) -> Architecture:
    """Stable Diffusion XL 1.0 base: 2.6 G parameters in the UNet, two text encoders."""
    channels = (32, 64, 128) if narrow else (320, 640, 1280)
    width, width_2 = (64, 80) if narrow else (768, 1280)
    builders: dict[str, Callable[[], nn.Module]] = {
        "text_encoder": lambda: _text(CLIPTextModel, width, 12, 12, "quick_gelu"),
        "text_encoder_2": lambda: _text(
            CLIPTextModelWithProjection, width_2, 32, 20, "gelu", projection_dim=width_2
        ),
        "unet": lambda: UNet2DConditionModel(
            sample_size=sample_size,
            block_out_channels=channels,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=width + width_2,
            attention_head_dim=(1, 2, 4) if narrow else (5, 10, 20),
            use_linear_projection=True,
            transformer_layers_per_block=(1, 2, 10),
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=width_2 + 6 * 256,
        ),
        "vae": lambda: _vae(narrow, sample_size=8 * sample_size, scaling_factor=0.13025, force_upcast=True),
    }
    return Architecture(
        "StableDiffusionXLPipeline",
        builders,
        tokenizers=("tokenizer", "tokenizer_2"),
        absent=("image_encoder", "feature_extractor"),
    )


def _text(model: type[Any], width: int, layers: int, heads: int, act: str, **changes: Any) -> nn.Module:
    heads = heads if width % heads == 0 else 4
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act=act,
        **changes,
    )
    module: nn.Module = model(config)
    return module


def _vae(narrow: bool, **changes: Any) -> nn.Module:
    module: nn.Module = AutoencoderKL(
        block_out_channels=(32, 64, 128, 128) if narrow else (128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        **changes,
    )
    return module


def _signature(build: Callable[[], nn.Module], dtype: torch.dtype) -> SignatureRecord:
    """What ingest would record of this module, read off a module without memory."""
    with torch.device("meta"):
        module = build().to(dtype)
    held = list(held_tensors(module))
    layout = plan_blob((path, dtype_name(tensor.dtype), tuple(tensor.shape)) for path, _, tensor in held)
    spans = {span.name: span for span in layout.tensors}
    records = tuple(
        TensorRecord(
            path=path,
            kind=kind,
            dtype=spans[path].dtype,
            shape=spans[path].shape,
            offset=spans[path].begin,
            size_bytes=spans[path].size_bytes,
        )
        for path, kind, _ in held
    )
    config = module.config
    return SignatureRecord(
        id=f"{type(module).__name__}-{layout.size_bytes}",
        library=library_of(type(module)),
        class_name=type(module).__name__,
        config=canonical_config(config),
        attn_implementation=getattr(config, "_attn_implementation", None),
        size_bytes=layout.size_bytes,
        tensors=records,
    )


def save_parts(architecture: Architecture, folder: Path) -> tuple[PartRecord, ...]:
    """Write scheduler and tokenizers to `folder`, a folder each; their records."""
    tiny.scheduler().save_pretrained(folder / "scheduler")
    for part in architecture.tokenizers:
        tiny.tokenizer().save_pretrained(folder / part)
    return (
        PartRecord(
            name="scheduler", library="diffusers", class_name="EulerDiscreteScheduler", content="scheduler"
        ),
        *(
            PartRecord(name=part, library="transformers", class_name="CLIPTokenizer", content="tokenizer")
            for part in architecture.tokenizers
        ),
    )


class RealSizeStore:
    """Models of one architecture whose blobs exist only in an arena: enough of a store for the stage."""

    def __init__(self, architecture: Architecture, names: tuple[str, ...], folder: Path) -> None:
        self._architecture = architecture
        self._folder = folder
        self._signatures = {s.id: s for s in architecture.signatures.values()}
        self._parts = save_parts(architecture, folder)
        self._models = {name: self._model(name) for name in names}

    def model(self, name: str) -> ModelRecord:
        return self._models[name]

    def models(self) -> dict[str, ModelRecord]:
        return self._models

    def signature(self, signature_id: str) -> SignatureRecord:
        return self._signatures[signature_id]

    def model_folder(self, name: str) -> Path:
        return self._folder

    def _model(self, name: str) -> ModelRecord:
        architecture = self._architecture
        return ModelRecord(
            name=name,
            pipeline_class=architecture.pipeline_class,
            components=tuple(
                ComponentRecord(name=part, signature=signature.id, blob=_blob(name, part, signature))
                for part, signature in architecture.signatures.items()
            ),
            parts=self._parts,
            absent=architecture.absent,
            init_kwargs=architecture.init_kwargs,
        )


def _blob(model: str, part: str, signature: SignatureRecord) -> BlobRecord:
    return BlobRecord(
        sha256=hashlib.sha256(f"{model}/{part}".encode()).hexdigest(),
        data_start_bytes=DATA_ALIGN_BYTES,
        size_bytes=signature.size_bytes,
        chunk_bytes=signature.size_bytes,
        xxh3=(),
    )


class RandomWeights:
    """Random bits for one model. Each tensor is a rotation of one random block that no other tensor has."""

    def __init__(self, seed: int) -> None:
        block = np.random.default_rng(seed).integers(0, 256, _BLOCK_BYTES, dtype=np.uint8)
        self._twice = np.concatenate([block, block])
        self._tensors_written = 0

    def write(self, extent: Tensor, signature: SignatureRecord) -> dict[str, int]:
        """Fill one blob's extent (uint8, `signature.size_bytes`); xxh3 of what was written, by path."""
        return {
            record.path: self._write(extent.numpy()[record.offset : record.offset + record.size_bytes])
            for record in signature.tensors
        }

    def _write(self, target: "np.ndarray[Any, np.dtype[np.uint8]]") -> int:
        start = self._tensors_written * _STRIDE_BYTES % _BLOCK_BYTES
        self._tensors_written += 1
        digest = xxhash.xxh3_64()
        for position in range(0, len(target), _BLOCK_BYTES):
            piece = self._twice[start : start + min(_BLOCK_BYTES, len(target) - position)]
            target[position : position + len(piece)] = piece
            digest.update(memoryview(piece))
        return digest.intdigest()


def checksums(tensors: Iterator[tuple[TensorRecord, Tensor]]) -> dict[str, int]:
    """xxh3 of the bytes behind live tensors, by path."""
    return {
        record.path: xxhash.xxh3_64_intdigest(tensor.detach().reshape(-1).view(torch.uint8).numpy())
        for record, tensor in tensors
    }

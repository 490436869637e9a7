"""The table: every pipeline kind that the tests serve, and how it is asked."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from understudy_demo import tiny
from understudyd.store.ingest import DType
from zoo import diffusion_transformers, unets, videos

PROMPT = "a red circle on blue"
SIZE = 32
_SMALL = {"width": SIZE, "height": SIZE}


@dataclass(frozen=True)
class Kind:
    """One row. `build(seed)` makes a pipeline with weights of that seed.

    `call` are the pipeline's keyword arguments, images as functions that make them; `many_steps` what makes a
    call long enough to be cancelled half-way. `saved_as` casts components before they are saved,
    `ingested_as` is ingest's dtype, and `reference_dtype` what plain diffusers is asked for instead.
    """

    name: str
    build: Callable[[int], Any]
    special: str
    call: Mapping[str, Any]
    has_prompt: bool = True
    many_steps: Mapping[str, Any] = field(default_factory=lambda: {"num_inference_steps": 400})
    saved_as: Mapping[str, torch.dtype] = field(default_factory=dict)
    ingested_as: DType = "keep"
    reference_dtype: Any = torch.float32

    def save(self, seed: int, folder: Path) -> Path:
        """A diffusers folder of the pipeline with the weights of `seed`."""
        pipeline = self.build(seed)
        for name, dtype in self.saved_as.items():
            getattr(pipeline, name).to(dtype)
        return tiny.save(pipeline, folder)

    def arguments(self, **changes: Any) -> dict[str, Any]:
        """Keyword arguments for one call, without the generator."""
        prompt = {"prompt": PROMPT} if self.has_prompt else {}
        made = {name: value() if callable(value) else value for name, value in self.call.items()}
        return prompt | {"num_inference_steps": 2} | made | changes


def picture() -> Image.Image:
    """An input: a gradient with a corner cut out."""
    image = Image.linear_gradient("L").resize((SIZE, SIZE)).convert("RGB")
    image.paste((200, 30, 60), (4, 4, 16, 16))
    return image


def mask() -> Image.Image:
    """The left half."""
    image = Image.new("L", (SIZE, SIZE), 0)
    image.paste(255, (0, 0, SIZE // 2, SIZE))
    return image


_XL_HALF = dict.fromkeys(("unet", "vae", "text_encoder", "text_encoder_2"), torch.float16)
_WAN_HALF = dict.fromkeys(("transformer", "text_encoder"), torch.bfloat16)

KINDS = (
    Kind("sd15", unets.stable_diffusion, "no safety checker", _SMALL),
    Kind("sd15-checked", unets.stable_diffusion_checked, "with safety checker and image processor", _SMALL),
    Kind("sd2", unets.stable_diffusion_2, "v-prediction, linear projections", _SMALL),
    Kind("lcm", unets.latent_consistency, "guidance is an embedding; LCM scheduler", _SMALL,
         many_steps={"num_inference_steps": 400, "original_inference_steps": 500}),
    Kind("sd-inpaint", unets.inpaint, "nine input channels; image and mask",
         _SMALL | {"image": picture, "mask_image": mask}),
    Kind("pix2pix", unets.instruct_pix2pix, "edits an image by instruction", {"image": picture}),
    Kind("controlnet", unets.controlnet, "a ControlNet component; control image",
         _SMALL | {"image": picture}),
    Kind("sdxl", unets.stable_diffusion_xl, "two text encoders; upcasts its VAE from float16", _SMALL,
         saved_as=_XL_HALF, reference_dtype=torch.float16),
    Kind("sdxl-turbo", unets.stable_diffusion_xl_turbo, "no guidance, one step, trailing timesteps",
         _SMALL | {"guidance_scale": 0.0, "num_inference_steps": 1}),
    Kind("sdxl-refiner", unets.stable_diffusion_xl_refiner, "image to image; first text encoder absent",
         {"image": picture, "strength": 0.9}),
    Kind("sd3", diffusion_transformers.stable_diffusion_3, "three text encoders, one a T5", _SMALL),
    Kind("flux", diffusion_transformers.flux, "embedded guidance, dynamic shift; CLIP and T5", _SMALL),
    Kind("chroma", diffusion_transformers.chroma, "T5 only, masked attention", _SMALL),
    Kind("pixart", diffusion_transformers.pixart, "T5 with ties", _SMALL | {"use_resolution_binning": False}),
    Kind("pixart-half", diffusion_transformers.pixart, "float16; T5 keeps modules in float32",
         _SMALL | {"use_resolution_binning": False}, ingested_as="fp16", reference_dtype=torch.float16),
    Kind("lumina2", diffusion_transformers.lumina_2, "complex rotary tables in a list; Gemma 2", _SMALL),
    Kind("z-image", diffusion_transformers.z_image, "rotary tables made at the first step; Qwen 3", _SMALL),
    Kind("qwen-image", diffusion_transformers.qwen_image,
         "complex rotary tables as plain attributes, behind cached methods; Qwen 2.5 VL", _SMALL),
    Kind("sana", diffusion_transformers.sana, "linear attention; deep-compression autoencoder; Gemma 2",
         _SMALL | {"use_resolution_binning": False}),
    Kind("auraflow", diffusion_transformers.aura_flow, "learned positions; UMT5", _SMALL),
    Kind("hunyuan-dit", diffusion_transformers.hunyuan_dit, "BERT and T5",
         _SMALL | {"use_resolution_binning": False}),
    Kind("kandinsky3", unets.kandinsky_3, "T5; quantising autoencoder", _SMALL),
    Kind("dit", diffusion_transformers.class_conditional, "class labels instead of a prompt",
         {"class_labels": [7]}, has_prompt=False),
    Kind("ddpm", unets.unconditional, "unconditional, in pixels", {}, has_prompt=False),
    Kind("animatediff", unets.animatediff, "video; constructor merges UNet and motion adapter",
         _SMALL | {"num_frames": 3}),
    Kind("wan", videos.wan, "video; rotary buffers outside the state dict; UMT5",
         _SMALL | {"num_frames": 5}),
    Kind("wan-half", videos.wan, "video; bfloat16 with a float32 VAE and float32 norms",
         _SMALL | {"num_frames": 5}, saved_as=_WAN_HALF,
         reference_dtype={"default": torch.float32} | _WAN_HALF),
    Kind("ltx", videos.ltx, "video; latent statistics as buffers; T5", _SMALL | {"num_frames": 9}),
    Kind("cogvideox", videos.cogvideox, "video; causal convolutions with caches; T5",
         _SMALL | {"num_frames": 9, "max_sequence_length": 16}),
    Kind("svd", videos.stable_video_diffusion, "image to video, no prompt",
         _SMALL | {"image": picture, "num_frames": 2, "min_guidance_scale": 1.0}, has_prompt=False),
)  # fmt: skip

"""Pipelines around UNets: the Stable Diffusion family and its kin."""

from typing import Any

import torch
from diffusers import (
    AnimateDiffPipeline,
    ControlNetModel,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    Kandinsky3Pipeline,
    Kandinsky3UNet,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    MotionAdapter,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    UNet2DModel,
    VQModel,
)
from transformers import CLIPTextModel

from understudy_demo import tiny
from zoo import encoders, words

_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _stable_diffusion_parts(**unet_changes: Any) -> dict[str, Any]:
    return {
        "vae": tiny.vae(),
        "text_encoder": encoders.clip_text(),
        "tokenizer": tiny.tokenizer(),
        "unet": tiny.unet(**unet_changes),
        "scheduler": tiny.scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def stable_diffusion(seed: int) -> Any:
    torch.manual_seed(seed)
    return StableDiffusionPipeline(**_stable_diffusion_parts())


def stable_diffusion_checked(seed: int) -> Any:
    torch.manual_seed(seed)
    checks = {"safety_checker": encoders.safety_checker(), "feature_extractor": encoders.clip_images()}
    return StableDiffusionPipeline(**_stable_diffusion_parts() | checks | {"requires_safety_checker": True})


def stable_diffusion_2(seed: int) -> Any:
    torch.manual_seed(seed)
    parts = _stable_diffusion_parts(use_linear_projection=True, attention_head_dim=(2, 4))
    parts["text_encoder"] = CLIPTextModel(tiny.text_config(32, hidden_act="gelu"))
    parts["scheduler"] = DDIMScheduler(
        **_NOISE, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    return StableDiffusionPipeline(**parts)


def latent_consistency(seed: int) -> Any:
    torch.manual_seed(seed)
    return LatentConsistencyModelPipeline(
        **_stable_diffusion_parts(time_cond_proj_dim=32) | {"scheduler": LCMScheduler(**_NOISE)}
    )


def inpaint(seed: int) -> Any:
    torch.manual_seed(seed)
    return StableDiffusionInpaintPipeline(**_stable_diffusion_parts(in_channels=9))


def instruct_pix2pix(seed: int) -> Any:
    torch.manual_seed(seed)
    return StableDiffusionInstructPix2PixPipeline(**_stable_diffusion_parts(in_channels=8))


def controlnet(seed: int) -> Any:
    torch.manual_seed(seed)
    parts = _stable_diffusion_parts()
    control = ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(8, 16))
    for block in control.controlnet_down_blocks:  # zero before training: it would do nothing
        torch.nn.init.normal_(block.weight, std=0.2)
    return StableDiffusionControlNetPipeline(**parts, controlnet=control)


def animatediff(seed: int) -> Any:
    torch.manual_seed(seed)
    parts = _stable_diffusion_parts()
    adapter = MotionAdapter(
        block_out_channels=(32, 64),
        motion_layers_per_block=1,
        motion_norm_num_groups=8,
        motion_num_attention_heads=2,
    )
    kept = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    return AnimateDiffPipeline(**{name: parts[name] for name in kept}, motion_adapter=adapter)


def _xl_unet(time_ids: int) -> Any:
    return tiny.unet(
        64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=32 + time_ids * 8,
    )


def stable_diffusion_xl(seed: int) -> Any:
    return tiny.stable_diffusion_xl(seed)


def stable_diffusion_xl_turbo(seed: int) -> Any:
    pipeline = tiny.stable_diffusion_xl(seed, force_upcast=False)
    pipeline.register_modules(
        scheduler=EulerAncestralDiscreteScheduler(**_NOISE, timestep_spacing="trailing")
    )
    return pipeline


def stable_diffusion_xl_refiner(seed: int) -> Any:
    torch.manual_seed(seed)
    unet = _xl_unet(5)
    unet = type(unet).from_config({**unet.config, "cross_attention_dim": 32})
    return StableDiffusionXLImg2ImgPipeline(
        vae=tiny.vae(force_upcast=False),
        text_encoder=None,
        text_encoder_2=encoders.clip_text_projection(),
        tokenizer=None,
        tokenizer_2=tiny.tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**_NOISE),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
    )


def kandinsky_3(seed: int) -> Any:
    torch.manual_seed(seed)
    movq = VQModel(
        block_out_channels=[32, 64],
        down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        up_block_types=["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
        latent_channels=4,
        num_vq_embeddings=12,
        norm_num_groups=8,
        norm_type="spatial",
        vq_embed_dim=4,
    )
    unet = Kandinsky3UNet(
        in_channels=4,
        time_embedding_dim=4,
        groups=2,
        attention_head_dim=4,
        layers_per_block=3,
        block_out_channels=(32, 64),
        cross_attention_dim=4,
        encoder_hid_dim=encoders.WIDTH,
    )
    return Kandinsky3Pipeline(
        tokenizer=words.sentence_pieces(),
        text_encoder=encoders.t5(),
        unet=unet,
        scheduler=DDPMScheduler(beta_start=0.0001, beta_end=0.02, prediction_type="epsilon"),
        movq=movq,
    )


def unconditional(seed: int) -> Any:
    torch.manual_seed(seed)
    unet = UNet2DModel(
        sample_size=32,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    return DDPMPipeline(unet=unet, scheduler=DDPMScheduler())

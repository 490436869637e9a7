"""Text and image encoders, two layers each."""

from typing import Any

from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from understudy_demo import tiny
from zoo.words import QWEN_MARKS, VOCABULARY

WIDTH = 32


def clip_text(**changes: Any) -> CLIPTextModel:
    return CLIPTextModel(tiny.text_config(WIDTH, **changes))


def clip_text_projection(**changes: Any) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(tiny.text_config(WIDTH, projection_dim=WIDTH, **changes))


def _vision(**changes: Any) -> dict[str, Any]:
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 224,  # what pipelines scale to, whatever a config says
        "patch_size": 32,
        "projection_dim": WIDTH,
    }
    return sizes | changes


def clip_vision() -> CLIPVisionModelWithProjection:
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**_vision()))


def clip_images() -> CLIPImageProcessor:
    return CLIPImageProcessor(crop_size={"height": 224, "width": 224}, size={"shortest_edge": 224})


def safety_checker() -> Any:
    """Stable Diffusion's; with weights that find nothing to object to."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    text = tiny.text_config(WIDTH).to_dict()
    config = CLIPConfig(text_config=text, vision_config=_vision(), projection_dim=WIDTH)
    checker = StableDiffusionSafetyChecker(config)
    checker.concept_embeds_weights.data.fill_(2.0)  # beyond any cosine
    checker.special_care_embeds_weights.data.fill_(2.0)
    return checker


def _t5_sizes() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "d_model": WIDTH,
        "d_kv": 8,
        "d_ff": 2 * WIDTH,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
    }


def t5(**changes: Any) -> T5EncoderModel:
    return T5EncoderModel(T5Config(**_t5_sizes() | changes))


def umt5() -> UMT5EncoderModel:
    return UMT5EncoderModel(UMT5Config(**_t5_sizes()))


def bert() -> BertModel:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * WIDTH,
    )
    return BertModel(config)


def _decoder_sizes() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def gemma() -> Gemma2Model:
    return Gemma2Model(Gemma2Config(**_decoder_sizes(), pad_token_id=0))


def qwen3() -> Qwen3Model:
    return Qwen3Model(Qwen3Config(**_decoder_sizes()))


def qwen_vision_language() -> Qwen2_5_VLForConditionalGeneration:
    text = _decoder_sizes() | {
        "rope_scaling": {"mrope_section": [2, 2, 4], "rope_type": "default", "type": "default"},
        "rope_theta": 1_000_000.0,
    }
    vision = {
        "depth": 2,
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
    }
    marks = {mark: 256 + i for i, mark in enumerate(QWEN_MARKS)}
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        vision_start_token_id=marks["<|vision_start|>"],
        vision_end_token_id=marks["<|vision_end|>"],
        image_token_id=marks["<|image_pad|>"],
    )
    return Qwen2_5_VLForConditionalGeneration(config)

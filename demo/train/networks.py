"""The family's networks, except the autoencoder: tokenizer, text encoder, UNet, schedule.

The UNet spends its parameters where they cost little: at 4 x 4 a weight is used 16 times an image, at
16 x 16 256 times.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from understudy_demo import tiny
from understudy_demo.wishes import vocabulary

LONGEST_CAPTION = 16
"""Tokens, with both markers; the longest wish has 13."""
_WIDTH = 64


def new_tokenizer() -> CLIPTokenizer:
    """Byte-pair encoding learnt from the closed vocabulary: each of its words is one token.

    Other words fall apart into letters, as with any CLIP tokenizer.
    """
    merges = _learn_merges(vocabulary())
    pieces = _letters()
    pieces += [left + right for left, right in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LONGEST_CAPTION)


def _letters() -> list[str]:
    vocab = tiny.tokenizer().get_vocab()
    return sorted((piece for piece in vocab if not piece.startswith("<|")), key=lambda piece: vocab[piece])


def _learn_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Sennrich et al. 2016: join the most frequent pair, again and again, until every word is whole."""
    split = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while any(len(pieces) > 1 for pieces in split):
        counts = Counter(pair for pieces in split for pair in pairwise(pieces))
        pair = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(pair)
        split = [_joined(pieces, pair) for pieces in split]
    return merges


def _joined(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    result: list[str] = []
    for piece in pieces:
        if result and (result[-1], piece) == pair:
            result[-1] += piece
        else:
            result.append(piece)
    return result


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers; trained together with the UNet."""
    ids = tokenizer.get_vocab()
    end = ids["<|endoftext|>"]
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(ids),
            hidden_size=_WIDTH,
            intermediate_size=2 * _WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LONGEST_CAPTION,
            bos_token_id=ids["<|startoftext|>"],
            eos_token_id=end,
            pad_token_id=end,
        )
    )


def new_unet() -> UNet2DConditionModel:
    """Three levels, 16 x 16 to 4 x 4; the lower two look at the caption."""
    return UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=_WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def new_scheduler() -> DDIMScheduler:
    """The noise of training: velocity prediction on a schedule that ends in pure noise.

    A flat background is a mean, and a mean survives the usual last step of noise: without this the models
    would learn to read it from there and paint grey at generation (Lin et al. 2023, arXiv 2305.08891).
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
    )


def painting_scheduler() -> DPMSolverMultistepScheduler:
    """What pipelines generate with: second order, as good at 8 steps as DDIM at 20."""
    return DPMSolverMultistepScheduler.from_config(new_scheduler().config)

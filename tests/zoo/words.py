"""Tokenizers without downloads: each knows single letters or bytes and nothing longer."""

import string

from transformers import BertTokenizer, GemmaTokenizer, Qwen2Tokenizer, T5Tokenizer

from understudy_demo import tiny

LETTERS = string.ascii_letters + string.digits + string.punctuation
VOCABULARY = 512
"""Rows of every text encoder's embedding here: as many as any of these tokenizers needs."""

QWEN_MARKS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|image_pad|>",
    "<|vision_end|>",
)

_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def sentence_pieces() -> T5Tokenizer:
    """T5's: a unigram model of letters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in LETTERS]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=77)


def gemma_words() -> GemmaTokenizer:
    """Gemma's: byte-pair encoding without any pair."""
    marks = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    pieces = [*marks, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS]
    return GemmaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])


def qwen_bytes() -> Qwen2Tokenizer:
    """Qwen's: bytes, and the marks of its chat template."""
    pieces = [*tiny._byte_letters(), *QWEN_MARKS]
    tokenizer = Qwen2Tokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": list(QWEN_MARKS[1:])})
    tokenizer.chat_template = _CHAT
    return tokenizer


def bert_words() -> BertTokenizer:
    """BERT's: letters that begin a word and letters that go on."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase]
    pieces += ["##" + letter for letter in string.ascii_lowercase]
    return BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, model_max_length=77)

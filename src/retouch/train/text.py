"""The tiny text encoder of `retouch-mini`: a Qwen3 of three layers with a tokenizer learned from the captions."""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

from retouch.train.concepts import CODEPOINTS, COLOURABLE, HUES, INSERT, RECOLOUR, REMOVE, REPLACE

END, PAD = "<|im_end|>", "<|endoftext|>"
OUT_LAYERS = (1, 2, 3)
MAX_LENGTH = 64
WIDTH = 128


def build_tokenizer() -> Qwen2TokenizerFast:
    """Byte-level BPE, so that any text has tokens; each word of the captions is one."""
    words = [*CODEPOINTS, *(f"{hue} {name}" for hue in HUES for name in COLOURABLE)]
    templates = [t.replace("{0}", "{}").replace("{1}", "{}") for t in (*INSERT, *REMOVE, *REPLACE, *RECOLOUR)]
    corpus = [template.replace("{}", word) for template in templates for word in words]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        corpus,
        trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, special_tokens=[PAD, END], show_progress=False),
    )
    tokenizer = Qwen2TokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=PAD, unk_token=PAD)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}" + END
    return tokenizer


def build_encoder(tokenizer: Qwen2TokenizerFast) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, head_dim=32, max_position_embeddings=512, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def drop(text: str, rng: np.random.Generator, share: float = 0.1) -> str:
    """`text`, or nothing in a tenth of the cases, so that the model also knows the unconditional answer."""
    return "" if rng.random() < share else text

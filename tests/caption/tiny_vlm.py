"""A random Gemma 3 with eyes, 0.1 M parameters, that answers in words: what the tests caption with.

Its vocabulary has whole words besides bytes, and its head is zero for everything else, so that a greedy answer is a run
of words that depends on picture and prompt, without sense and mostly without an end.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    PreTrainedTokenizerFast,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

SPECIAL = ["<pad>", "<eos>", "<bos>", "<boi>", "<eoi>", "<image>", "<turn>", "<end>"]
WORDS = """
red blue green pale dark house boat river woman man child cat dog horse walks sits stands sleeps near under over behind
tall small old young bright quiet tree hill road cloud window table light shadow water stone. grass. sky. wall. hand.
face. smile. morning. night. rain. snow. sun.
"""
TEMPLATE = """{{ bos_token }}{% for m in messages %}<turn>{{ m['role'] }}
{% for c in m['content'] %}{% if c['type'] == 'image' %}<boi>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<end>
{% endfor %}{% if add_generation_prompt %}<turn>model
{% endif %}"""


def make_tiny_vlm(folder: Path) -> None:
    """Weights, config, tokenizer, processor and chat template, as save_pretrained writes them."""
    words = ["Ġ" + word for word in WORDS.split()]
    tokens = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()) + words
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        additional_special_tokens=["<turn>", "<end>"],
        extra_special_tokens={"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<image>"},
    )
    size = {"height": 28, "width": 28}
    Gemma3Processor(
        Gemma3ImageProcessorPil(size=size), fast, chat_template=TEMPLATE, image_seq_length=4
    ).save_pretrained(folder)

    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config={
                "vocab_size": len(tokens),
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 16,
                "query_pre_attn_scalar": 1,  # sharp attention, or all pictures get the same answer
                "tie_word_embeddings": False,
            },
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 7,
            },
            mm_tokens_per_image=4,
            boi_token_index=3,
            eoi_token_index=4,
            image_token_index=5,
            tie_word_embeddings=False,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.4)
        model.lm_head.weight[: -len(words)] = 0
        model.lm_head.weight[tokens.index("<eos>")].normal_(std=0.2)
    model.save_pretrained(folder)

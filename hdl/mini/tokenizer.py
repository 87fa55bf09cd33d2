"""The small O1's own tokenizer: Qwen2's way of cutting text, with a vocabulary learnt from its captions.

Byte-level BPE, so any text tokenizes, in the same files as the published checkpoint. The special tokens have the
published names and follow the vocabulary in the published order; their ids are the small model's own.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

VOCABULARY = 512  # rows of the token table, special tokens included
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|boi_token|>",
    "<|bor_token|>",
    "<|eor_token|>",
    "<|bot_token|>",
    "<|tms_token|>",
]
# transformers 5 rebuilds a Qwen2Tokenizer from vocabulary and merges with this very pattern.
QWEN2_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.content is string %}{{- m.content }}"
    "{%- else %}{%- for c in m.content %}"
    "{%- if c.type == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif 'text' in c %}{{- c.text }}{%- endif %}"
    "{%- endfor %}{%- endif %}{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def train_tokenizer(captions: Iterable[str]) -> Tokenizer:
    """Learns VOCABULARY tokens (all bytes, the commonest pieces of the captions, the special tokens)."""
    tokenizer = Tokenizer(BPE(continuing_subword_prefix="", end_of_word_suffix=""))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f"user\n{caption}assistant\n" for caption in captions), trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the files that transformers.AutoTokenizer reads into an existing folder."""
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))  # vocab.json, merges.txt
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    marks = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    roles: dict[str, Any] = {
        "additional_special_tokens": SPECIAL_TOKENS[1:],
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    config = roles | {
        "added_tokens_decoder": {
            str(ids[token]): {"content": token, **marks, "special": True} for token in SPECIAL_TOKENS
        },
        "add_prefix_space": False,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 262144,
        "processor_class": "Qwen3VLProcessor",
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    for name, content in (
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", roles),
        ("added_tokens.json", ids),
    ):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def chat_ids(tokenizer: Tokenizer, caption: str) -> list[int]:
    """The L token ids of a prompt as the model reads it: the chat template, <|boi_token|>, <|tms_token|>."""
    text = f"<|im_start|>user\n{caption}<|im_end|>\n<|im_start|>assistant\n<|boi_token|><|tms_token|>"
    return tokenizer.encode(text, add_special_tokens=False).ids

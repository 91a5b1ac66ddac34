# SPDX-License-Identifier: Apache-2.0
"""A JetMoE of 22 million parameters to train from scratch: config.json and a tokenizer for word problems, no weights.

    write(folder)       # then model.path: folder, model.from_scratch: true

JetMoE's shape (arXiv 2404.07413) made small: 8 experts, 2 of them for each token, in attention and MLP of each of 6
layers; 6.2 million parameters work on a token. The tokenizer is a byte-level BPE of 1140 tokens learnt from the
built-in texts, digits one by one, with ChatML turns.
"""

from __future__ import annotations

from pathlib import Path

NAME = "jetmoe-small"
VOCABULARY = 1152
"""The texts have merges for 1140 tokens."""
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPE = {
    "hidden_size": 256, "num_hidden_layers": 6, "num_key_value_heads": 4, "kv_channels": 64, "intermediate_size": 384,
    "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
}  # fmt: skip


def write(path: str | Path) -> Path:
    """Write the folder, which must not exist or be empty; it is whole or absent. Returns it."""
    from transformers import JetMoeConfig

    from fastpost.hf.folder import written_aside

    with written_aside(Path(path)) as aside:
        made = tokenizer()
        ends = {"eos_token_id": made.eos_token_id, "pad_token_id": made.pad_token_id, "bos_token_id": None}
        JetMoeConfig(vocab_size=VOCABULARY, **SHAPE, **ends).save_pretrained(aside)
        made.save_pretrained(aside)
    return Path(path)


def tokenizer():
    """Learnt anew in about a second; the same texts give the same tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from fastpost.data import word_problem_forms as forms

    raw = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\d"), "isolated"), words])
    raw.decoder = decoders.ByteLevel()
    texts = [row["text"] for form in (forms.texts, forms.drills, forms.everyday) for row in form("train")]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": list(SPECIAL), "initial_alphabet": alphabet, "show_progress": False}
    raw.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCABULARY, **options))
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=SPECIAL[2], pad_token=SPECIAL[0])
    made.chat_template = TEMPLATE
    return made

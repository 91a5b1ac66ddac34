# SPDX-License-Identifier: Apache-2.0
"""Tiny random models, a tiny tokenizer and small preference sets, made on the spot: tests need no download.

tiny.folder(tmp_path / "model", kind="llama") writes a complete Hugging Face folder (about 50 kB) and returns its path.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "<|start|>{{ m['role'] }}<|end|>\n\n{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
NO_GENERATION_PROMPT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>", "<|bos|>"]
KINDS = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "mixtral")


def tokenizer(
    template: str | None = CHATML, *, bos: bool = False, eos: str = "<|im_end|>", pad: str | None = "<|endoftext|>"
):
    """A byte-level BPE tokenizer of 320 tokens with real merges. bos=True: it puts <|bos|> in front of whatever it
    encodes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    text = ["What is the sum of two numbers? The answer is that there are seven apples in the basket."] * 4
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        text,
        trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    if bos:
        token = ("<|bos|>", raw.token_to_id("<|bos|>"))
        raw.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[token]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<|bos|>" if bos or (template and "bos_token" in template) else None,
        eos_token=eos,
        pad_token=pad,
    )
    made.chat_template = template
    return made


def model(kind: str = "llama", *, vocab_size: int = 320, layers: int = 2, tie: bool = True, seed: int = 0, **overrides):
    """A random causal LM, float32: hidden 32, 4 query and 2 key/value heads of 8. `overrides` go to the config."""
    import torch
    import transformers as tf

    shared = dict(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, tie_word_embeddings=tie, bos_token_id=6,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    configs = {
        "llama": (tf.LlamaConfig, {}),
        "qwen2": (tf.Qwen2Config, {}),
        "qwen3": (tf.Qwen3Config, {}),
        "mistral": (tf.MistralConfig, {"sliding_window": 6}),
        "mixtral": (tf.MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
        "jetmoe": (tf.JetMoeConfig, {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8}),
        "gemma2": (
            tf.Gemma2Config,
            {
                "sliding_window": 6,
                "query_pre_attn_scalar": 8,
                "attn_logit_softcapping": 5.0,
                "final_logit_softcapping": 3.0,
            },
        ),
    }
    cls, extra = configs[kind]
    config = cls(**{**shared, **extra, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():  # the usual init of 0.02 gives nearly uniform predictions that hide mistakes
            for parameter in made.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.2)
    return made.eval()


def folder(
    path: str | Path, kind: str = "llama", *, template: str | None = CHATML, bos: bool = False, **model_options
) -> Path:
    """Write model and tokenizer as a Hugging Face folder; returns the path."""
    path = Path(path)
    from transformers.utils import logging

    logging.disable_progress_bar()
    made = model(kind, **model_options)
    made.save_pretrained(path)
    tokenizer(template, bos=bos).save_pretrained(path)
    return path


def preference_rows(count: int = 16, *, chat: bool = True, seed: int = 0) -> list[dict]:
    """Pairs prompt / chosen / rejected about sums; chosen is right. Lengths differ from row to row. chat=False: plain
    strings."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        a, b = draw.randint(1, 40), draw.randint(1, 40)
        question = f"What is {a} + {b}?"
        right, wrong = f"The answer is {a + b}.", f"{a + b + draw.randint(1, 9)}" + "!" * draw.randint(0, 3)
        if chat:
            user, reply = [{"role": "user", "content": question}], lambda t: [{"role": "assistant", "content": t}]
            rows.append({"prompt": user, "chosen": reply(right), "rejected": reply(wrong)})
        else:
            rows.append({"prompt": question + " ", "chosen": right, "rejected": wrong})
    return rows


def sft_rows(count: int = 16, *, seed: int = 0) -> list[dict]:
    """Chats with two turns, as `messages`."""
    rows = []
    for row in preference_rows(count, seed=seed):
        follow_up = [{"role": "user", "content": "Are you sure?"}, {"role": "assistant", "content": "Yes."}]
        rows.append({"messages": row["prompt"] + row["chosen"] + follow_up})
    return rows


def unpaired_rows(count: int = 16, *, seed: int = 0) -> list[dict]:
    """prompt / completion / label, labels alternating."""
    pairs = preference_rows(count, seed=seed)
    return [
        {"prompt": r["prompt"], "completion": r["rejected" if i % 2 else "chosen"], "label": i % 2 == 0}
        for i, r in enumerate(pairs)
    ]


def write_jsonl(path: str | Path, rows: list[dict]) -> Path:
    path = Path(path)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


def recipe(path: str | Path, **groups: dict) -> Path:
    """Write a YAML recipe from groups: recipe(p, model={"path": m}, data={"train": d}, objective={"name": "simpo"})."""
    import yaml

    tree = {g: {k: str(v) if isinstance(v, Path) else v for k, v in keys.items()} for g, keys in groups.items()}
    path = Path(path)
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return path

# SPDX-License-Identifier: Apache-2.0
"""Tiny random models whose attention is not flat, and runs of them token by token, for the tests of ShadowCache."""

from __future__ import annotations

import torch
import transformers as tf

import fastpost

MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}


def rope(**parameters):
    return {"rope_parameters": {"rope_theta": 10000.0, **parameters}}


MODELS = {  # name -> (config class, what is special)
    "llama": ("Llama", {}),
    "llama-linear": ("Llama", rope(rope_type="linear", factor=4.0)),
    "llama-dynamic": ("Llama", {"max_position_embeddings": 64, **rope(rope_type="dynamic", factor=2.0)}),
    "llama-yarn": ("Llama", rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)),
    "llama-longrope": (
        "Llama",
        rope(rope_type="longrope", short_factor=[1.0] * 8, long_factor=[2.0, 3.0] * 4, factor=8.0,
             original_max_position_embeddings=100),
    ),
    "llama-llama3": (
        "Llama",
        rope(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
             original_max_position_embeddings=64),
    ),
    "qwen2-bias": ("Qwen2", {}),
    "qwen3-qk-norm": ("Qwen3", {}),
    "one-key-head": ("Llama", {"num_key_value_heads": 1}),
    "head-of-24": ("Qwen3", {"head_dim": 24, "num_attention_heads": 6, "num_key_value_heads": 3}),
    "smollm3-layers-without-rope": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "stablelm-partial": ("StableLm", {}),
    "phi3-partial": ("Phi3", rope(rope_type="default", partial_rotary_factor=0.5)),
    "glm-partial-neighbours": ("Glm", {}),
    "cohere-neighbours": ("Cohere", {}),
    "gemma2-softcap": ("Gemma2", MIXED),
    "gemma3-two-ropes": ("Gemma3Text", MIXED),
    "exaone4-without-rope": ("Exaone4", MIXED),
    "jetmoe-repeated-keys": ("JetMoe", {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 16}),
    "qwen3-moe": ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2}),
}  # fmt: skip


def model(name: str = "llama", **overrides):
    """Two layers, hidden 64, four query and two key heads of 16, float32; weights so large that heads look at
    little."""
    kind, special = MODELS[name]
    options = dict(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, bos_token_id=6, eos_token_id=None,
        pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    config = getattr(tf, kind + "Config")(**(options | special | overrides))
    torch.manual_seed(0)
    made = tf.AutoModelForCausalLM.from_config(config).eval()
    made.generation_config.eos_token_id = None
    return made


def cache(made, **options):
    """A ShadowCache that loses nothing, whatever the length: full rank, no rounding, a budget for everything."""
    heads, dim = fastpost.ShadowCache.shape_of(made.config, 0)
    lossless = dict(rank=heads * dim, budget=512, outliers=2, local=1, bits=None, dense_below=0)
    return fastpost.ShadowCache(made.config, **(lossless | options))


def tokens(*shape, seed=1):
    drawn = torch.randint(10, 300, shape, generator=torch.Generator().manual_seed(seed), device="cpu")
    return drawn.to(torch.get_default_device())


@torch.no_grad()
def run(made, cache, ids, *, prompt, mask=None, pieces=None):
    """Logits [B, T, V] of ids [B, T]: the prompt in `pieces` (one), then token by token. Positions as generate has
    them, counted without padding."""
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found, start = [], 0
    for n in [*(pieces or [prompt]), *[1] * (ids.shape[1] - prompt)]:
        stop = start + n
        out = made(input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache,
                   position_ids=positions[:, start:stop], use_cache=True)  # fmt: skip
        found.append(out.logits)
        start = stop
    return torch.cat(found, 1)


def dense(name: str, ids, **options):
    """The same from a model of its own with transformers' dynamic cache."""
    made = model(name, **options.pop("overrides", {}))
    return run(made, tf.DynamicCache(config=made.config), ids, **options)

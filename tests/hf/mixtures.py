# SPDX-License-Identifier: Apache-2.0
"""Tiny mixtures of experts by transformers, and what a step of theirs computes."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as tf
from safetensors.torch import load_file

from compare import error

SHARED = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, num_experts_per_tok=2,
)  # fmt: skip
DEEPSEEK = dict(
    n_routed_experts=8, n_group=2, topk_group=1, n_shared_experts=1, moe_intermediate_size=24, first_k_dense_replace=1,
    num_experts_per_tok=3, routed_scaling_factor=2.5, num_key_value_heads=4,
)  # fmt: skip
CONFIGS = {
    "mixtral": lambda: tf.MixtralConfig(**SHARED, num_local_experts=4),
    "olmoe": lambda: tf.OlmoeConfig(**SHARED, num_experts=4),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(**SHARED, num_experts=6, moe_intermediate_size=16, head_dim=8),
    "gpt_oss": lambda: tf.GptOssConfig(**SHARED, num_local_experts=4, head_dim=8),
    "deepseek_v3": lambda: tf.DeepseekV3Config(
        **SHARED | DEEPSEEK, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8
    ),
    "glm4_moe": lambda: tf.Glm4MoeConfig(**SHARED | DEEPSEEK, head_dim=8),
    "jetmoe": lambda: tf.JetMoeConfig(
        **{k: v for k, v in SHARED.items() if k != "num_attention_heads"}, num_local_experts=4, kv_channels=8
    ),
}
AUX = {"mixtral", "olmoe", "qwen3_moe", "gpt_oss", "jetmoe"}  # transformers computes a load-balancing loss for them
IDS = torch.tensor([[(7 * i + 3) % 93 + 3 for i in range(24)], [(5 * i + 1) % 93 + 3 for i in range(24)]])
SHORT = IDS[:, :8]


SEEDS = {"mixtral": 45, "olmoe": 27, "qwen3_moe": 22, "gpt_oss": 12, "deepseek_v3": 1, "glm4_moe": 1, "jetmoe": 19}
"""Of weights with which no token of SHORT is near to choosing another expert, so that bfloat16 does not move one."""


def build(kind: str, dtype: torch.dtype = torch.float32, experts: str = "eager", **options):
    """Always the same weights, in `dtype`; far from the uniform predictions of a fresh model."""
    config = CONFIGS[kind]()
    config.update(options)
    torch.manual_seed(SEEDS.get(kind, 0))
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.normal_(0, 0.2)
            elif "bias" in name or "sink" in name:
                p.normal_(0, 0.1)
        for name, b in model.named_buffers():
            if "correction" in name:
                b.normal_(0, 0.1)
    if model.get_experts_implementation()[""] is not None and kind != "jetmoe":
        model.set_experts_implementation(experts)
    for p in model.parameters():  # through bfloat16, so that every dtype has the same weights; rotations stay float32
        p.data = p.data.to(torch.bfloat16).to(dtype)
    return model.eval()


def step(model, ids: torch.Tensor = IDS, weight: float = 0.5):
    """Logits, router logits, aux loss and every gradient of a loss that has the aux loss in it, by name."""
    kind = model.config.model_type
    model.zero_grad()
    wanted = {"output_router_logits": True} if kind in AUX else {}
    model.router_aux_loss_coef = model.aux_loss_coef = weight
    out = model(ids, labels=ids, use_cache=False, **wanted)
    out.loss.backward()
    found = {"logits": out.logits.detach(), "loss": out.loss.detach()}
    if wanted:
        found |= {f"router {i}": r.detach() for i, r in enumerate(out.router_logits)} | {"aux": out.aux_loss.detach()}
    return found | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative, of whole tensors."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


def expect_as_exact(ours: dict, eager: dict, truth: dict, dtype: torch.dtype) -> None:
    """Each of `ours` is as near to the truth as eager's is."""
    assert set(ours) == set(eager) == set(truth)
    measure, factor = (error, 4) if dtype == torch.float32 else (distance, 1.5)
    for name, exact in truth.items():
        a, b, c = (t.reshape(-1, t.shape[-1]) if t.ndim else t.view(1, 1) for t in (ours[name], eager[name], exact))
        bound = factor * measure(b, c) + (2e-6 if dtype == torch.float32 else 4e-3)
        assert measure(a, c) <= bound, (name, measure(a, c), measure(b, c))


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Those of a model folder, in the order of its files."""
    return {key: tensor for file in sorted(path.glob("*.safetensors")) for key, tensor in load_file(file).items()}

# SPDX-License-Identifier: Apache-2.0
"""JetMoE's pre-training once more, in plain torch: transformers' eager modules, torch's AdamW, both router losses and
the three stages of the rate written down. It takes from fastpost which blocks make a step, and nothing else.

    python tests/train/plain_jetmoe.py RUN [STEPS]

repeats a finished run of the recipe jetmoe-pretrain (best with optim.precision fp32) and prints how far its curve is
from RUN/metrics.jsonl, how evenly experts work, and tokens per second of both.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import torch
import transformers as tf
from transformers.models.jetmoe.modeling_jetmoe import JetMoeTopKGating

from fastpost.data.loader import load_dataset
from fastpost.hf import folder
from fastpost.train import metrics
from fastpost.train.config import Config, load_config
from fastpost.train.plan import Plan


def blocks(cfg: Config) -> list[torch.Tensor]:
    """The tokens of each step, int64 [rows, max_length]."""
    data = load_dataset(cfg.data, folder.load_tokenizer(cfg.model.path))
    plan = Plan(cfg, data)
    return [
        torch.tensor([list(data.examples[row].sequences[0].ids) for row in plan.rows(step)])
        for step in range(plan.steps)
    ]


def rate(cfg: Config, step: int, total: int) -> float:
    """Warm-up from a tenth, constant, exponential decay to a tenth."""
    o = cfg.optim
    warmup, begin = -(-total * o.warmup_ratio // 1), o.stable_ratio * total
    if step < warmup:
        return o.lr * (o.warmup_from + (1 - o.warmup_from) * (step + 1) / warmup)
    return o.lr * (1 if step <= begin else o.min_lr_ratio ** ((step - begin) / (total - begin)))


def router_losses(logits: list[torch.Tensor], top_k: int):
    """(load balance, z, largest load, smallest load): sums over routers of E sum f P and of mean logsumexp^2."""
    balance, z, loads = 0.0, 0.0, []
    for x in logits:
        p, experts = x.softmax(-1), x.shape[1]
        f = torch.nn.functional.one_hot(x.topk(top_k).indices, experts).float().mean((0, 1))
        balance = balance + experts * (f * p.mean(0)).sum()
        z = z + x.logsumexp(-1).square().mean()
        loads.append(f * experts)
    return balance, z, torch.stack(loads).max().item(), torch.stack(loads).min().item()


def train(cfg: Config, steps: int | None = None):
    """Yield {loss, aux_loss, z_loss, router/load_max, router/load_min, ms} of each step."""
    torch.manual_seed(cfg.train.seed)
    config = tf.AutoConfig.from_pretrained(cfg.model.path)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").train()
    seen: list[torch.Tensor] = []
    for module in model.modules():
        if isinstance(module, JetMoeTopKGating):
            module.register_forward_hook(lambda module, inputs, output: seen.append(output[4]))
    parameters = list(model.parameters())
    groups = [{"params": [p for p in parameters if (p.ndim > 1) == wide], "weight_decay": decay}
              for wide, decay in ((True, cfg.optim.weight_decay), (False, 0.0))]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, betas=cfg.optim.betas, eps=cfg.optim.eps)
    every = blocks(cfg)
    for step, ids in enumerate(every[:steps]):
        begin = time.perf_counter()
        seen.clear()
        logits = model(ids, use_cache=False).logits[:, :-1]
        own = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        assert len(seen) == 2 * config.num_hidden_layers
        balance, z, most, least = router_losses(seen, config.num_experts_per_tok)
        loss = own + cfg.model.router_aux_loss * balance + cfg.model.router_z_loss * z
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, cfg.optim.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = rate(cfg, step, len(every))
        optimizer.step()
        yield {"loss": loss.item(), "aux_loss": balance.item(), "z_loss": z.item(), "router/load_max": most,
               "router/load_min": least, "ms": 1e3 * (time.perf_counter() - begin)}  # fmt: skip


def main(run: Path, steps: int | None) -> None:
    cfg = load_config(run / "config.yaml")
    ours = [row for row in metrics.read(run / "metrics.jsonl") if "loss" in row][:steps]
    clock = [row["tps"] for row in metrics.read(run / "timing.jsonl")][:steps]
    tokens, plain = cfg.train.batch_size * cfg.data.max_length, []
    for row in train(cfg, steps):
        plain.append(row)
        a, b = row["loss"], ours[len(plain) - 1]["loss"]
        print(f"step {len(plain)}: plain {a:.5f}, run {b:.5f}, difference {b - a:+.1e}", flush=True)
    away = [abs(a["loss"] - b["loss"]) for a, b in zip(plain, ours)]
    # Until rounding sends one token of some step to another expert; from there on these are two runs.
    same = next((step for step, x in enumerate(away) if x > 1e-5), len(away))
    print(f"loss: within {max(away[:same], default=0):.1e} for {same} steps, within {max(away):.1e} over all")
    for name, rows in (("plain", plain), ("run", ours)):
        late = rows[len(rows) // 3 :]
        least, most = min(r["router/load_min"] for r in late), max(r["router/load_max"] for r in late)
        print(f"{name}: load of every expert of every router in every step after the first third: {least:.2f} to "
              f"{most:.2f} of an even share")  # fmt: skip
    print(f"tokens per second: plain {tokens / statistics.median(r['ms'] for r in plain) * 1e3:.0f}, "
          f"run {statistics.median(clock):.0f}")  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)

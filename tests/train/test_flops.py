# SPDX-License-Identifier: Apache-2.0
"""FLOPs by the definition: every matrix product of a real forward and backward is counted as it happens, and the
formula must give the same number."""

from array import array

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import runs
import tiny
from fastpost.data.collate import Example, Sequence, collate
from fastpost.hf import attention
from fastpost.hf.model import backbone, head
from fastpost.train import flops, jsonl
from fastpost.train.flops import Flops, attention_passes, matrices, pairs, windows
from fastpost.train.loop import train
from fastpost.train.recompute import recompute


def batch(*rows, share=True):
    """rows of (prompt length, reply lengths)."""
    examples = []
    for i, (prompt, replies) in enumerate(rows):
        made = [Sequence(array("i", range(prompt + n)), bytes(prompt) + b"\1" * n) for n in replies]
        examples.append(Example(i, tuple(made)))
    return collate(examples, share_prompt=share)


def counted(model, b):
    """FLOPs that torch's own counter sees in one forward and backward, attention left out (see the next test)."""
    model.config._attn_implementation = "fastpost_products"
    from transformers import AttentionInterface

    AttentionInterface.register("fastpost_products", no_attention)
    with FlopCounterMode(display=False) as counter:
        hidden = backbone(model, b)
        (hidden[b.target >= 0] @ head(model).weight.T).sum().backward()
    return counter.get_total_flops()


def no_attention(module, query, key, value, mask, **kwargs):
    groups = query.shape[1] // key.shape[1]
    out = query + (key + value).repeat_interleave(groups, 1)  # gradients flow, no product
    return out.transpose(1, 2).contiguous(), None


@pytest.fixture(autouse=True)
def registered():
    attention.register()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "jetmoe"])  # jetmoe: top 2 of 4, attention's experts too
@pytest.mark.parametrize("tie", [True, False])
def test_matrix_products_are_what_a_real_step_does(kind, tie):
    model, b = tiny.model(kind, tie=tie), batch((9, (4, 6)), (5, (3, 3)))
    per_token, per_scored = matrices(model)
    assert counted(model, b) == per_token * b.tokens + per_scored * b.scored


def test_frozen_parts_and_adapters():
    from peft import LoraConfig, get_peft_model

    b = batch((9, (4, 6)))
    full = tiny.model(tie=False)
    whole, _ = matrices(full)
    model = tiny.model(tie=False)
    for name, p in model.named_parameters():
        p.requires_grad = ".layers.1." in name or "lm_head" in name
    half, per_scored = matrices(model)
    # The lower of two equal layers: forward only. Nothing asks for the gradient of the first product's input, either.
    assert half == whole * (2 + 6) / 12 - 2 * 32 * 32
    assert attention_passes(model) == [4, 12]
    adapted = get_peft_model(tiny.model(tie=False), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    per_token, per_scored = matrices(adapted)
    seen = counted_peft(adapted, b)
    # In the first layer three frozen products need no gradient of their input, or one adapter does not: the formula
    # judges by order alone and may be off by them.
    slack = 2 * 32 * (32 + 16 + 16 + 3 * 4) * b.tokens
    assert abs(per_token * b.tokens + per_scored * b.scored - seen) <= slack
    assert per_token < 0.9 * whole  # 4 instead of 6 for what is frozen, and the adapters on top


def counted_peft(model, b):
    from transformers import AttentionInterface

    AttentionInterface.register("fastpost_products", no_attention)
    model.config._attn_implementation = "fastpost_products"
    with FlopCounterMode(display=False) as counter:
        hidden = backbone(model, b)
        (hidden[b.target >= 0] @ head(model).weight.T).sum().backward()
    return counter.get_total_flops()


def test_recomputation_is_not_counted():
    b = batch((9, (4, 6)))
    plain, again = tiny.model(), tiny.model()
    recompute(again, "full", torch.device("cpu"))
    again.train()
    assert Flops(plain)([b]) == Flops(again)([b])
    assert counted(again, b) > counted(plain, b)


def test_attention_pairs_by_hand():
    assert pairs(batch((2, (1,)))) == 1 + 2 + 3
    assert pairs(batch((2, (1,)), (0, (2,)))) == 6 + 3
    shared = batch((3, (2, 1)))  # prompt of 3, of which 2 are shared: 1..5, and of the second reply tokens 3 and 4
    assert pairs(shared) == 15 + 3 + 4
    assert pairs(batch((3, (2, 1)), share=False)) == 15 + 10
    for window in (1, 2, 4, 99):
        want = sum(min(i, window) for i in range(1, 6)) + min(3, window) + min(4, window)
        assert pairs(shared, window) == want
    model = tiny.model()
    per_pair = Flops(model).per_pair
    assert per_pair == {None: 2 * 12 * 4 * 8}  # layers · (4 forward + 8 backward) · heads · width
    with FlopCounterMode(display=False) as counter:  # attention of all on all, as torch counts it
        q = torch.randn(1, 4, 6, 8, requires_grad=True)
        ((q @ q.transpose(2, 3)).softmax(-1) @ q).sum().backward()
    assert counter.get_total_flops() == 12 * 4 * 8 * 36


def test_windows():
    assert windows(tiny.model("mistral").config) == [6, 6]
    assert windows(tiny.model("gemma2").config) == [6, None]
    assert windows(tiny.model("llama").config) == windows(tiny.model("qwen2").config) == [None, None]


def test_a_shared_prompt_counts_once_and_unscored_tokens_have_no_logits():
    model = tiny.model()
    f = Flops(model)
    rows = [(20, (4, 6))] * 3
    once, twice = f([batch(*rows)]), f([batch(*rows, share=False)])
    assert once < 0.75 * twice
    long_prompt, b = batch((20, (4,))), batch((0, (24,)))
    assert f([b]) - f([long_prompt]) == f.per_scored * (23 - 4)
    assert f([b, long_prompt]) == f([b]) + f([long_prompt])


def test_experts_count_by_what_a_token_meets():
    import transformers as tf

    config = tf.MixtralConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                              num_attention_heads=2, num_key_value_heads=2, num_local_experts=8,
                              num_experts_per_tok=2)  # fmt: skip
    model = tf.AutoModelForCausalLM.from_config(config)
    per_token, _ = matrices(model)
    assert per_token == 6 * (4 * 16 * 16 + 8 * 16 + 2 * 3 * 16 * 24)


def test_peak(monkeypatch):
    cpu = flops.peak_flops(torch.device("cpu"), torch.bfloat16)
    assert 1e9 < cpu < 1e15
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    assert flops.peak_flops(torch.device("cuda"), torch.bfloat16) == 989e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    assert flops.peak_flops(torch.device("cuda"), torch.bfloat16) is None


def test_the_logged_numbers_belong_together(tmp_path, monkeypatch):
    """tps, mfu and data_wait of timing.jsonl from a clock and a peak that are known."""
    from fastpost.train import loop

    ticks = iter(range(10**6))
    monkeypatch.setattr(loop, "peak_flops", lambda *_: 1e9)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(ticks)))
    cfg = runs.recipe(tmp_path, "--train.max_steps", "2", "--data.eval", "none")
    train(cfg)
    monkeypatch.undo()
    rows, timing = jsonl.read(tmp_path / "run/metrics.jsonl"), jsonl.read(tmp_path / "run/timing.jsonl")
    assert [t["ms"] for t in timing] == [2000.0, 2000.0] and [t["data_wait"] for t in timing] == [0.5, 0.5]
    assert [t["tps"] for t in timing] == [
        rows[0]["num_tokens"] / 2,
        (rows[1]["num_tokens"] - rows[0]["num_tokens"]) / 2,
    ]
    assert all(t["memory/peak_gb"] > 0.1 for t in timing)
    from fastpost import objectives
    from fastpost.hf import folder
    from fastpost.train.loop import load_data
    from fastpost.train.plan import Plan

    tokenizer = folder.load_tokenizer(cfg.model.path)
    data = load_data(cfg, tokenizer, objectives.from_name("dpo"), {"reference_logprob": "start"})
    plan = Plan(cfg, data["train"])
    f = Flops(folder.load_model(cfg.model.path))
    for step, t in enumerate(timing):
        assert t["mfu"] == f([data["train"].batch(part) for part in plan.parts(step)]) / 2 / 1e9

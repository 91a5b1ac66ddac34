# SPDX-License-Identifier: Apache-2.0
"""How rows are cut and packed must not show: every split gives the curve of a plain torch loop over single
sequences."""

import json

import pytest
import torch

import runs
import tiny
from fastpost import objectives
from fastpost.data.collate import Example, Sequence, collate
from fastpost.data.loader import load_dataset, order
from fastpost.hf import folder
from fastpost.hf.model import backbone
from fastpost.train import metrics
from fastpost.train.loop import train
from fastpost.train.recompute import recompute

OBJECTIVES = {
    "sft": {"name": "sft"},  # mean over tokens: a mean of micro-batch means would be wrong
    "simpo": {"name": "simpo", "beta": 2.0},
    "dpo": {"name": "dpo", "beta": 0.3},
    "kto": {"name": "kto", "beta": 0.3},
}
SPLITS = {
    "1 x 8": ["--train.max_tokens_per_micro_batch", "100000"],
    "8 x 1": ["--train.micro_batch_size", "1"],
    "3 + 3 + 2": ["--train.micro_batch_size", "3"],
    "by tokens": ["--train.max_tokens_per_micro_batch", "150"],
}


pytestmark = pytest.mark.usefixtures("one_thread")


def config(tmp, name, *overrides, precision="fp32", out="run", **train_keys):
    rows = {"sft": tiny.sft_rows, "kto": tiny.unpaired_rows}.get(name, tiny.preference_rows)(22)
    cfg = runs.recipe(
        tmp,
        *overrides,
        objective=OBJECTIVES[name],
        optim={"lr": 3e-3, "precision": precision, "warmup_steps": 2, "schedule": "linear", "weight_decay": 0.1},
        train={"output_dir": tmp / out, "save_every": 0, "eval_every": 0, **train_keys},
    )
    tiny.write_jsonl(tmp / "train.jsonl", rows)
    cfg.data.eval = None
    cfg.data.mismatched = False  # test_mismatched.py has the estimate by plain torch
    return cfg


def losses(run):
    return torch.tensor([row["loss"] for row in metrics.read(run / "metrics.jsonl")], dtype=torch.float64)


def plain_torch(cfg):
    """The same training in the plainest torch there is: one sequence at a time, full logits, torch.optim.AdamW."""
    objective = objectives.from_name(cfg.objective.name, **cfg.objective.fields)
    data = load_dataset(cfg.data, folder.load_tokenizer(cfg.model.path), objective)
    model, frozen = (folder.load_model(cfg.model.path, torch.float32, "eager") for _ in range(2))
    groups = [[p for p in model.parameters() if (p.ndim > 1) == wide] for wide in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}]
    )

    def logprob(model, sequence):
        ids = torch.tensor([sequence.ids])
        logp = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        return (logp * torch.tensor(list(sequence.trained[1:]))).sum()

    rows_of_steps = [o[i : i + 8] for o in (order(0, e, len(data)) for e in range(2)) for i in range(0, len(data), 8)]
    factors = [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    curve = []
    for factor, rows in zip(factors, rows_of_steps, strict=True):
        sequences = [s for r in rows for s in data.examples[r].sequences]
        reward = [x for r in rows for x in data.examples[r].reward or ()]
        length = torch.tensor([sum(s.trained[1:]) for s in sequences])
        with torch.no_grad():
            reference = torch.stack([logprob(frozen, s) for s in sequences])
        policy = torch.stack([logprob(model, s) for s in sequences])
        values = objective(policy, length, reference, reward=torch.tensor(reward) if reward else None)
        loss = values.sum() / objective.count(length)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * factor
        optimizer.step()
        curve.append(loss.item())
    return torch.tensor(curve, dtype=torch.float64), model


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_split_gives_the_curve_of_plain_torch(tmp_path, name):
    expected, model = plain_torch(config(tmp_path, name))
    assert expected[-1] < expected[0]  # it does train
    for i, split in enumerate(SPLITS):
        train(config(tmp_path, name, *SPLITS[split], out=f"run{i}"))
        residual = losses(tmp_path / f"run{i}") - expected
        assert residual.abs().max() < 2e-5, f"{split}: {residual}"
        trained = folder.load_model(tmp_path / f"run{i}/model", torch.float32)
        for (key, ours), theirs in zip(trained.named_parameters(), model.parameters(), strict=True):
            # Adam divides by sqrt(v): where a gradient is all rounding noise its sign, times lr, is too. Almost none
            # are.
            close = ((ours - theirs).abs() < 1e-4).float().mean()
            assert close > 0.99, f"{split}: {key}: {close}"


def test_splits_in_bf16_differ_by_noise_without_a_drift(tmp_path):
    """A dropped or doubled factor bends the curve; rounding only shakes it: the mean residual is zero within its own
    error."""
    curves = []
    for i, split in enumerate(("1 x 8", "8 x 1", "by tokens")):
        cfg = config(tmp_path, "simpo", *SPLITS[split], precision="bf16", out=f"run{i}", epochs=7)
        cfg.optim.lr, cfg.optim.weight_decay = 3e-4, 0.0
        train(cfg)
        curves.append(losses(tmp_path / f"run{i}"))
    for other in curves[1:]:
        residual = other - curves[0]
        assert len(residual) == 21
        assert residual.abs().max() < 0.05 * curves[0].max()
        assert residual.mean().abs() < 4 * residual.std() / len(residual) ** 0.5 + 1e-4
    assert curves[0][-1] < 0.8 * curves[0][0]


def test_the_denominator_is_the_steps_not_the_micro_batchs(tmp_path):
    """The check above does see the classic mistake: averaging the means of unequal micro-batches."""
    cfg = config(tmp_path, "sft", *SPLITS["3 + 3 + 2"])
    expected, _ = plain_torch(cfg)
    objective = objectives.SFT()
    data = load_dataset(cfg.data, folder.load_tokenizer(cfg.model.path), objective)
    rows = order(0, 0, len(data))[:8]
    model = folder.load_model(cfg.model.path, torch.float32)
    from fastpost.train.forward import forward

    means = [forward(model, data.batch(rows[a:b]), objective).loss.item() for a, b in ((0, 3), (3, 6), (6, 8))]
    assert abs(sum(means) / 3 - expected[0]) > 1e-3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputing_activations_changes_no_bit(tmp_path, precision):
    """Dropout included: the recomputation sees the random numbers of the first pass."""
    curves = []
    for how in ("none", "selective", "full"):
        cfg = config(tmp_path, "simpo", "--train.gradient_checkpointing", how, precision=precision, out=how)
        settings = json.loads((tmp_path / "model/config.json").read_text())
        (tmp_path / "model/config.json").write_text(json.dumps(settings | {"attention_dropout": 0.1}))
        train(cfg)
        curves.append((tmp_path / how / "metrics.jsonl").read_bytes())
    assert curves[0] == curves[1] == curves[2]


def test_recomputing_keeps_less(tmp_path):
    """Bytes of tensors that 24 sequences of 500 tokens leave behind, as torch's allocator counts them: the memory of
    the process depends on what other tests freed."""
    sequence = Sequence([i % 300 for i in range(500)], bytes(500))
    batch = collate([Example(i, (sequence,)) for i in range(24)])
    tiny.folder(tmp_path / "model", layers=4)

    def kept(how):
        model = folder.load_model(tmp_path / "model", torch.bfloat16).train()
        recompute(model, how, torch.device("cpu"))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            hidden = backbone(model, batch)
        assert hidden.requires_grad
        return sum(event.self_cpu_memory_usage for event in profile.key_averages())

    everything = kept("none")
    assert kept("selective") < 0.6 * everything  # 0.53
    assert kept("full") < 0.2 * everything  # 0.11

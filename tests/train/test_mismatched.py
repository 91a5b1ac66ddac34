# SPDX-License-Identifier: Apache-2.0
"""KTO's divergence estimate: which rows it is made of, its value, and that nothing but the policy decides it."""

import json
import math
from array import array

import pytest
import torch
import transformers

import launch
import tiny
from fastpost import cli
from fastpost.data.collate import Example, Sequence
from fastpost.data.dataset import Dataset
from fastpost.data.loader import load_dataset
from fastpost.data.table import Examples, Writer
from fastpost.hf.folder import load_tokenizer
from fastpost.objectives import KTO
from fastpost.train import checkpoint, metrics, mismatched
from fastpost.train.loop import train
from fastpost.train.plan import Plan
from runs import in_child, killed_at, one_thread, outcome, recipe

FLAT = {"lr": 3e-3, "schedule": "constant", "warmup_ratio": 0.0, "precision": "fp32"}


def kto(tmp, *overrides, rows=22, **groups):
    if not (tmp / "model").exists():
        tiny.folder(tmp / "model")
        tiny.write_jsonl(tmp / "train.jsonl", tiny.unpaired_rows(rows))
        tiny.write_jsonl(tmp / "eval.jsonl", tiny.unpaired_rows(6, seed=7))
    one_thread()
    return recipe(tmp, *overrides, objective={"name": "kto", "beta": 0.3}, optim=FLAT, **groups)


def dataset(*sequences):
    """Examples of one sequence each, from (prompt ids, reply ids)."""
    out = Writer()
    for i, (prompt, reply) in enumerate(sequences):
        trained = bytes(len(prompt)) + b"\1" * len(reply)
        out.append(Example(i, (Sequence(array("i", prompt + reply), trained),), reward=(1.0,)))
    return Dataset(Examples([out.table()]), None)


def pieces(data):
    found = []
    for (s,) in (e.sequences for e in data.examples):
        at = s.trained.find(1)
        found.append((list(s.ids[:at]), list(s.ids[at:])))
        assert s.trained == bytes(at) + b"\1" * (len(s) - at)
    return found


def test_each_prompt_gets_the_reply_of_the_row_before():
    rows = ([1, 2], [11]), ([3], [12, 13]), ([4, 5, 6], [14])
    assert pieces(mismatched.rows(dataset(*rows), 99)) == [([1, 2], [14]), ([3], [11]), ([4, 5, 6], [12, 13])]
    assert pieces(mismatched.rows(dataset(*rows), 4))[2] == ([4, 5, 6], [12])  # cut to length


def test_a_reply_to_the_same_prompt_is_no_mismatch():
    rows = ([1], [11]), ([1], [12]), ([2], [13]), ([2], [14])
    assert pieces(mismatched.rows(dataset(*rows), 99)) == [([1], [14]), ([1], [14]), ([2], [12]), ([2], [12])]
    assert pieces(mismatched.rows(dataset(*rows[:2]), 99)) == [([1], [12]), ([1], [11])]  # there is no other


@torch.no_grad()
def logprob(model, s):
    ids = torch.tensor(list(s.ids))
    lp = model(ids[None]).logits[0, :-1].double().log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
    return lp[torch.tensor(list(s.trained[1:])).bool()].sum()


def test_its_value_and_the_loss_by_plain_torch(tmp_path):
    """The policy of step 2 is the model of a run of one step."""
    cfg = kto(tmp_path, "--train.max_steps", "1", "--train.output_dir", str(tmp_path / "one"))
    one = train(cfg)
    two = train(kto(tmp_path, "--train.max_steps", "2", "--train.output_dir", str(tmp_path / "two")))
    first, second = [row for row in metrics.read(two / "metrics.jsonl") if "loss" in row]
    assert first["kl"] == 0.0 and first["loss"] == pytest.approx(0.5)

    start, policy = (transformers.AutoModelForCausalLM.from_pretrained(p) for p in (tmp_path / "model", one / "model"))
    data = load_dataset(cfg.data, load_tokenizer(cfg.model.path), KTO())
    cfg.train.max_steps = 2
    of_step = Plan(cfg, data).rows(1)
    others = mismatched.rows(data, cfg.data.max_length)
    moved = [
        logprob(policy, e.sequences[0]) - logprob(start, e.sequences[0])
        for e in map(others.examples.__getitem__, of_step)
    ]
    kl = torch.stack(moved).mean()
    assert second["kl"] == pytest.approx(kl.item(), rel=1e-3) and abs(kl) > 0.05
    examples = [data.examples[i] for i in of_step]
    lp, ref = (torch.stack([logprob(m, e.sequences[0]) for e in examples]) for m in (policy, start))
    reward = torch.tensor([e.reward[0] for e in examples], dtype=torch.float64)
    losses = KTO(beta=0.3)(lp, torch.ones(len(lp)), reference_logprob=ref, reward=reward, kl=kl)
    assert second["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)


def test_it_matters_and_does_not_depend_on_the_cut_into_micro_batches(tmp_path):
    curves = {}
    for name, options in {
        "many": ["--train.micro_batch_size", "1"],
        "one": ["--train.micro_batch_size", "8"],
        "off": ["--data.mismatched", "false"],
    }.items():
        run = train(kto(tmp_path, *options, "--train.output_dir", str(tmp_path / name)))
        curves[name] = [row for row in metrics.read(run / "metrics.jsonl") if "loss" in row]
    for a, b in zip(curves["many"], curves["one"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["kl"] == pytest.approx(b["kl"], rel=1e-3, abs=1e-5)
    positive = [i for i, row in enumerate(curves["one"]) if row["kl"] > 1e-3]
    assert positive and curves["off"][positive[0]]["loss"] != pytest.approx(
        curves["one"][positive[0]]["loss"], rel=1e-4
    )
    assert "kl" not in curves["off"][0]


def test_ranks_agree_on_it(tmp_path):
    for out, ranks in (("alone", 1), ("ranks", 2)):
        options = ["--train.micro_batch_size", "2", "--train.output_dir", str(tmp_path / out)]
        cfg = kto(tmp_path, *options)
        assert launch.Forked(lambda cfg=cfg: train(cfg), ranks).wait() == [0] * ranks
    alone, ranks = (metrics.read(tmp_path / out / "metrics.jsonl") for out in ("alone", "ranks"))
    for a, b in zip(alone, ranks, strict=True):
        name = "kl" if "kl" in a else "eval_kl"
        assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5)


def test_eval_says_what_the_run_said(tmp_path, capsys):
    run = train(kto(tmp_path))
    last = [row for row in metrics.read(run / "metrics.jsonl") if "eval_loss" in row][-1]
    assert math.isfinite(last["eval_kl"]) and last["eval_kl"] != 0
    capsys.readouterr()
    assert cli.main(["eval", str(run / "config.yaml"), "--model", str(run), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["kl"] == pytest.approx(last["eval_kl"], rel=1e-4)
    assert said["loss"] == pytest.approx(last["eval_loss"], rel=1e-5)


def test_a_killed_run_goes_on_with_the_same_bits(tmp_path):
    whole = outcome(train(kto(tmp_path, "--train.output_dir", str(tmp_path / "whole"))))
    cfg = kto(tmp_path)
    assert in_child(killed_at(cfg, checkpoint, "save", 1, after=True)) == -9
    assert outcome(train(cfg)) == whole


def test_stored_columns_have_no_replies_under_other_prompts(tmp_path):
    kto(tmp_path)
    rows = [row | {"reference_logps": -1.0} for row in tiny.unpaired_rows(8)]
    tiny.write_jsonl(tmp_path / "train.jsonl", rows)
    cfg = kto(tmp_path, "--model.reference", "columns", "--data.eval", "null", "--train.max_steps", "1")
    with pytest.raises(ValueError, match=r"data.mismatched: expected false with model.reference columns, .* got true"):
        train(cfg)
    cfg.data.mismatched = False
    train(cfg)

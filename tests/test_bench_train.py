# SPDX-License-Identifier: Apache-2.0
"""bench.train: both sides get the same rows, padding changes no number, times and goals are what they say."""

import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest
import torch

import tiny
from fastpost import objectives
from fastpost.data.collate import IGNORE, Example, Sequence, collate
from fastpost.hf.folder import load_model, load_tokenizer
from fastpost.train.forward import forward

sys.path.insert(0, str(Path(__file__).parents[1]))

from array import array

from bench import packing, start, train, train_rows, train_sides, train_step

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("bench") / "model")


def test_a_slip_runs_through_to_the_end():
    answer = "He has 3*4=<<3*4=12>>12 eggs.\nHe eats 2, so 12-2=<<12-2=10>>10 are left.\n#### 10"
    for seed in range(20):
        question, right, wrong = train_rows.spoil("How many?", answer, random.Random(seed))
        assert question == "How many?" and "<<" not in right + wrong
        assert right.endswith("The answer is 10") and wrong.split()[-1] != "10" and wrong.startswith("He has 3*4=")


@pytest.mark.parametrize("objective", train_rows.PAIRED)
def test_both_sides_read_the_same_text(objective, tmp_path, model):
    tokenizer = load_tokenizer(model)
    _, texts = train_rows.texts(tmp_path, 3)
    train_rows.write(tmp_path, texts, objective, tokenizer)
    ours, trl = (
        [json.loads(x) for x in (tmp_path / f"{n}.jsonl").read_text().splitlines()] for n in ("fastpost", "trl")
    )
    assert len(ours) == len(trl) == 3
    for a, b in zip(ours, trl):
        for name in set(a) - {"prompt"}:
            rendered = tokenizer.apply_chat_template(a["prompt"] + a[name], tokenize=False)
            assert rendered == b["prompt"] + b[name] + "<|im_end|>\n"
    assert ("rejected" in ours[0]) == train_rows.PAIRED[objective]


def test_digest_sees_tokens_and_masks_and_no_order():
    a, b = ([1, 2, 3], [False, True, True]), ([4, 5, 6], [False, False, True])
    assert train_sides.digest([a, b]) == train_sides.digest([b, a])
    behind = ([1, 2, 3, 9], [False, True, True, False])
    assert train_sides.digest([behind, b])["digest"] == train_sides.digest([a, b])["digest"]
    for other in (([1, 2, 7], a[1]), (a[0], [False, False, True])):
        assert train_sides.digest([other, b])["digest"] != train_sides.digest([a, b])["digest"]


def test_packs_of_trl_are_taken_apart():
    row = {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, 2, 3, -100, 5], "seq_lengths": [3, 2]}
    assert train_sides.trl_sequences("sft", row) == [([1, 2, 3], [False, True, True]), ([4, 5], [False, True])]
    pair = {"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4]}
    assert train_sides.trl_sequences("dpo", pair) == [([1, 2, 3], [False, True, True]), ([1, 4], [False, True])]


@pytest.mark.parametrize("masked", [True, False])
def test_padding_changes_no_number(masked, model):
    def sequence(*ids):
        return Sequence(array("i", ids), b"\0" * (len(ids) // 2) + b"\1" * (len(ids) - len(ids) // 2))

    prompt, policy, objective = (9, 8, 7), load_model(model), objectives.SimPO()
    examples = [Example(i, (sequence(*prompt, *range(20, 24 + i)), sequence(*prompt, 40))) for i in range(3)]
    padded, packed = packing.pad(examples, masked), collate(examples)
    assert padded.input_ids.shape == (6, 9)
    # Right padding needs no mask to give these numbers, so look at it.
    assert padded.mask.sum(1).tolist() == [len(s) for e in examples for s in e.sequences] if masked else not padded.mask
    assert (padded.target != IGNORE).sum() == (packed.target != IGNORE).sum()
    with torch.no_grad():
        a, b = packing.forward(policy, padded, objective), forward(policy, packed, objective)
    torch.testing.assert_close(a.logprob, b.logprob, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a.losses, b.losses, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_our_side_runs_the_real_loop(objective, tmp_path, model):
    _, texts = train_rows.texts(tmp_path, 6)
    train_rows.write(tmp_path, texts, objective, load_tokenizer(model))
    given = ["--objective", objective, "--model", str(model), "--rows", "2", "--steps", "3", "--clock", "cpu"]
    train_sides.main(["fastpost", str(tmp_path), *given])
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(result["seconds"]) == len(result["loss"]) == 3 and min(result["seconds"]) > 0
    assert sum(result["step_tokens"]) == result["tokens"], "each row once"
    if objective == "dpo":
        assert result["loss"][0] == pytest.approx(0.693147, abs=1e-4)
    (summary,) = [train_step.summary([result])]
    assert summary["tps"] == pytest.approx(sum(result["step_tokens"][1:]) / sum(result["seconds"][1:]))


def test_an_inner_stage_is_taken_off_the_outer(monkeypatch):
    now = iter([0.0, 1.0, 4.0, 10.0])
    monkeypatch.setattr(start.time, "perf_counter", lambda: next(now))
    found = {}
    with start.stage(found, "weights"), start.stage(found, "verify", inside="weights"):
        pass
    assert found["verify"][0] == 3.0 and found["weights"][0] == 7.0


@pytest.mark.slow
def test_stages_add_up(tmp_path, model):
    one = start.measure(model, "sft", tmp_path, 8, 1)
    (warm,) = one["warm"]
    for i in (0, 1):
        assert sum(s[i] for name, s in warm.items() if name != "total") == pytest.approx(warm["total"][i])
    assert warm["first step"][0] > 0 and warm["imports"][0] > 0.1
    assert "first step" in start.report(one)


def result(**changes) -> dict:
    def run(side, seconds, peak, loss):
        return {"side": side, "threads": 1, "seconds": [99.0, seconds], "step_tokens": [7, 100], "peak_gb": peak,
                "before_gb": 0.5, "loss": [loss, 0.0]}  # fmt: skip

    stages = {"imports": [3.0, 3.0], "first step": [2.0, 2.0], "total": [5.0, 5.0]}
    return {
        "machine": "some-cpu", "cpu": "Some CPU", "hardware_threads": 2, "gpu": None, "date": "2026-11-22T10:00:00",
        "commit": "0123456789abcdef", "versions": {"torch": "2.13.0"}, "model": "SmolLM2",
        "steps": [{"objective": "sft", "rows": "GSM8K", "rows_a_step": 8, "clock": "cpu",
                   "runs": [run("fastpost", 1.0, 3.0, 1.5), run("trl", 4.0, 4.0, 1.25),
                            run("trl, checkpointing off", 2.0, 8.0, 1.25)]}],
        "packing": [{"kind": "sft", "sequences_a_step": 16,
                     "seconds": {"packed": [1.0], "padded": [1.75], "padded, no mask": [1.25]}}],
        "start": {"help": [0.1], "starts": [{"objective": "sft", "count": 9, "warm": [stages]}]},
        "probe": {"verdict": ["Quiet."]},
    } | changes  # fmt: skip


def test_goals_are_held_against_the_fastest():
    speed, packed, first, asked = train.goals(result())
    assert speed.startswith("met: sft") and "'trl, checkpointing off': 2.00" in speed
    assert packed.startswith("MISSED: sft") and "'padded, no mask' rows: 1.25" in packed
    assert first.startswith("met") and ": 3.00" in first and asked.startswith("met")


def test_readme_has_a_table_of_it():
    spec = importlib.util.spec_from_file_location("readme", ROOT / "tools/readme.py")
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    table = readme.training(result())
    assert (
        "| SFT, 8 rows | 100 | 50 (checkpointing off) | 2.00 × | 25 | 4.00 × | 3.00 | 4.00 | 1.50000 | 1.25000 |"
        in table
    )
    assert "1.25 × in SFT (16 sequences a step)" in table and "3.0 s (SFT, 9 rows)" in table and "0.10 s" in table
    assert "Quiet." in table and "SmolLM2, rows of GSM8K" in table
    alone = result()
    alone["steps"][0]["runs"] = alone["steps"][0]["runs"][:1]
    assert "| SFT, 8 rows | 100 | – |" in readme.training(alone)
    text = "<!-- measured: x -->\n<!-- end of measured -->\n<!-- gpu: x -->\n<!-- end of gpu -->\n"
    assert table in readme.render(text, [result()], {})


BAD_ARGUMENTS = [
    (train.main, ["--steps", "1"], "at least 2"),
    (train.main, ["--repeat", "0"], "at least 1"),
    (train_step.main, ["--objective", "dpo", "--sides", "trl, packing, checkpointing off"], "sft only"),
    (train_step.main, ["--clock", "cpu", "--threads", "2"], "--threads 1"),
]


@pytest.mark.parametrize("main, arguments, said", BAD_ARGUMENTS)
def test_bad_arguments_say_what_is_right(main, arguments, said, capsys):
    with pytest.raises(SystemExit):
        main(["--model", "m", *arguments])
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_everything_runs_beside_trl(tmp_path, model, capsys):
    pytest.importorskip("trl")
    path = tmp_path / "train.json"
    assert train.main(["--model", str(model), "--data", str(tmp_path), "--quick", "--json", str(path)]) == 0
    made = json.loads(path.read_text())
    for part in made["steps"]:
        ours, trl = part["runs"]
        assert (ours["digest"], ours["step_tokens"]) == (trl["digest"], trl["step_tokens"])
        assert trl["weights"] == ["float32"], "as bench.train_step says of SFTTrainer and DPOTrainer"
        assert ours["loss"][0] == pytest.approx(trl["loss"][0], rel=5e-3)
    assert len(train.goals(made)) == 7 and "fastpost --help" in capsys.readouterr().out

# SPDX-License-Identifier: Apache-2.0
"""Samples while training show what the model says and change nothing."""

import json
import random

import pytest
import torch

import runs
import tiny
from fastpost.data.loader import load_dataset
from fastpost.train import checkpoint, jsonl
from fastpost.train.config import DataConfig, LogConfig
from fastpost.train.loop import train
from fastpost.train.samples import Samples, brief, undisturbed

pytestmark = pytest.mark.usefixtures("one_thread")


DROPOUT = {"attention_dropout": 0.2}


@pytest.mark.parametrize("checkpointing", ["full", "selective"])
def test_the_curve_is_the_same_to_the_bit(tmp_path, checkpointing):
    """With dropout (random state), recomputed layers (cache off in training) and a tied head."""
    how = ["--train.gradient_checkpointing", checkpointing]
    train(runs.recipe(tmp_path, *how, model=DROPOUT))
    plain = runs.outcome(tmp_path / "run")
    more = ["--log.samples", "3", "--log.sample_every", "1", "--train.output_dir", str(tmp_path / "with")]
    train(runs.recipe(tmp_path, *how, *more, model=DROPOUT))
    assert runs.outcome(tmp_path / "with") == plain
    assert [s["step"] for s in jsonl.read(tmp_path / "with/samples.jsonl")] == [i for i in range(7) for _ in range(3)]


def test_held_out_prompts_answers_and_the_console(tmp_path, capsys):
    train(runs.recipe(tmp_path, "--log.samples", "2", "--log.sample_tokens", "9", "--train.max_steps", "5"))
    found = jsonl.read(tmp_path / "run/samples.jsonl")
    assert [s["step"] for s in found] == [0, 0, 4, 4, 5, 5]  # before the first, with eval_every 4, after the last
    rows = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    for sample, row in zip(found[:2], rows, strict=False):
        assert sample["prompt"] == f"user\n{row['prompt'][0]['content']}\nassistant"
        assert row["chosen"][0]["content"].startswith(sample["expected"][:8])
        assert set(sample) == {"step", "prompt", "answer", "expected"}
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sample")]
    assert len(lines) == 6 and lines[0].startswith("sample step 0 | user What is ") and " -> " in lines[0]


def test_prompts_of_ones_own_need_no_held_out_rows(tmp_path):
    cfg = runs.recipe(tmp_path, "--data.eval", "none", "--log.samples", '["What is 2 + 2?", Hello]')
    train(cfg)
    found = jsonl.read(tmp_path / "run/samples.jsonl")
    assert [s["prompt"] for s in found[:2]] == ["What is 2 + 2?", "Hello"] and "expected" not in found[0]
    assert [s["step"] for s in found] == [0, 0, 4, 4, 6, 6]


def test_a_resumed_run_writes_the_same_samples(tmp_path):
    how = ["--log.samples", "2", "--log.sample_every", "1"]
    train(runs.recipe(tmp_path, *how))
    whole = (tmp_path / "run/samples.jsonl").read_bytes()
    cfg = runs.recipe(tmp_path, *how, "--train.output_dir", str(tmp_path / "broken"))
    assert runs.in_child(runs.killed_at(cfg, checkpoint, "save", 2)) != 0  # step 4: 4 steps written, 2 saved
    train(cfg)
    assert (tmp_path / "broken/samples.jsonl").read_bytes() == whole


def test_rows_without_a_prompt_are_continued(tmp_path):
    tokenizer = tiny.tokenizer()
    path = tiny.write_jsonl(tmp_path / "t.jsonl", [{"text": "What is the sum of two numbers? The answer is 7."}])
    data = load_dataset(DataConfig(train=str(path)), tokenizer)
    samples = Samples(LogConfig(samples=1, sample_tokens=5), tokenizer, data.examples)
    (prompt,) = samples.prompts
    assert len(prompt.ids) == len(data.examples[0].sequences[0]) // 2 and prompt.text.startswith("What is the")
    assert prompt.expected and not Samples(LogConfig(), tokenizer, data.examples)


def test_undisturbed_puts_everything_back():
    model = tiny.model()
    model.train()
    model.lm_head.eval()
    torch.manual_seed(3)
    random.seed(3)
    expected = torch.rand(1), random.random()
    torch.manual_seed(3)
    random.seed(3)
    with pytest.raises(KeyError), undisturbed(model):
        assert not model.training and not torch.is_grad_enabled()
        torch.manual_seed(99)
        random.random()
        raise KeyError
    assert model.training and not model.lm_head.training and torch.is_grad_enabled()
    assert (torch.rand(1), random.random()) == expected


def test_mistakes(tmp_path):
    with pytest.raises(ValueError, match=r"log.samples: expected a number of prompts from data.eval, which is not set"):
        runs.recipe(tmp_path, "--data.eval", "none", "--log.samples", "2")
    with pytest.raises(ValueError, match=r"log.samples\[1\]: expected a user message, got an empty string. Write one"):
        train(runs.recipe(tmp_path, "--log.samples", "[Hello, ' ']"))
    with pytest.raises(ValueError, match=r"log.samples: expected a whole number or a list of strings, got a mapping"):
        runs.recipe(tmp_path, "--log.samples", "{a: b}")


def test_brief_is_one_short_line():
    text = brief({"prompt": "a\nb " * 200, "answer": "line\n" * 100})
    assert "\n" not in text and len(text) < 125 and " -> " in text and text.startswith("…") and text.endswith("…")
    assert brief({"prompt": "x", "answer": ""}) == "x -> (nothing)"

# SPDX-License-Identifier: Apache-2.0
"""`fastpost generate MODEL --file IN --out OUT`: rows in and out, sampling options, resume, long prompts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import tiny
from fastpost.cli import main
from fastpost.generate import sample
from fastpost.hf import folder

SHORT = ["--max-new-tokens", "6", "--dtype", "fp32"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("models")
    tiny.folder(tmp / "chat")
    tiny.folder(tmp / "plain", template=None)
    return tmp


@pytest.fixture(autouse=True)
def _here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def inputs(count: int, **more) -> None:
    tiny.write_jsonl("in.jsonl", [{"id": f"r{i}", "prompt": f"What is {i}?", **more} for i in range(count)])


def rows(name: str = "out.jsonl") -> list[dict]:
    return [json.loads(line) for line in Path(name).read_bytes().split(b"\n")[:-1]]


def run(model, *more, out: str = "out.jsonl") -> int:
    return main(["generate", str(model), "--file", "in.jsonl", "--out", out, *SHORT, *more])


def greedy(path, prompt: str, tokens: int, **arguments) -> list[int]:
    """By transformers' own generate."""
    model, tokenizer = folder.load_model(path, attention_name="sdpa", check=False), folder.load_tokenizer(path)
    ids = torch.tensor([sample.encode(tokenizer, prompt, **arguments)])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


def test_rows_keep_their_columns_and_get_answers(models, capsys):
    inputs(7, extra={"a": [1, None]})
    assert run(models / "chat", "--logprobs") == 0
    found = rows()
    assert capsys.readouterr().out.startswith("out.jsonl: 7 rows; ")
    tokenizer = folder.load_tokenizer(models / "chat")
    for i, row in enumerate(found):
        assert list(row) == ["id", "prompt", "extra", "line", "answers", "finish", "tokens", "logprobs"]
        assert row["id"] == f"r{i}" and row["line"] == i + 1 and row["extra"] == {"a": [1, None]}
        assert row["tokens"] == [greedy(models / "chat", row["prompt"], 6)]
        assert row["answers"] == [tokenizer.decode(row["tokens"][0], skip_special_tokens=True)]
        assert len(row["logprobs"][0]) == len(row["tokens"][0]) and max(row["logprobs"][0]) <= 0
        assert row["finish"] == ["length" if len(row["tokens"][0]) == 6 else "stop"]


def test_logprobs_are_the_models(models):
    inputs(2)
    assert run(models / "chat", "--logprobs", "--temperature", "0.7", "--samples", "2", "--top-k", "5") == 0
    model, tokenizer = folder.load_model(models / "chat", check=False), folder.load_tokenizer(models / "chat")
    for row in rows():
        prompt = sample.encode(tokenizer, row["prompt"])
        for ids, values in zip(row["tokens"], row["logprobs"], strict=True):
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float() / 0.7
            wanted = logits.log_softmax(-1)[torch.arange(len(ids)), ids]
            torch.testing.assert_close(torch.tensor(values), wanted, rtol=1e-3, atol=1e-3)
            assert all(v.item() in logits[i].topk(5).indices for i, v in enumerate(torch.tensor(ids)))


def test_every_row_has_its_own_draws_whatever_is_batched(models):
    inputs(6)
    sampled = ["--temperature", "1", "--samples", "2", "--seed", "5"]
    assert run(models / "chat", *sampled, "--batch", "1") == 0
    assert run(models / "chat", *sampled, "--batch", "8", out="other.jsonl") == 0
    assert rows() == rows("other.jsonl")
    assert run(models / "chat", *sampled[:-1], "6", out="seed.jsonl") == 0
    answers = [answer for name in ("out.jsonl", "seed.jsonl") for row in rows(name) for answer in row["answers"]]
    assert len(set(answers)) == len(answers) == 24


def test_a_row_overrides_the_command(models):
    tiny.write_jsonl("in.jsonl", [
        {"prompt": "What is 0?"}, {"prompt": "What is 0?", "max_new_tokens": 2},
        {"prompt": "What is 0?", "temperature": 1.0, "samples": 3, "seed": 4}, {"prompt": "What is 0?", "system": "Be"},
        {"prompt": [{"role": "system", "content": "Be"}, {"role": "user", "content": "What is 0?"}]},
    ])  # fmt: skip
    assert run(models / "chat", "--logprobs") == 0
    first, short, three, system, chat = rows()
    assert short["tokens"][0] == first["tokens"][0][:2] and short["finish"] == ["length"]
    assert len(set(three["answers"])) == 3 and three["seed"] == 4
    assert system["tokens"] == chat["tokens"] and len(first["answers"]) == 1
    tokenizer = folder.load_tokenizer(models / "chat")
    stop = tokenizer.decode(first["tokens"][0][2:4])
    tiny.write_jsonl("in.jsonl", [{"prompt": "What is 0?", "stop": [stop]}, {"prompt": "What is 0?"}])
    assert run(models / "chat", "--logprobs", "--overwrite", "--system", "Be") == 0
    assert rows()[1]["tokens"] == system["tokens"]
    tiny.write_jsonl("in.jsonl", [{"prompt": "What is 0?", "stop": [stop]}])
    assert run(models / "chat", "--logprobs", "--overwrite") == 0
    (cut,) = rows()
    assert cut["finish"] == ["stop"] and stop not in cut["answers"][0]
    assert first["answers"][0].startswith(cut["answers"][0])


def test_plain_text(models):
    """Of a chat model with --plain, and of one without a template: the string is what is gone on with."""
    inputs(2)
    assert run(models / "chat", "--plain", "--logprobs") == 0
    assert run(models / "plain", "--logprobs", out="other.jsonl") == 0
    assert [r["tokens"] for r in rows()] == [r["tokens"] for r in rows("other.jsonl")]
    assert rows()[0]["tokens"] == [greedy(models / "plain", "What is 0?", 6)]


def test_prompts_of_the_command_line_to_a_file(models):
    argv = ["generate", str(models / "chat"), "What is 0?", "--prompt", "What is 1?", "--out", "out.jsonl", *SHORT]
    assert main(argv) == 0 and main(argv) == 0
    assert [(r["prompt"], r["line"]) for r in rows()] == [("What is 0?", 1), ("What is 1?", 2)]
    assert main([*argv, "What is 2?"]) == 1  # another second prompt


def test_shown_while_it_grows(models, capsys):
    argv = ["generate", str(models / "chat"), "What is 0?", *SHORT]
    assert main([*argv, "--json"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)["answers"]
    assert main([*argv, "--stream"]) == 0
    assert capsys.readouterr().out == answer + "\n"
    assert main([*argv, "another", "--stream"]) == 1
    assert "--stream: expected one prompt, got 2" in capsys.readouterr().err


# ---- going on ----


def test_going_on_does_not_load_what_it_needs_not(models, capsys, monkeypatch):
    inputs(4)
    assert run(models / "chat", "--limit", "2") == 0
    assert [r["line"] for r in rows()] == [1, 2]
    assert run(models / "chat") == 0
    assert "out.jsonl: 2 of 4 rows are there already" in capsys.readouterr().err and len(rows()) == 4
    before = Path("out.jsonl").read_bytes()
    monkeypatch.setattr("fastpost.hf.adapter.load", None)
    assert run(models / "chat") == 0 and run(models / "chat", "--limit", "3") == 0
    assert capsys.readouterr().out == "out.jsonl: 4 rows, 4 of them from an earlier attempt\n" + (
        "out.jsonl: 3 rows, 3 of them from an earlier attempt\n"
    )
    assert Path("out.jsonl").read_bytes() == before


@pytest.mark.parametrize("option, value, there", [
    ("--temperature", "0.5", "0.0"), ("--top-p", "0.9", "1.0"), ("--top-k", "5", "0"), ("--min-p", "0.1", "0.0"),
    ("--repetition-penalty", "1.1", "1.0"), ("--samples", "2", "1"), ("--seed", "1", "0"),
    ("--max-new-tokens", "7", "6"), ("--dtype", '"bf16"', '"fp32"'), ("--system", '"S"', "not given"),
    ("--stop", '["x"]', "[]"),
])  # fmt: skip
def test_other_settings_are_refused_by_name(models, capsys, option, value, there):
    inputs(1)
    assert run(models / "chat") == 0
    assert run(models / "chat", option, value.strip('["]')) == 1
    assert f"got others: {option}: {value}, there {there}. Give the same ones to go on" in capsys.readouterr().err
    assert run(models / "chat", option, value.strip('["]'), "--overwrite") == 0


def test_another_model_is_refused(models, capsys):
    inputs(1)
    assert run(models / "chat") == 0 and run(models / "plain") == 1
    assert f'MODEL: "{models}/plain", there "{models}/chat"' in capsys.readouterr().err
    tiny.folder(Path("own"))
    assert run("own", out="own.jsonl") == 0
    tiny.folder(Path("own"), seed=1)
    assert run("own", out="own.jsonl") == 1
    said = capsys.readouterr().err
    assert "weights of MODEL" in said and "; " not in said.partition("got others: ")[2]


@pytest.mark.parametrize("line, words", [
    ('{"question": "x"}', "expected an object with 'prompt', got columns question"),
    ('{"prompt": "x", "line": 3}', "column 'line': expected no such column"),
    ('{"prompt": "x", "top_p": 2}', "column 'top_p', which overrides the command's option: expected a number above 0"),
    ('{"prompt": "x"', "broken JSON"),
])  # fmt: skip
def test_broken_rows_are_met_before_anything_is_loaded(models, capsys, monkeypatch, line, words):
    inputs(3)
    with open("in.jsonl", "a") as stream:
        stream.write(line + "\n")
    monkeypatch.setattr("fastpost.hf.adapter.load", None)
    assert run(models / "chat") == 1
    said = capsys.readouterr().err
    assert "in.jsonl:4: " in said and words in said and not os.path.exists("out.jsonl")


def test_rows_that_the_model_cannot_do(models, capsys):
    """Said with their place; the others are done."""
    tiny.write_jsonl("in.jsonl", [
        {"prompt": "What is 0?"}, {"prompt": "x" * 2000}, {"prompt": "What is 1?", "max_new_tokens": 10**6},
    ])  # fmt: skip
    assert run(models / "chat") == 1
    said = capsys.readouterr().err
    assert "in.jsonl:2: [Engine] prompt: expected fewer than the model's 512 positions" in said
    assert "rows that failed: 1, see above" in said and [r["line"] for r in rows()] == [1, 3]
    assert run(models / "chat", "--kv", "shadow", out="other.jsonl") == 1
    assert "in.jsonl:2: [OneByOne] prompt: expected fewer than the model's 512" in capsys.readouterr().err
    assert [r["answers"] for r in rows("other.jsonl")] == [r["answers"] for r in rows()]


@pytest.mark.parametrize("argv, words", [
    ([], "MODEL: expected a folder, got nothing"),
    (["M", "p", "--top-p", "2"], "generate: --top-p: expected a number above 0, at most 1, got 2.0"),
    (["M", "p", "--samples", "0"], "generate: --samples: expected a whole number of at least 1, got 0"),
    (["M", "p", "--stop", ""], "generate: --stop: expected strings that are not empty"),
    (["M", "p", "--batch", "0"], "--batch: expected 1 or more, got 0"),
    (["M", "p", "--limit", "-1"], "--limit: expected 0 or more, got -1"),
    (["M", "p", "--plain", "--system", "S"], "plain text has no system message"),
    (["M", "p", "--logprobs"], "--logprobs without --out or --json"),
    (["M", "p", "--overwrite"], "--resume or --overwrite without --out"),
    (["M", "p", "--out", "o", "--json"], "--out is JSON already"),
    (["M", "p", "--stream", "--samples", "2"], "one answer can be shown"),
    (["M", "p", "--file", "in.jsonl", "--out", "o"], "rows are known by their line"),
    (["M", "--file", "in.jsonl", "--out", "in.jsonl"], "--out: expected another file than --file, got the same"),
    (["M", "p", "--shadow-rank", "8"], "--shadow-rank or --shadow-budget without --kv shadow"),
    (["PLAIN", "p", "--system", "S"], "--system: expected a model with a chat template, got one without"),
    (["M", "p", "--kv", "shadow", "--shadow-rank", "999"], "[ShadowCache] rank: expected 1 to 16"),
])  # fmt: skip
def test_mistakes(models, capsys, argv, words):
    inputs(1)
    names = {"M": str(models / "chat"), "PLAIN": str(models / "plain")}
    before = Path("in.jsonl").read_bytes()
    assert main(["generate", *(names.get(a, a) for a in argv)]) == 1
    assert words in capsys.readouterr().err and Path("in.jsonl").read_bytes() == before


# ---- killed and stopped, with the model in the process ----


def command(models, *more: str) -> list[str]:
    return [sys.executable, "-m", "fastpost", "generate", str(models / "chat"), "--file", "in.jsonl", "--out",
            "out.jsonl", "--batch", "2", "--max-new-tokens", "40", "--dtype", "fp32", "--temperature", "1",
            *more]  # fmt: skip


def until_it_grows(process) -> None:
    def size():
        return os.path.getsize("out.jsonl") if os.path.exists("out.jsonl") else 0

    before = size()
    while process.poll() is None and size() <= before:
        time.sleep(0.001)


@pytest.mark.slow
def test_killed_runs_end_with_the_bytes_of_one_left_alone(models):
    inputs(30)
    process = subprocess.Popen(command(models))
    until_it_grows(process)
    process.kill()
    process.wait()
    there = len(rows())
    process = subprocess.Popen(command(models), stderr=subprocess.PIPE, text=True)
    until_it_grows(process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 143 and 1 <= there < len(rows()) < 30
    assert f"SIGTERM: stopped. out.jsonl: {len(rows())} of 30 rows are there, whole." in said
    assert main(command(models)[3:]) == 0
    os.rename("out.jsonl", "killed.jsonl")
    assert main(command(models)[3:]) == 0
    assert Path("out.jsonl").read_bytes() == Path("killed.jsonl").read_bytes() and len(rows()) == 30


# ---- other caches and models ----


def test_long_prompts_with_low_rank_keys(models, capsys):
    """Full rank and a budget that takes all: the dense answers. Short prompts stay dense, which is said once."""
    tiny.write_jsonl("in.jsonl", [{"prompt": "What is " * n + "7?"} for n in (60, 2, 3)])
    assert run(models / "chat", "--logprobs") == 0
    assert run(models / "chat", "--logprobs", "--kv", "shadow", "--shadow-rank", "16", out="full.jsonl") == 0
    assert [r["tokens"] for r in rows()] == [r["tokens"] for r in rows("full.jsonl")]
    capsys.readouterr()
    low = ["--kv", "shadow", "--shadow-rank", "8", "--shadow-budget", "16", "--logprobs"]
    assert run(models / "chat", *low, out="low.jsonl") == 0
    said = capsys.readouterr().err
    assert said.count("stay dense") == 1 and "in.jsonl:2: " in said
    assert [r["tokens"] for r in rows()[1:]] == [r["tokens"] for r in rows("low.jsonl")[1:]]
    assert rows()[0]["logprobs"] != rows("low.jsonl")[0]["logprobs"]


def test_a_model_that_the_engine_does_not_take(capsys):
    """Convolutions among its layers: through transformers' generate, which is said."""
    import transformers

    config = transformers.Lfm2Config(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention"], bos_token_id=6, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    transformers.Lfm2ForCausalLM(config).save_pretrained("own")
    tiny.tokenizer().save_pretrained("own")
    inputs(2)
    assert run("own", "--logprobs") == 0
    assert "Prompts go through transformers' generate, one at a time." in capsys.readouterr().err
    assert [row["tokens"] for row in rows()] == [[greedy("own", f"What is {i}?", 6)] for i in range(2)]

# SPDX-License-Identifier: Apache-2.0
"""fastpost quantize and fastpost eval --perplexity, as people call them."""

import json
import math

import pytest
import torch

import tiny
from fastpost.cli import main
from fastpost.hf.folder import load_tokenizer
from fastpost.quantize.calibration import documents, draw, token_stream

WORDS = (
    "What is the sum of two numbers? There are seven apples in the basket. The answer is that two and two are four. "
)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    path = tmp_path_factory.mktemp("desk")
    tiny.folder(path / "model", intermediate_size=64)
    (path / "text.txt").write_text("".join(f"{i}. {WORDS[i % 50 :]}" for i in range(120)))
    tiny.write_jsonl(path / "rows.jsonl", [{"text": f"{i} apples. {WORDS}"} for i in range(40)])
    tiny.write_jsonl(path / "chats.jsonl", tiny.sft_rows(40))
    return path


def quantize(desk, out, *options):
    return main(["quantize", str(desk / "model"), "--out", str(out), "--group-size", "32", *map(str, options)])


def test_a_table_with_perplexity_before_and_after(desk, tmp_path, capsys):
    calibration = ["--calibration", desk / "text.txt", "--rows", 8, "--length", 64]
    assert quantize(desk, tmp_path / "out", "--method", "gptq", *calibration) == 0
    said = capsys.readouterr().out
    assert "gptq, 4 bits, groups of 32, calibrated on 8 rows of 64 tokens" in said
    assert "16 windows of 64 tokens of the calibration file that were not drawn" in said
    line = next(line for line in said.splitlines() if line.startswith("perplexity")).split()
    before, after = float(line[1]), float(line[2])
    assert 1 < before < 1000 and after == pytest.approx(before, rel=0.2)
    assert "4.625   14 linear layers, codes alone 4.000" in said
    # The same windows, on the folder: a held-out text for both, and the same numbers from eval.
    models = [str(desk / "model"), str(tmp_path / "out")]
    arguments = ["eval", *models, "--perplexity", str(desk / "rows.jsonl"), "--window", "64", "--dtype", "fp32"]
    assert main([*arguments, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    tokens = token_stream(desk / "rows.jsonl", load_tokenizer(desk / "model"))
    assert [r["tokens"] for r in rows] == [len(tokens) - 1] * 2
    assert all(r["perplexity"] == pytest.approx(math.exp(r["loss"])) for r in rows)
    assert rows[0]["perplexity"] != rows[1]["perplexity"] == pytest.approx(rows[0]["perplexity"], rel=0.2)
    assert rows[1]["megabytes"] < rows[0]["megabytes"]
    assert main([*arguments, "--stride", "16", "--limit", "200"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["model", "perplexity", "loss", "tokens", "windows", "MB"] and " 199 " in lines[1]


def test_formats_and_methods_by_their_names(desk, tmp_path, capsys):
    for options in (["rtn", "--bits", 3], ["rtn", "--format", "awq"], ["nf4", "--double-quant"], ["ir-qlora"]):
        out = tmp_path / "-".join(map(str, options))
        held_out = ["--perplexity", desk / "text.txt", "--length", 64]
        assert quantize(desk, out, "--method", *options, *held_out) == 0
        assert json.loads((out / "fastpost_quantization.json").read_text())["method"] == options[0]
    assert "of " + str(desk / "text.txt") in capsys.readouterr().out
    assert main(["eval", str(out), "--perplexity", str(desk / "text.txt"), "--window", "64"]) == 0


def test_built_in_texts_are_the_default(desk, tmp_path, capsys):
    assert quantize(desk, tmp_path / "out", "--method", "gptq", "--rows", 4, "--length", 128) == 0
    said = capsys.readouterr().out
    assert "16 windows of 128 tokens of built-in/word-problems/texts/new.jsonl" in said


def test_an_ended_run_goes_on(desk, tmp_path, capsys, monkeypatch):
    from fastpost.quantize import run

    keep = run._Desk.keep

    def dies(self, i, layer, hidden):
        keep(self, i, layer, hidden)
        raise KeyboardInterrupt

    options = ["--method", "awq", "--calibration", desk / "text.txt", "--rows", 8, "--length", 64]
    monkeypatch.setattr(run._Desk, "keep", dies)
    assert quantize(desk, tmp_path / "out", *options) == 130
    monkeypatch.setattr(run._Desk, "keep", keep)
    assert quantize(desk, tmp_path / "out", *options, "--bits", 3) == 1
    assert "with another bits" in capsys.readouterr().err
    assert quantize(desk, tmp_path / "out", *options) == 0
    assert "1 blocks were there from an earlier attempt" in capsys.readouterr().out


def test_nothing_is_overwritten_and_nothing_rounded_twice(desk, tmp_path, capsys):
    held_out = ["--perplexity", desk / "text.txt", "--length", 64]
    assert quantize(desk, tmp_path / "out", "--method", "rtn", *held_out) == 0
    assert quantize(desk, tmp_path / "out", "--method", "rtn", *held_out) == 1
    assert "already exists" in capsys.readouterr().err
    assert main(["quantize", str(tmp_path / "out"), "--method", "rtn", "--out", str(tmp_path / "x")]) == 1
    assert "quantised already (rtn)" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_too_few_rows(desk, tmp_path, capsys):
    options = ["--calibration", desk / "text.txt", "--rows", 1000, "--length", 64]
    assert quantize(desk, tmp_path / "out", "--method", "gptq", *options) == 1
    said = capsys.readouterr().err
    assert "1000 rows of 64 tokens need 64000 tokens" in said and "or --rows " in said
    assert not list(tmp_path.iterdir())


def test_no_text_left_to_measure_on(desk, tmp_path, capsys):
    tokens = len(token_stream(desk / "text.txt", load_tokenizer(desk / "model")))
    options = ["--calibration", desk / "text.txt", "--length", 64, "--rows", tokens // 64]
    assert quantize(desk, tmp_path / "out", "--method", "gptq", *options) == 0
    assert "give --perplexity TEXT" in capsys.readouterr().out


# ---- texts -----------------------------------------------------------------------------------------------------------


def test_streams_of_tokens(desk, tmp_path):
    tokenizer = load_tokenizer(desk / "model")
    eos, text = tokenizer.eos_token_id, tokenizer(WORDS, add_special_tokens=False)["input_ids"]
    (tmp_path / "a.txt").write_text(WORDS)
    assert token_stream(tmp_path / "a.txt", tokenizer).tolist() == text
    tiny.write_jsonl(tmp_path / "a.jsonl", [{"text": WORDS}] * 2)
    assert token_stream(tmp_path / "a.jsonl", tokenizer).tolist() == [*text, eos] * 2
    assert len(token_stream(tmp_path / "a.jsonl", tokenizer, 3)) == len(text) + 1
    tiny.write_jsonl(tmp_path / "b.jsonl", [{"prompt": "What is", "completion": " two?"}])
    assert list(documents(tmp_path / "b.jsonl", tokenizer)) == ["What is two?"]
    assert next(documents(desk / "chats.jsonl", tokenizer)).startswith("<|im_start|>user\nWhat is")


def test_bos_once(tmp_path):
    tokenizer = load_tokenizer(tiny.folder(tmp_path / "m", template=tiny.LLAMA3, bos=True))
    bos = tokenizer.bos_token_id
    tiny.write_jsonl(tmp_path / "chats.jsonl", tiny.sft_rows(2))
    found = token_stream(tmp_path / "chats.jsonl", tokenizer).tolist()
    assert found[0] == bos and found[1] != bos
    (tmp_path / "a.txt").write_text(WORDS)
    assert token_stream(tmp_path / "a.txt", tokenizer).tolist() == tokenizer(WORDS)["input_ids"]


def test_draw():
    tokens = torch.arange(105)
    rows, left = draw(tokens, 4, 10, 1, "x")
    assert rows.shape == (4, 10) and left.shape == (6, 10)
    assert torch.equal(torch.cat([rows, left]).flatten().sort().values, torch.arange(100))
    assert torch.equal(draw(tokens, 4, 10, 1, "x")[0], rows) and not torch.equal(draw(tokens, 4, 10, 2, "x")[0], rows)
    assert [len(part) for part in draw(tokens, None, 10, 1, "x")] == [9, 1]
    for rows, length, said in (
        (11, 10, "--rows 10"),
        (1, 106, "at least one window"),
        (0, 10, "at least 1 row"),
        (1, 1, "of 2 tokens"),
    ):
        with pytest.raises(ValueError, match=said):
            draw(tokens, rows, length, 1, "x")

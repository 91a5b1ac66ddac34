# SPDX-License-Identifier: Apache-2.0
import json
import math

import pytest
import torch

import tiny
from fastpost import cli
from fastpost.data import score as scoring
from fastpost.data.ngram import NGram
from fastpost.data.score import whole_lines
from fastpost.hf import folder

TEXTS = ["The sum of two numbers.", "x", "", "seven apples in the basket? " * 6, "Zwölf Boxkämpfer"]


@pytest.fixture
def recipe(tmp_path):
    def recipe(rows, bos=False, **data):
        if not (tmp_path / "model").exists():
            tiny.folder(tmp_path / "model", bos=bos)
        train = tiny.write_jsonl(tmp_path / "docs.jsonl", rows)
        return tiny.recipe(
            tmp_path / "r.yaml", model={"path": tmp_path / "model"}, data={"train": train, "max_length": 16, **data},
            optim={"precision": "fp32"}, train={"max_tokens_per_micro_batch": 50},
        )  # fmt: skip

    return recipe


def run(*arguments) -> int:
    return cli.main(["data", "score", *map(str, arguments)])


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("bos", [False, True])
def test_by_the_model_in_windows(recipe, tmp_path, bos):
    """Every token is scored once, given at most the 15 before it in its window; checked with plain torch."""
    path = recipe([{"text": t, "source": i} for i, t in enumerate(TEXTS)], bos=bos)
    assert run(path, tmp_path / "out.jsonl") == 0
    model, tokenizer = folder.load_model(tmp_path / "model"), folder.load_tokenizer(tmp_path / "model")
    rows = read(tmp_path / "out.jsonl")
    assert [(r["text"], r["source"]) for r in rows] == [(t, i) for i, t in enumerate(TEXTS)]
    for row in rows:
        ids = tokenizer(row["text"], add_special_tokens=False)["input_ids"]
        assert row["tokens"] == len(ids)
        whole, losses = [tokenizer.bos_token_id] * bos + ids, []
        for at in range(1, len(whole)):
            begin = (at - 1) // 15 * 15
            logits = model(torch.tensor([whole[begin:at]])).logits[0, -1]
            losses.append(-logits.log_softmax(-1)[whole[at]].item())
        if losses:
            assert row["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
        else:
            assert row["perplexity"] is None
    assert sum(r["perplexity"] is None for r in rows) == (1 if bos else 2)  # "", and "x" without a BOS


def test_by_n_grams_of_a_reference(recipe, tmp_path, capsys):
    reference = tmp_path / "reference.txt"
    reference.write_text("seven apples in the basket\n\nthe sum of two numbers\n" * 3, encoding="utf-8")
    path = recipe([{"content": t} for t in TEXTS], columns={"text": "content"})
    assert run(path, tmp_path / "out.jsonl", "--ngram", reference, "--order=3") == 0
    assert capsys.readouterr().out == f"{tmp_path}/out.jsonl: 5 documents\n"
    tokenizer = tiny.tokenizer()
    ids = [tokenizer(t)["input_ids"] for t in ["seven apples in the basket", "the sum of two numbers"] * 3]
    model = NGram(ids, 3, len(tokenizer))
    rows = read(tmp_path / "out.jsonl")
    for row, text in zip(rows, TEXTS, strict=True):
        assert row["perplexity"] == pytest.approx(model.perplexity(tokenizer(text)["input_ids"]))
    assert min(rows[1:], key=lambda r: r["perplexity"])["text"] == TEXTS[3]
    jsonl = tiny.write_jsonl(tmp_path / "ref.jsonl", [{"text": t} for t in reference.read_text().split("\n") if t])
    assert run(path, tmp_path / "again.jsonl", "--ngram", jsonl, "--order", 3) == 0
    assert read(tmp_path / "again.jsonl") == rows


def test_the_way_from_scores_to_a_curriculum(recipe, tmp_path):
    """METHODS 14 and 15 in three commands: score, select, train on the sorted subset in its order."""
    reference = tmp_path / "reference.txt"
    reference.write_text("the sum of two numbers is seven\n" * 5, encoding="utf-8")
    texts = ["the sum of " * (1 + i % 4) + "qzj" * (i % 7) for i in range(40)]
    path = recipe([{"text": t} for t in texts])
    scored, subset = tmp_path / "scored.jsonl", tmp_path / "subset.jsonl"
    assert run(path, scored, "--ngram", reference) == 0
    assert cli.main(["data", "select", str(scored), str(subset), "--tokens", "200", "--sort", "true"]) == 0
    values = [r["perplexity"] for r in read(subset)]
    assert values == sorted(values) and sum(r["tokens"] for r in read(subset)) >= 200
    overrides = ["--data.train", f"[{{path: {subset}, ratio: 4, shuffle: false}}, {{path: {scored}, ratio: 1}}]"]
    overrides += ["--data.pack", "blocks", "--train.output_dir", str(tmp_path / "run"), "--train.batch_size", "4"]
    assert cli.main(["train", str(path), *overrides, "--log.plot", "false"]) == 0
    assert (tmp_path / "run" / "model").is_dir()


def test_an_interrupted_run_is_continued(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scoring, "CHUNK", 3)
    rows = [{"text": f"The answer is {i}."} for i in range(11)]
    path, out = recipe(rows), tmp_path / "out.jsonl"
    assert run(path, tmp_path / "whole.jsonl") == 0
    dumps, calls = json.dumps, []

    def failing(values, **options):
        calls.extend([values] * ("perplexity" in values))
        if len(calls) == 6:
            raise KeyboardInterrupt
        return dumps(values, **options)

    monkeypatch.setattr(scoring.json, "dumps", failing)
    assert run(path, out) == 130
    monkeypatch.setattr(scoring.json, "dumps", dumps)
    (partial,) = tmp_path.glob(".out.jsonl.*")
    done = whole_lines(partial)
    assert 0 < done < 11 and not out.exists()
    with open(partial, "a") as stream:
        stream.write('{"text": "cut off')
    capsys.readouterr()
    assert run(path, out) == 0
    assert capsys.readouterr().out == f"{out}: 11 documents, {done} of them from an earlier attempt\n"
    assert not partial.exists()
    for ours, theirs in zip(read(out), read(tmp_path / "whole.jsonl"), strict=True):
        assert ours["text"] == theirs["text"] and ours["perplexity"] == pytest.approx(theirs["perplexity"], rel=1e-5)


def test_what_other_settings_wrote_is_not_continued(recipe, tmp_path, monkeypatch, capsys):
    """Each call is stopped after one line; only the same command finds it again."""
    path, out = recipe([{"text": t} for t in TEXTS]), tmp_path / "out.jsonl"
    reference = tiny.write_jsonl(tmp_path / "ref.jsonl", [{"text": t} for t in TEXTS[:2]])
    commands = [[], ["--data.max_length", "8"], ["--data.limit", "2"], ["--optim.precision", "bf16"]]
    commands += [["--ngram", reference], ["--ngram", reference, "--order", "2"]]
    fsync = scoring.os.fsync

    def stop(stream):
        raise KeyboardInterrupt

    monkeypatch.setattr(scoring.os, "fsync", stop)  # all is written, and not renamed
    for arguments in commands:
        assert run(path, out, *arguments) == 130
    assert len(list(tmp_path.glob(".out.jsonl.*"))) == len(commands)
    monkeypatch.setattr(scoring.os, "fsync", fsync)
    assert run(path, out, "--ngram", reference, "--order", "2") == 0
    assert "5 documents, 5 of them from an earlier attempt" in capsys.readouterr().out


@pytest.mark.parametrize(
    "row, arguments, expected",
    [
        ({"text": 3}, [], "docs.jsonl:2: column 'text': expected a string, got int."),
        ({"txt": "a"}, [], "docs.jsonl:2: column 'text' is missing (the row has: txt)."),
        ({"text": "a", "tokens": 3}, [], "docs.jsonl:2: the row has a column 'tokens' already; it would be"),
        ({"text": "a"}, ["--ngram", "none.txt"], "none.txt: no such reference file."),
        ({"text": "a"}, ["--order", "3"], "--order belongs to --ngram REFERENCE, which is not given."),
        ({"text": "a"}, ["--ngram", "x", "--order", "0"], "--order: expected a whole number of at least 1, got '0'."),
        ({"text": "a"}, ["--ngram"], "command line: --ngram has no value."),
        ({"text": "a"}, ["--data.train", "[{path: a}]"], "Score one file at a time: --data.train FILE."),
        ({"text": "a"}, ["--data.train", "none.jsonl"], ".jsonl, .json or .parquet file, got no such file"),
    ],
)  # fmt: skip
def test_mistakes_are_named(recipe, tmp_path, capsys, row, arguments, expected):
    assert run(recipe([{"text": "ab"}, row]), tmp_path / "out.jsonl", *arguments) == 1
    assert expected in capsys.readouterr().err and not (tmp_path / "out.jsonl").exists()


def test_nothing_is_overwritten(recipe, tmp_path, capsys):
    (tmp_path / "out.jsonl").write_text("")
    assert run(recipe([{"text": "ab"}]), tmp_path / "out.jsonl") == 1
    assert "already exists; nothing is overwritten" in capsys.readouterr().err

# SPDX-License-Identifier: Apache-2.0
import json
import random

import pytest

import tiny
from fastpost import cli
from fastpost.data.select import Best, select


def sort_and_cut(rows: list[dict], budget: int) -> list[dict]:
    """The definition."""
    taken, total = [], 0
    for row in sorted((r for r in rows if r["perplexity"] is not None), key=lambda r: r["perplexity"]):
        if total >= budget:
            break
        taken.append(row)
        total += row["tokens"]
    return taken


def drawn(draw, n: int) -> list[dict]:
    """Rows with many equal scores, and some without any."""
    scores = [None] + [round(draw.uniform(1, 9), 1) for _ in range(12)]
    return [{"text": f"t{i} é", "perplexity": draw.choice(scores), "tokens": draw.randint(0, 30)} for i in range(n)]


@pytest.mark.parametrize("spare", [1, 7, 65536])
def test_is_sort_and_cut(tmp_path, monkeypatch, spare):
    """METHODS 14: the streaming selector takes what a sort and a cut take, to the row."""
    monkeypatch.setattr(Best, "SPARE", spare)
    draw = random.Random(spare)
    for case in range(60):
        rows = [*drawn(draw, draw.randint(0, 80)), {"text": "last", "perplexity": 5.0, "tokens": 3}]
        budget, sort = draw.randint(1, 900), case % 2 == 1
        path, out = tiny.write_jsonl(tmp_path / "s.jsonl", rows), tmp_path / f"{case}.jsonl"
        found = select(path, out, budget, sort=sort)
        expected = sort_and_cut(rows, budget)
        written = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        assert written == (expected if sort else [r for r in rows if r in expected])
        assert (found.rows, found.tokens) == (len(expected), sum(r["tokens"] for r in expected))
        assert found.full == (found.tokens >= budget) and found.worst == expected[-1]["perplexity"]
        assert found.read == len(rows) and found.unscored == sum(r["perplexity"] is None for r in rows)


def test_memory_follows_the_selection(monkeypatch):
    monkeypatch.setattr(Best, "SPARE", 16)
    draw, best, most = random.Random(0), Best(budget=100), 0
    for place in range(20000):
        best.add(draw.random(), 10, place)
        most = max(most, len(best._new[0]) + len(best._kept[0]))
    assert most <= 16 + 16 and len(best.selected()[0]) == 10


def test_by_another_column_and_what_is_said(tmp_path, capsys):
    rows = [{"text": "a", "len": 3, "score": 2}, {"text": "b", "len": 3, "score": 1, "tokens": 4}]
    path = tiny.write_jsonl(tmp_path / "s.jsonl", [{**r, "tokens": 4} for r in rows])
    out = tmp_path / "o.jsonl"
    assert cli.main(["data", "select", str(path), str(out), "--tokens", "1e1", "--by", "score", "--sort", "true"]) == 0
    assert [json.loads(x)["text"] for x in out.read_text().splitlines()] == ["b", "a"]
    assert capsys.readouterr().out == (
        f"{out}: 2 of 2 documents, 8 tokens, score up to 2\n"
        "note: all that is there: 8 tokens are fewer than the 10 asked for\n"
    )


@pytest.mark.parametrize(
    "line, arguments, expected",
    [
        ('{"text": "a", "perplexities": 3, "tokens": 1}', [], "s.jsonl:2: column 'perplexity' is missing. Did you"),
        ('{"text": "a", "perplexity": "3", "tokens": 1}', [], "2: column 'perplexity': expected a finite number"),
        ('{"text": "a", "perplexity": NaN, "tokens": 1}', [], "2: column 'perplexity': expected a finite number"),
        ("[1]", [], "s.jsonl:2: expected an object with columns, got list."),
        ('{"text"', [], "s.jsonl:2: broken JSON"),
        ("", ["--tokens", "many"], "data select: --tokens: expected a number of tokens, got 'many'."),
        ("", ["--tokens", "0"], "[select] tokens: expected a budget of at least 1, got 0."),
        ("", ["--token", "9"], "data select: unknown option --token. Did you mean 'tokens'?"),
        ("", ["--sort", "yes"], "data select: --sort: expected true or false, got 'yes'."),
    ],
)  # fmt: skip
def test_mistakes_are_named(tmp_path, capsys, line, arguments, expected):
    path = tmp_path / "s.jsonl"
    path.write_text('{"text": "a", "perplexity": 3, "tokens": 2}\n' + line)
    arguments = arguments if "--tokens" in arguments else [*arguments, "--tokens", "9"]
    assert cli.main(["data", "select", str(path), str(tmp_path / "o.jsonl"), *arguments]) == 1
    assert expected in capsys.readouterr().err and not (tmp_path / "o.jsonl").exists()


def test_nothing_is_overwritten(tmp_path, capsys):
    path = tiny.write_jsonl(tmp_path / "s.jsonl", [{"perplexity": 1, "tokens": 1}])
    assert cli.main(["data", "select", str(path), str(path), "--tokens", "1"]) == 1
    assert "already exists; nothing is overwritten" in capsys.readouterr().err

# SPDX-License-Identifier: Apache-2.0
"""The page of `fastpost data --html`: whole, harmless, and saying what the terminal says."""

import re
from html import unescape
from html.parser import HTMLParser

import pytest

import tiny
from fastpost import cli
from fastpost.cli import data
from fastpost.cli.page import Spelling, histogram, visible
from fastpost.data.collate import Sequence

EVIL = "<script>alert(1)</script> & \"'</span></pre><img src=http://x.test/a.png onerror=alert(2)> \u202edrow\x07"


class Reader(HTMLParser):
    """Tags with their attributes, and whether they nest."""

    VOID = ("meta", "br", "rect", "line", "input")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def page(tmp_path, capsys):
    def write(rows, objective="dpo", *arguments, **data):
        tiny.folder(tmp_path / "model")
        train = tiny.write_jsonl(tmp_path / "<b>train.jsonl", rows)
        recipe = tiny.recipe(
            tmp_path / "r.yaml", model={"path": tmp_path / "model"}, data={"train": train, **data},
            objective={"name": objective},
        )  # fmt: skip
        assert cli.main(["data", str(recipe), "--html", str(tmp_path / "p.html"), *arguments]) == 0
        text = (tmp_path / "p.html").read_text(encoding="utf-8")
        assert f"wrote {tmp_path}/p.html ({len(text.encode()) / 1024:.0f} kB)" in capsys.readouterr().out
        return text

    return write


def spelt(block: str) -> tuple[str, str]:
    """(all text, trained text) of one sequence on the page."""
    whole, trained = "", ""
    for classes, text in re.findall(r"<span class='([^']*)' data-i='[^']*'>(.*?)</span>", block, re.S):
        text = unescape(re.sub(r"<i>↵</i>", "", text))
        whole += text
        trained += text if "on" in classes.split() else ""
    return whole, trained


def test_rows_cannot_break_out(page):
    rows = tiny.preference_rows(3)
    rows[0]["prompt"][0]["content"] = rows[0]["chosen"][0]["content"] = EVIL
    text = page(rows)
    reader = Reader(text)
    tags = {tag for tag, _ in reader.tags}
    assert not tags & {"script", "img", "link", "iframe", "object", "b onerror"}
    assert not [a for _, a in reader.tags if set(a) & {"src", "href", "onerror", "onclick", "onload", "style"}]
    assert "http" not in text.replace("http-equiv", "").replace("http://x.test", "")
    assert "url(" not in text and "@import" not in text
    assert "default-src 'none'; style-src 'unsafe-inline'" in text
    assert "alert(1)" in reader.text and "\u202e" not in text and "⟨U+202E⟩" in text and "⟨U+0007⟩" in text


def test_trained_tokens_are_those_of_the_mask(page):
    rows = tiny.preference_rows(4)
    rows[1]["chosen"][0]["content"] = "漢字 🙂\n\tjust so"
    text = page(rows)
    blocks = re.findall(r"<div class='(chosen|rejected)'>.*?<pre[^>]*>(.*?)</pre>", text, re.S)
    assert [name for name, _ in blocks] == ["chosen", "rejected"] * 3
    for i, (name, block) in enumerate(blocks):
        row = rows[i // 2]
        whole, trained = spelt(block)
        assert trained == row[name][0]["content"] + "<|im_end|>"
        prompt = f"<|im_start|>user\n{row['prompt'][0]['content']}<|im_end|>\n<|im_start|>assistant\n"
        assert whole == prompt + trained
    assert "data-i='id 1  at 0  not trained'" in text and " sp' data-i='id 2 " in text


def test_the_account_is_that_of_the_terminal(page):
    rows = tiny.preference_rows(8)
    rows[3]["prompt"][0]["content"] = "x" * 80
    rows[4]["rejected"][0]["content"] = ""
    rows = [{"conversations": [{"from": "human", "value": r["prompt"][0]["content"]}],
             "chosen": {"from": "gpt", "value": r["chosen"][0]["content"]},
             "rejected": {"from": "gpt", "value": r["rejected"][0]["content"]}, "chosen_reward": 1.5,
             "rejected_reward": -1} for r in rows]  # fmt: skip
    text = Reader(page(rows, "dpo", "--rows", "2", max_length=64)).text
    for said in (
        "7 of 8rows kept87.5%", "1dropped", "prompt fills max_length1line 4", "14 of 14end of turn trained<|im_end|>",
        "1empty replies", "note columns conversations, chosen, rejected are read as prompt, chosen, rejected",
        "sequence", "rejected", "(the model's own)", "row 1 reward 1.5, -1", "ids 1 ",
    ):  # fmt: skip
        assert said in text, said
    assert "row 2" not in text


def test_the_page_is_there_when_the_reader_of_the_text_goes_away(page, tmp_path, monkeypatch):
    page(tiny.preference_rows(2))
    (tmp_path / "p.html").unlink()

    def gone(*_):
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", gone)
    with pytest.raises(BrokenPipeError):
        data.main([str(tmp_path / "r.yaml"), "--html", str(tmp_path / "p.html")])
    assert "</html>" in (tmp_path / "p.html").read_text()


def test_two_parts_have_two_colours(page):
    text = page([{"prompt": "a", "rationale": "because ", "answer": "so"}], "two-part-sft")
    two = re.findall(r"<span class='t on two[^']*' data-i='[^']*'>(.*?)</span>", text)
    assert "".join(map(unescape, two)) == "so<|im_end|>"


def test_pieces_of_a_character_are_spelt_together():
    tokenizer = tiny.tokenizer()
    text = "a漢🙂\ufffdé"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    groups = list(Spelling(tokenizer).spell(Sequence(ids, bytes(len(ids)))))
    assert [g[:2] for g in groups] == list(zip([0, *(g[1] for g in groups)], [g[1] for g in groups]))
    assert [g[2] for g in groups][:3] == ["a", "漢", "🙂"] and groups[-1][2] == "é"
    broken = Spelling(tokenizer).spell(Sequence(ids[1:2] + ids[:1], b"\0\0"))  # the first byte of three, then "a"
    assert [g[2] for g in broken] == ["\ufffd", "a"]


def test_spaces_that_a_tokenizer_drops_when_decoding():
    """Llama 2's kind: '▁the' alone decodes to 'the'."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"▁a": 0, "▁the": 1, "▁end": 2, "<unk>": 3}, unk_token="<unk>"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<unk>")
    assert [g[2] for g in Spelling(tokenizer).spell(Sequence([1, 2], b"\0\1"))] == [" the", " end"]


def test_visible():
    assert visible("a\tb\n<\u2067&\x00") == "a\tb<i>↵</i>\n&lt;⟨U+2067⟩&amp;⟨U+0000⟩"


@pytest.mark.parametrize("lengths", [[5], [5, 5, 5], [1, 1000], list(range(1, 99))])
def test_histogram_counts_every_sequence(lengths):
    account = type("A", (), {"lengths": {"sequence": lengths}})()
    bars = re.findall(r"<title>[^:]*tokens: (\d+) sequences", histogram(account))
    assert sum(map(int, bars)) == len(lengths) and len(bars) <= 40

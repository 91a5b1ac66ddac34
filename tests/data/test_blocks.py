# SPDX-License-Identifier: Apache-2.0
import random
from array import array
from itertools import accumulate

import pytest
import torch

import tiny
from fastpost import objectives
from fastpost.data.blocks import Packer
from fastpost.data.loader import load_dataset
from fastpost.hf import folder
from fastpost.train.config import DataConfig
from fastpost.train.forward import forward


@pytest.fixture
def load(tmp_path):
    def load(texts, objective=None, tokenizer=None, rows=None, **options):
        path = tiny.write_jsonl(tmp_path / "d.jsonl", rows or [{"text": t} for t in texts])
        options = {"pack": "blocks", **options}
        return load_dataset(DataConfig(train=str(path), **options), tokenizer or tiny.tokenizer(), objective)

    return load


def texts(n: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices("abcde the sum", k=draw.randint(1, 60))) for _ in range(n)]


@pytest.mark.parametrize("pack", ["blocks", "unmasked-blocks"])
def test_the_stream_split_on_eos_is_the_documents(load, pack, monkeypatch):
    """METHODS 15 and 23: nothing is lost, added or moved, and every block is full."""
    monkeypatch.setattr("fastpost.data.blocks.CHUNK", 7)  # what is left of a chunk is carried over
    documents, tokenizer = texts(100), tiny.tokenizer(bos=True)
    data = load(documents, tokenizer=tokenizer, pack=pack, max_length=32)
    stream = [t for e in data.examples for s in e.sequences for t in s.ids]
    assert len(stream) == 32 * len(data) and all(e.tokens == 32 for e in data.examples)
    found = [[]]
    for token in stream:
        if token == tokenizer.eos_token_id:
            found.append([])
        else:
            found[-1].append(token)
    decoded = [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in found]
    assert decoded[:-1] == documents[: len(decoded) - 1] and documents[len(decoded) - 1].startswith(decoded[-1])
    whole = tokenizer(documents, add_special_tokens=False)["input_ids"]
    assert sum(map(len, whole)) + 100 == len(stream) + data.report.left_over and data.report.left_over < 32
    assert tokenizer.bos_token_id not in stream
    assert f"rows 100 (kept 100, dropped 0)   blocks {len(data)} ({data.report.left_over} tokens" in data.report.line()


def test_which_tokens_are_trained(load):
    documents = ["abc", "de", "fghijk", "l"]  # one token a letter, and an EOS each
    masked = load(documents, max_length=6).examples
    assert [[len(s) for s in e.sequences] for e in masked] == [[4, 2], [1, 5]]  # abc. de | . fghij (k. l. are left)
    assert [list(s.trained) for e in masked for s in e.sequences] == [[0, 1, 1, 1], [0, 1], [0], [0, 1, 1, 1, 1]]
    unmasked = load(documents, max_length=6, pack="unmasked-blocks").examples
    assert [list(e.sequences[0].trained) for e in unmasked] == [[0, 1, 1, 1, 1, 1]] * 2
    batch = load(documents, max_length=6).batch([0, 1])
    assert batch.cu_seqlens.tolist() == [0, 4, 6, 7, 12] and batch.rows == [0, 0, 1, 1]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 0, 0, 1, 2, 3, 4]]
    report = load(documents, max_length=6).report
    assert (report.sequences, report.ends_trained, report.end) == (4, 1, "<|im_end|>")


def test_a_documents_loss_is_its_own(load, tmp_path):
    """Masked blocks give the sum over the pieces alone; unmasked ones the model's own loss on the block as one text."""
    model = folder.load_model(tiny.folder(tmp_path / "model"), torch.float32)
    for pack in ("blocks", "unmasked-blocks"):
        data = load(texts(30), max_length=32, pack=pack)
        batch = data.batch([3, 1])
        ours = forward(model, batch, objectives.SFT()).loss
        total, count = 0.0, 0
        for sequence in [s for i in (3, 1) for s in data.examples[i].sequences]:
            if len(sequence) > 1:
                ids = torch.tensor([sequence.ids])
                total += model(ids, labels=ids).loss.item() * (len(sequence) - 1)
                count += len(sequence) - 1
        assert ours.item() == pytest.approx(total / count, rel=1e-5)


def test_short_documents_are_dropped_and_counted(load):
    data = load(["abc", "", "abcdefgh", "ab", "xyzxyz"], max_length=4, min_length=4)
    assert dict(data.report.dropped) == {"shorter than min_length": 2, "empty": 1} and data.report.kept == 2
    assert len(data) == 4  # 9 + 7 tokens
    rows = [{"prompt": "a" * n, "completion": "b"} for n in (1, 2, 3, 4)]
    whole = load(None, rows=rows, pack="rows", min_length=5)
    assert [e.row for e in whole.examples] == [2, 3] and whole.report.dropped == {"shorter than min_length": 2}


def test_an_end_within_a_document_is_told(load):
    data = load(["ab<|im_end|>cd", "abcd"], max_length=4)
    assert data.report.inner_ends == 1
    assert [len(s) for s in data.examples[0].sequences] == [4]  # it stays one document


def test_packer_against_a_plain_slice():
    draw = random.Random(3)
    for masked in (True, False):
        for _ in range(200):
            size, lengths = draw.randint(2, 12), [draw.randint(1, 30) for _ in range(draw.randint(1, 20))]
            stream, packer, blocks = list(range(sum(lengths))), Packer(size, masked), []
            for end, length in zip(accumulate(lengths), lengths):
                blocks += packer.add(array("i", stream[end - length : end]))
            cut = [stream[i : i + size] for i in range(0, len(stream) - size + 1, size)]
            assert [[t for s in b for t in s.ids] for b in blocks] == cut
            assert packer.left_over == len(stream) - size * len(cut)
            assert masked or all(len(b) == 1 for b in blocks)
            starts = {0, *accumulate(lengths)}
            for block in blocks:
                for piece in block[1:]:
                    assert piece.ids[0] in starts
                for piece in block if masked else ():
                    assert not starts & set(piece.ids[1:])


def test_mistakes_are_named(load):
    with pytest.raises(ValueError, match=r"d.jsonl:1: data.pack blocks joins raw text \(column 'text'\), but the col"):
        load(None, rows=tiny.preference_rows(2))
    with pytest.raises(ValueError, match=r"d.jsonl:2: column 'text': expected a string, got int"):
        load(None, rows=[{"text": "a"}, {"text": 3}])
    with pytest.raises(ValueError, match=r"d.jsonl:2: column 'text' is null"):
        load(None, rows=[{"text": "a"}, {"text": None}])
    with pytest.raises(ValueError, match=r"data.pack: blocks are parts of documents, which DPO has no use for"):
        load(["abc"], objectives.DPO())
    with pytest.raises(ValueError, match=r"not one block: rows 2 \(kept 1, dropped 1: empty 1\) gave 4 tokens, and"):
        load(["abc", ""], max_length=8)
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"data.pack: this tokenizer has no EOS token to put between documents"):
        load(["abc"], tokenizer=tokenizer)

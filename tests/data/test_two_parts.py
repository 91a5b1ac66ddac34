# SPDX-License-Identifier: Apache-2.0
"""Replies in two weighted parts (NesyCD): columns, cut, batch and loss."""

import pytest
import torch

import tiny
from fastpost import objectives
from fastpost.data.collate import Example, Sequence, collate
from fastpost.data.loader import load_dataset
from fastpost.hf import attention
from fastpost.train.config import DataConfig
from fastpost.train.forward import forward, lengths
from fastpost.train.loop import train
from train import runs

TWO = objectives.TwoPartSFT()


def load(tmp_path, rows, objective=TWO, template=tiny.CHATML, **options):
    path = tiny.write_jsonl(tmp_path / "d.jsonl", rows)
    return load_dataset(DataConfig(train=str(path), **options), tiny.tokenizer(template), objective)


def parts(sequence) -> tuple[str, str, str]:
    """(prompt, rationale, answer) as the mask has them."""
    decode, ids, begin = tiny.tokenizer().decode, list(sequence.ids), bytes(sequence.trained).find(1)
    return decode(ids[:begin]), decode(ids[begin : sequence.split]), decode(ids[sequence.split :])


def test_the_closed_form():
    """CE 2.0 over the rationale and 1.0 over the answer, alpha .3 -> 1.7; alpha 0 -> the rationale alone."""
    logprob, length = torch.tensor([-8.0, -2.0]), torch.tensor([4, 2])
    assert TWO(logprob, length).tolist() == pytest.approx([1.7])
    assert objectives.TwoPartSFT(alpha=0.0)(logprob, length).tolist() == [2.0]
    assert objectives.from_name("two-part-sft", alpha=1).__call__(logprob, length).tolist() == [1.0]
    with pytest.raises(ValueError, match=r"\[TwoPartSFT\] alpha: expected a finite number of at least 0 and at most 1"):
        objectives.from_name("two-part-sft", alpha=2)
    with pytest.raises(ValueError, match=r"twopartsft, got 'twopart-sftt'. Did you mean 'twopartsft'"):
        objectives.from_name("twopart-sftt")


ROW = {"prompt": "2 + 3?", "rationale": "Two and three make five. ", "answer": "5"}


def test_parts_of_strings_and_chats(tmp_path):
    sequence = load(tmp_path, [ROW]).examples[0].sequences[0]
    assert parts(sequence) == ("2 + 3?", "Two and three make five. ", "5<|im_end|>")
    served = "<|im_start|>user\n2 + 3?<|im_end|>\n<|im_start|>assistant\n"
    for row, options in ((ROW, {"format": "chat"}), ({**ROW, "prompt": [{"role": "user", "content": "2 + 3?"}]}, {})):
        sequence = load(tmp_path, [row], **options).examples[0].sequences[0]
        assert parts(sequence) == (served, "Two and three make five. ", "5<|im_end|>")


def test_a_template_that_trims_moves_no_border(tmp_path):
    row = {**ROW, "rationale": "  So five. ", "answer": "5 "}
    sequence = load(tmp_path, [row], template=tiny.LLAMA3, format="chat").examples[0].sequences[0]
    assert parts(sequence)[1:] == ("So five. ", "5<|eot|>")


def test_the_loss_is_the_two_means_whatever_the_packing(tmp_path):
    """Against each row alone through torch's cross_entropy, and the parts' lengths do not enter."""
    rows = [ROW, {**ROW, "rationale": "Five. ", "answer": "It is 5, of course"}, {**ROW, "prompt": "3?"}]
    examples = load(tmp_path, rows).examples
    attention.register()
    model = tiny.model()
    model.set_attn_implementation(attention.NAME)
    batch = collate(examples)
    out = forward(model, batch, TWO)
    assert batch.cu_parts[0] == 0 and batch.cu_parts[2::2].tolist() == batch.cu_seqlens[1:].tolist()
    assert float(TWO.count(lengths(batch))) == 3 and out.losses.shape == (3,)
    model.set_attn_implementation("eager")
    for example, loss in zip(examples, out.losses):
        (s,) = example.sequences
        begin, ids = bytes(s.trained).find(1), torch.tensor(s.ids)
        logits = model(ids[None]).logits[0]
        ce = [torch.nn.functional.cross_entropy(logits[a - 1 : b - 1], ids[a:b])
              for a, b in ((begin, s.split), (s.split, len(s)))]  # fmt: skip
        torch.testing.assert_close(loss, 0.7 * ce[0] + 0.3 * ce[1], rtol=1e-5, atol=1e-5)
    moved = batch.to("meta")
    assert moved.cu_scored.device.type == "meta" and len(moved.cu_scored) == 7


def test_what_cannot_be_weighed(tmp_path):
    def error(rows, *args, **options):
        with pytest.raises(ValueError) as caught:
            load(tmp_path, rows, *args, **options)
        return str(caught.value)

    data = load(tmp_path, [ROW, {**ROW, "answer": " "}, {**ROW, "rationale": "x" * 80}], max_length=48)
    assert data.report.line() == ("rows 3 (kept 1, dropped 2: empty answer 1, one of the two parts does not fit 1)")
    assert "d.jsonl:1: column 'rationale' is missing" in error([{"prompt": "a", "completion": "b"}])
    assert "column 'answer': expected a string, got int" in error([{**ROW, "answer": 5}])
    assert "data.mask: expected reply, got full" in error([ROW], mask="full")
    assert "has two parts (rationale, answer), which SFT does not weigh. Use the objective two-part-sft" in error(
        [ROW], objectives.SFT()
    )
    whole = Example(0, (Sequence([1, 2], b"\0\1"),))
    with pytest.raises(ValueError, match="some sequences have two parts and some have not"):
        collate([whole, Example(1, (Sequence([1, 2, 3], b"\0\1\1", False, 2),))])


def test_a_cut_prompt_moves_the_border_with_it(tmp_path):
    row = {**ROW, "prompt": "x" * 30}
    sequence = load(tmp_path, [row], max_prompt_length=8).examples[0].sequences[0]
    assert sequence.truncated and parts(sequence) == ("x" * 8, "Two and three make five. ", "5<|im_end|>")


def test_it_trains(tmp_path):
    """Through the loop, in micro-batches of one row and of all: the same losses."""
    rows = [{**ROW, "rationale": f"{i} and so on. ", "answer": str(i)} for i in range(8)]
    tiny.folder(tmp_path / "model")
    tiny.write_jsonl(tmp_path / "train.jsonl", rows)
    losses = []
    for size in (1, 8):
        cfg = runs.recipe(
            tmp_path, objective={"name": "two-part-sft"}, data={"eval": None},
            train={"output_dir": tmp_path / f"run{size}", "micro_batch_size": size, "max_steps": 3, "save_every": 0},
        )  # fmt: skip
        lines = (train(cfg) / "metrics.jsonl").read_text().splitlines()
        losses.append([float(line.split('"loss": ')[1].split(",")[0]) for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][-1] < losses[0][0]

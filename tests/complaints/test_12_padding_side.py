# SPDX-License-Identifier: Apache-2.0
"""Complaint 12: results depend on the side on which rows are padded.

The mistakes: positions that count padding; a mask taken from the wrong end. fastpost pads nowhere: rows lie end to end
with positions of their own, so what is left to test is that the tokenizer's setting does not matter and that the
numbers are those of a padded batch done right, on either side."""

import pytest
import torch

import tiny
from fastpost import objectives
from fastpost.data.loader import load_dataset
from fastpost.hf import attention
from fastpost.train.config import DataConfig
from fastpost.train.forward import forward, lengths


def load(tmp_path, side, **options):
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side = side
    path = tiny.write_jsonl(tmp_path / "d.jsonl", tiny.preference_rows(5))
    return load_dataset(DataConfig(train=str(path), **options), tokenizer)


def test_the_tokenizers_side_does_not_matter(tmp_path):
    left, right = (load(tmp_path, side) for side in ("left", "right"))
    assert left.examples == right.examples
    a, b = (data.batch(range(5)) for data in (left, right))
    assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.target, b.target)
    assert a.tokens == sum(e.computed for e in left.examples), "no token is padding"


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mixtral"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_packed_rows_give_what_padded_rows_give(tmp_path, side, kind):
    """Summed log-probs of every reply, against transformers on one padded batch with an attention mask."""
    data = load(tmp_path, side)
    attention.register()
    model = tiny.model(kind)
    model.set_attn_implementation(attention.NAME)
    batch = data.batch(range(5))
    with torch.no_grad():
        packed = forward(model, batch, objectives.SFT()).logprob

    sequences = [s for e in data.examples for s in e.sequences]
    longest = max(map(len, sequences))
    ids, mask, target = (torch.full((len(sequences), longest), fill) for fill in (0, 0, -100))
    for row, s in enumerate(sequences):
        at = slice(longest - len(s), longest) if side == "left" else slice(0, len(s))
        ids[row, at], mask[row, at] = torch.tensor(s.ids), 1
        labels = torch.tensor([t if on else -100 for t, on in zip(s.ids, s.trained)])
        target[row, at] = torch.cat([labels[1:], torch.tensor([-100])])
    model.set_attn_implementation("eager")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
    logp = -torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    torch.testing.assert_close(packed, logp.view_as(ids).sum(1), rtol=1e-4, atol=1e-4)
    assert lengths(batch).tolist() == (target != -100).sum(1).tolist()

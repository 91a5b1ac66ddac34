# SPDX-License-Identifier: Apache-2.0
"""Complaint 13: packed rows see their neighbours.

The mistakes: one causal triangle over the packed row, positions that run on, a 2-D mask beside packing, the last token
of a row that predicts the first of the next. Hidden states and weight gradients of packed rows against each row alone,
for every kind of model, are in tests/hf/test_attention.py; here the same is asked of the loss, from a file on."""

import pytest
import torch

import tiny
from fastpost import objectives
from fastpost.data.collate import collate
from fastpost.data.loader import load_dataset
from fastpost.hf import attention
from fastpost.train.config import DataConfig
from fastpost.train.forward import forward

KINDS = ("llama", "qwen2", "qwen3", "mixtral")


def load(tmp_path, **options):
    path = tiny.write_jsonl(tmp_path / "d.jsonl", tiny.preference_rows(6))
    return load_dataset(DataConfig(train=str(path), **options), tiny.tokenizer()).examples


def model_of(kind):
    attention.register()
    model = tiny.model(kind)
    model.set_attn_implementation(attention.NAME)
    return model


def losses_and_gradient(model, batches, objective):
    outputs = [forward(model, batch, objective) for batch in batches]
    losses = torch.cat([o.losses for o in outputs])
    model.zero_grad()
    losses.sum().backward()
    return losses.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [True, False], ids=["shared prompt", "each its own"])
def test_packed_equals_unpacked(tmp_path, kind, share):
    """Losses and weight gradients: all pairs in one packed row, and each sequence in a batch of its own."""
    examples, model = load(tmp_path), model_of(kind)
    packed, grads = losses_and_gradient(model, [collate(examples, share)], objectives.SimPO())
    alone, expected = losses_and_gradient(model, [collate([e], False) for e in examples], objectives.SimPO())
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    for name, grad in expected.items():
        assert (grads[name] - grad).norm() <= 2e-4 * grad.norm() + 1e-7, name


@pytest.mark.parametrize("kind", KINDS)
def test_against_transformers_on_one_sequence_at_a_time(tmp_path, kind):
    examples, model = load(tmp_path), model_of(kind)
    with torch.no_grad():
        packed = forward(model, collate(examples), objectives.SFT()).logprob
        model.set_attn_implementation("eager")
        alone = []
        for s in (s for e in examples for s in e.sequences):
            ids, on = torch.tensor(s.ids), torch.tensor(list(s.trained[1:]), dtype=torch.bool)
            logp = torch.log_softmax(model(ids[None]).logits[0, :-1].float(), -1).gather(1, ids[1:, None])[:, 0]
            alone.append(logp[on].sum())
    torch.testing.assert_close(packed, torch.stack(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_other_neighbours_change_nothing(tmp_path, kind):
    """A pair between other pairs, at another place. Place kept: to the last bit, in test_attention."""
    examples, model = load(tmp_path), model_of(kind)
    other = [e for e in examples if e is not examples[2]]
    with torch.no_grad():
        one = forward(model, collate(examples), objectives.SFT()).logprob[4:6]
        two = forward(model, collate([other[0], examples[2], *other[1:]]), objectives.SFT()).logprob[2:4]
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_no_target_crosses_a_border(tmp_path):
    for mask in ("reply", "full"):
        examples = load(tmp_path, mask=mask)
        for share in (True, False):
            batch = collate(examples, share)
            assert (batch.target[batch.cu_seqlens[1:].long() - 1] == -100).all()


def test_the_keys_of_a_row_are_its_own(tmp_path):
    """What the kernel on a GPU is told to look at, spelt out: each sequence from its first token to its last."""
    examples = load(tmp_path)
    batch, whole = collate(examples), collate(examples, share_prompt=False)
    assert batch.tokens < whole.tokens
    assert torch.equal(batch.input_ids[:, batch.key_rows], whole.input_ids)
    assert torch.equal(batch.position_ids[:, batch.key_rows], whole.position_ids)
    assert torch.equal(batch.cu_seqlens_k, whole.cu_seqlens)


def test_packed_rows_without_their_borders_are_refused(tmp_path):
    """Handed to the model without cu_seqlens, or with a mask beside them, they would silently see each other."""
    batch, model = collate(load(tmp_path), share_prompt=False), model_of("llama")
    with pytest.raises(ValueError, match="position_ids restart, so this row holds several sequences"):
        model(input_ids=batch.input_ids, position_ids=batch.position_ids)
    mask = torch.ones(1, 1, batch.tokens, batch.tokens, dtype=torch.bool)
    with pytest.raises(ValueError, match="packed rows come as one row with cu_seq_lens and no mask"):
        model.base_model(
            batch.input_ids, attention_mask=mask, **attention.packed_arguments(batch.cu_seqlens, batch.longest)
        )

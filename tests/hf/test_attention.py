# SPDX-License-Identifier: Apache-2.0
"""Packed attention: equal to each sequence alone, and independent of its neighbours to the last bit."""

import types

import pytest
import torch
import transformers

import tiny
from fastpost.data.collate import Example, Sequence, collate
from fastpost.hf import attention
from fastpost.hf.model import backbone

LENGTHS = (9, 1, 20, 7)  # one token alone; longer than the tiny models' sliding window of 6


def sequences(lengths=LENGTHS, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 300, (n,), generator=draw).tolist() for n in lengths]


def batch_of(rows):
    return collate([Example(i, (Sequence(ids, bytes(len(ids))),)) for i, ids in enumerate(rows)])


def packed_model(kind, **options):
    attention.register()
    model = tiny.model(kind, **options)
    model.set_attn_implementation(attention.NAME)
    return model


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_packed_equals_unpacked(kind):
    """Hidden states and weight gradients, against transformers' eager attention on one sequence at a time."""
    rows = sequences()
    packed, alone = packed_model(kind), tiny.model(kind)
    alone.set_attn_implementation("eager")
    hidden = backbone(packed, batch_of(rows))
    expected = torch.cat([alone.base_model(torch.tensor([ids])).last_hidden_state[0] for ids in rows])
    torch.testing.assert_close(hidden, expected, rtol=2e-4, atol=2e-5)
    direction = torch.randn_like(hidden)
    (hidden * direction).sum().backward()
    (expected * direction).sum().backward()
    for (name, a), b in zip(packed.base_model.named_parameters(), alone.base_model.parameters()):
        assert (a.grad - b.grad).norm() <= 1e-4 * b.grad.norm(), name


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_shared_prompt_changes_nothing(kind):
    """Hidden states and weight gradients of pairs whose prompt is computed once, against each sequence whole. Prompts
    are shorter and longer than the tiny models' sliding window of 6."""
    prompts, replies = sequences((3, 12)), sequences((5, 9, 4, 1), seed=1)
    examples = [
        Example(i, tuple(Sequence(p + r, bytes(len(p)) + b"\1" * len(r)) for r in (replies[2 * i], replies[2 * i + 1])))
        for i, p in enumerate(prompts)
    ]
    shared, whole = collate(examples), collate(examples, share_prompt=False)
    assert whole.tokens - shared.tokens == 2 + 11
    grads, hidden = [], []
    for batch in (shared, whole):
        model = packed_model(kind)
        out = backbone(model, batch)[batch.target != -100]
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
        (out * direction).sum().backward()
        hidden.append(out.detach())
        grads.append({name: p.grad for name, p in model.base_model.named_parameters()})
    torch.testing.assert_close(*hidden, rtol=2e-4, atol=2e-5)
    for name, a in grads[0].items():
        assert (a - grads[1][name]).norm() <= 1e-4 * a.norm(), name


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_neighbours_do_not_matter_to_the_last_bit(kind):
    model, (a, b, c, d) = packed_model(kind), sequences()
    other = sequences(seed=1)
    with torch.no_grad():
        one = backbone(model, batch_of([a, b, c, d]))
        two = backbone(model, batch_of([other[0], other[1], c, other[3]]))
    assert torch.equal(one[10:30], two[10:30]) and not torch.equal(one[:9], two[:9])


@pytest.mark.parametrize("window", [None, 1, 5, 64])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
def test_against_the_formula_in_float64(window, softcap, heads):
    query, key, value = (
        torch.randn(1, h, sum(LENGTHS), 8, dtype=torch.float64) for h in (heads[0], heads[1], heads[1])
    )
    cu = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    module = types.SimpleNamespace(is_causal=True)
    out, _ = attention.attention(
        module, query, key, value, None, scaling=0.3, sliding_window=window, softcap=softcap,
        **attention.packed_arguments(cu, max(LENGTHS)),
    )  # fmt: skip
    place, segment = torch.arange(sum(LENGTHS)), torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
    back = place[:, None] - place
    seen = (segment[:, None] == segment) & (back >= 0) & (back < (window or 999))
    group = heads[0] // heads[1]
    for head in range(heads[0]):
        logits = query[0, head] @ key[0, head // group].T * 0.3
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        expected = logits.masked_fill(~seen, -torch.inf).softmax(-1) @ value[0, head // group]
        # The softcap branch takes its softmax in float32, as transformers does.
        torch.testing.assert_close(out[0, :, head], expected, rtol=0, atol=1e-12 if softcap is None else 1e-6)


def test_gradient_checkpointing_keeps_the_packing():
    plain, saving, batch = packed_model("llama"), packed_model("llama"), batch_of(sequences())
    saving.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    saving.train()
    for model in (plain, saving):
        backbone(model, batch).square().sum().backward()
    for a, b in zip(plain.base_model.parameters(), saving.base_model.parameters()):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_generate_with_and_without_padding(kind):
    """transformers' own generate: no cu_seqlens, a cache, left padding."""
    packed, eager = packed_model(kind), tiny.model(kind)
    eager.set_attn_implementation("eager")
    ids = torch.tensor([[0, 0, 5, 6, 7], [11, 12, 13, 14, 15]])
    arguments = {"attention_mask": (ids != 0).long(), "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(packed.generate(ids, **arguments), eager.generate(ids, **arguments))
    assert torch.equal(
        packed.generate(ids[1:], max_new_tokens=12, do_sample=False, eos_token_id=None),
        eager.generate(ids[1:], max_new_tokens=12, do_sample=False, eos_token_id=None),
    )


def test_packed_positions_without_cu_seqlens_are_refused():
    batch = batch_of(sequences())
    with pytest.raises(ValueError, match=r"cu_seq_lens_q: position_ids restart, so this row holds several sequences"):
        packed_model("llama")(input_ids=batch.input_ids, position_ids=batch.position_ids)


def test_a_mask_beside_packing_is_refused():
    batch = batch_of(sequences())
    mask = torch.ones(1, 1, batch.tokens, batch.tokens, dtype=torch.bool)
    arguments = attention.packed_arguments(batch.cu_seqlens, batch.longest)
    with pytest.raises(ValueError, match="attention_mask: packed rows come as one row with cu_seq_lens and no mask"):
        packed_model("llama").base_model(batch.input_ids, attention_mask=mask, **arguments)


def test_attention_sinks_are_refused_by_name():
    attention.register()
    config = transformers.GptOssConfig(
        vocab_size=320, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.set_attn_implementation(attention.NAME)
    with pytest.raises(ValueError, match="s_aux: GptOssAttention needs this term"):
        backbone(model, batch_of(sequences()))


def test_bidirectional_attention_is_refused():
    module = types.SimpleNamespace(is_causal=False)
    x = torch.zeros(1, 1, 4, 8)
    with pytest.raises(ValueError, match="is_causal: SimpleNamespace attends in both directions"):
        attention.attention(module, x, x, x, None, cu_seq_lens_q=torch.tensor([0, 4], dtype=torch.int32))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's varlen kernel needs a GPU")
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_varlen_kernel_equals_the_cpu(kind):
    rows = sequences((40, 1, 90, 7))
    model = packed_model(kind)
    with torch.no_grad():
        expected = backbone(model, batch_of(rows))
        got = backbone(model.to("cuda", torch.bfloat16), batch_of(rows).to("cuda")).float().cpu()
    error = (got - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.median() < 0.02 and error.max() < 0.1

# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import transformers

import tiny
from fastpost.data.collate import Example, Sequence, collate
from fastpost.hf import attention
from fastpost.hf.model import backbone, head, logits, verify

SMALL = dict(
    vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=6, eos_token_id=2,
)  # fmt: skip


def build(config):
    attention.register()
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=attention.NAME
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return model.eval()


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_backbone_and_head_are_the_model(kind, tie):
    attention.register()
    model = tiny.model(kind, tie=tie)
    model.set_attn_implementation(attention.NAME)
    verify(model)
    ids = [5, 9, 300, 17]
    batch = collate([Example(0, (Sequence(ids, bytes(4)),))])
    h = head(model)
    assert (h.weight is model.get_input_embeddings().weight) == tie
    assert h.softcap == (3.0 if kind == "gemma2" else None) and h.bias is None and h.temperature == 1.0
    expected = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits(backbone(model, batch), h), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "config, temperature",
    [
        (transformers.GraniteConfig(**SMALL, logits_scaling=4.0), 4.0),
        (transformers.CohereConfig(**SMALL, logit_scale=0.25), 4.0),
    ],
    ids=["granite divides", "cohere multiplies"],
)
def test_a_logit_scale_is_a_temperature(config, temperature):
    model = build(config)
    assert head(model).temperature == temperature
    verify(model)


@pytest.mark.parametrize(
    "config",
    [
        transformers.MixtralConfig(**SMALL, num_local_experts=4),
        transformers.Qwen3MoeConfig(
            **SMALL, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
        ),
    ],
    ids=["mixtral", "qwen3-moe"],
)
def test_mixtures_of_experts_pack(config):
    verify(build(config))


def test_an_unknown_scale_on_the_logits_is_refused():
    """A model whose forward multiplies its logits by something that its head does not show."""
    model = build(transformers.LlamaConfig(**SMALL))
    model.lm_head.register_forward_hook(lambda module, inputs, out: out * 1.5)
    with pytest.raises(ValueError, match="LlamaForCausalLM: backbone and head do not give its own logits"):
        verify(model)


def test_a_model_whose_state_runs_across_sequences_is_refused():
    model = build(transformers.MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, state_size=4))
    with pytest.raises(ValueError, match="MambaForCausalLM: a packed sequence sees the one before it"):
        verify(model)


def test_a_backbone_of_another_shape_is_refused():
    model = build(transformers.MptConfig(vocab_size=320, d_model=32, n_heads=4, n_layers=1))
    with pytest.raises(ValueError, match="MptForCausalLM: its backbone does not take packed rows"):
        verify(model)


def test_softcap_and_scale_together_are_refused():
    model = build(transformers.GraniteConfig(**SMALL, logits_scaling=4.0))
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match=r"\[head\] GraniteForCausalLM: has a softcap and a logit scale"):
        head(model)

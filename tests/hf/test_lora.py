# SPDX-License-Identifier: Apache-2.0
"""peft's LoRA on lm_head: the gradients are those of the model's own materialised logits."""

import copy

import peft
import pytest
import torch

import fastpost
import tiny
from fastpost.data.collate import Example, Sequence, collate
from fastpost.hf import attention
from fastpost.hf.lora import lora_head
from fastpost.hf.model import backbone, head, logits, verify
from fastpost.train.forward import forward


def adapted(kind="llama", tie=False, targets=("q_proj", "lm_head"), **config):
    """A tiny model in peft's wrapper, with random A and B (peft starts with B = 0, which hides mistakes)."""
    attention.register()
    model = tiny.model(kind, tie=tie)
    model.set_attn_implementation(attention.NAME)
    config = {"r": 4, "lora_alpha": 8, "target_modules": list(targets), "init_lora_weights": False} | config
    return peft.get_peft_model(model, peft.LoraConfig(**config)).eval()


def batch_of(*sequences):
    return collate([Example(0, tuple(Sequence(s, bytes(2) + b"\1" * (len(s) - 2)) for s in sequences))])


def own_logprob(model, ids):
    """Summed log-prob of ids[2:] by the model's own forward."""
    logp = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return logp[1:-1].gather(1, torch.tensor(ids[2:])[:, None]).sum()


CHOSEN, REJECTED = [5, 9, 300, 17, 8, 44], [5, 9, 21, 33]


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.parametrize("inject", [False, True], ids=["wrapper", "inner model"])
@pytest.mark.parametrize("kind, tie", [("llama", False), ("llama", True), ("gemma2", True), ("qwen2", False)])
def test_training_through_the_head_is_peft(kind, tie, inject):
    model = adapted(kind, tie)
    taken = model.get_base_model() if inject else model
    verify(taken)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum("lm_head.lora_" in name for name in trained) == 2
    ours = forward(taken, batch_of(CHOSEN, REJECTED), fastpost.objectives.SimPO())
    ours.loss.backward()
    grads = {name: p.grad.clone() for name, p in trained.items()}
    model.zero_grad()
    sums = torch.stack([own_logprob(model, ids) for ids in (CHOSEN, REJECTED)])
    torch.testing.assert_close(ours.logprob, sums, rtol=1e-4, atol=1e-4)
    fastpost.objectives.SimPO()(sums, torch.tensor([4, 2])).mean().backward()
    for name, p in trained.items():
        assert p.grad.norm() > 1e-4, name
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_states_of_the_adapter():
    """Off, switched, merged: always what the model's own forward does."""
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    batch, ids = batch_of(CHOSEN), torch.tensor([CHOSEN])

    def same(expect_pair):
        h, hidden = head(model), backbone(model, batch)
        pair = h.low_rank(hidden)
        assert (None if pair is None else pair[0].shape[1]) == expect_pair
        torch.testing.assert_close(logits(hidden, h), model(ids).logits[0], rtol=1e-4, atol=1e-4)

    same(4)
    with model.disable_adapter():
        same(None)
    model.set_adapter("other")
    same(2)
    model.merge_adapter()
    same(None)
    model.unmerge_adapter()
    same(2)


def test_dropout_is_that_of_peft():
    layer = adapted(lora_dropout=0.5).get_output_embeddings().train()
    hidden, target = torch.randn(9, 32), torch.randint(0, 320, (9,))
    leaves = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    results = []
    for ours in (True, False):
        torch.manual_seed(4)
        if ours:
            weight, pair = lora_head(layer, hidden)
            out = fastpost.linear_logprob(hidden, weight, target, low_rank=pair)
        else:
            out = fastpost.token_logprob(layer(hidden), target)
        results.append((out, *torch.autograd.grad(out.sum(), leaves)))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_adapters_in_float32_on_a_model_in_bfloat16():
    """peft's default: A and B stay float32, and so do their gradients."""
    layer = adapted().get_output_embeddings()
    layer.base_layer.bfloat16()
    hidden, target = torch.randn(50, 32).bfloat16(), torch.randint(0, 320, (50,))
    weight, pair = lora_head(layer, hidden)
    out = fastpost.linear_logprob(hidden, weight, target, low_rank=pair)
    leaves = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    exact = copy.deepcopy(layer).double()
    truth = torch.log_softmax(exact(hidden.double()), -1).gather(1, target[:, None])[:, 0]
    exact_leaves = exact.lora_A["default"].weight, exact.lora_B["default"].weight
    for a, b in zip(torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(truth.sum(), exact_leaves)):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 1e-2 * b.norm()


def test_a_plain_head_and_one_that_is_trained_whole():
    hidden = torch.randn(3, 32)
    model = tiny.model(tie=False)
    weight, pair = lora_head(model.lm_head, hidden)
    assert weight is model.lm_head.weight and pair is None
    model = adapted(targets=("q_proj",), modules_to_save=["lm_head"])
    verify(model)
    weight, pair = lora_head(model.get_output_embeddings(), hidden)
    assert pair is None and weight.requires_grad


REFUSED = {
    "dora": (lambda: adapted(use_dora=True), r"lora.layer.Linear: expected plain LoRA, got DoraLinearVariant"),
    "bias": (lambda: adapted(lora_bias=True), r"expected B without a bias. Set lora_bias=False"),
    "tokens": (lambda: adapted(targets=("q_proj",), tie=True, trainable_token_indices=[3]),
               r"TrainableTokensWrapper: expected peft's lora.Linear around torch.nn.Linear"),
    "loha": (lambda: peft.get_peft_model(tiny.model(tie=False), peft.LoHaConfig(target_modules=["lm_head"])),
             r"loha.layer.Linear: expected peft's lora.Linear"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_is_refused(name):
    build, message = REFUSED[name]
    with pytest.raises(ValueError, match=r"\[head\] peft\..*" + message):
        head(build())


def test_two_adapters_at_once_and_merged_but_off_are_refused():
    model = adapted()
    layer = model.get_output_embeddings()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["lm_head"]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="expected one active adapter, got 2"):
        head(model)
    model.set_adapter("default")
    layer.merge()
    layer.enable_adapters(False)
    with pytest.raises(ValueError, match="expected an adapter that is not merged"):
        head(model)


def test_prompt_tuning_is_refused():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(tiny.model(tie=False), config)
    with pytest.raises(ValueError, match="expected adapters inside the layers, got PROMPT_TUNING"):
        backbone(model, batch_of(CHOSEN))

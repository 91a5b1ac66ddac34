# SPDX-License-Identifier: Apache-2.0
"""compat.trl against TRL's own function and head where TRL is installed, and against whole logits."""

import copy
import dataclasses
import inspect

import pytest
import torch
import transformers

import tiny
from compare import error
from fastpost.compat import trl as ours

N, D, V = 13, 31, 303
FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
EVERY = FIELDS[1:]


def theirs():
    pytest.importorskip("trl", minversion="1.16", reason="compared with TRL where it is installed")
    from trl.trainer import utils

    return utils


def inputs(dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    weight, targets = torch.randn(V, D, generator=g), torch.randint(0, V, (N,), generator=g)
    hidden = torch.randn(N, D, generator=g) / D**0.5
    hidden[:5] = weight[targets[:5]] / 5  # the target is the most likely token
    return [t.to(dtype) for t in (hidden, weight, torch.randn(V, generator=g) / 5)], targets


def definition(leaves, targets, temperature, softcap, scale):
    hidden, weight, bias = leaves
    z = hidden @ weight.T + bias
    z = (z if z.dtype == torch.float64 else z.float()) * scale
    z = (softcap * torch.tanh(z / softcap) if softcap else z) / temperature
    logp = z.log_softmax(-1)
    p = logp.exp()
    picked = logp.gather(1, targets[:, None])[:, 0]
    return picked, -(p * logp).sum(-1), p.square().sum(-1).log(), z.mean(-1), z.argmax(-1) == targets


def gradients(f, leaves, convert):
    leaves = [convert(t).detach().requires_grad_() for t in leaves]
    out = f(leaves)
    (out[0] * torch.linspace(-1, 2, N) + 0.3 * out[1]).sum().backward()
    assert not any(x.requires_grad for x in out[2:])
    return [x.detach() for x in out], [t.grad for t in leaves]


TRANSFORMS = [(1.0, None, 1.0), (0.7, None, 2.5), (1.3, 20.0, 1.0), (0.7, 3.0, 2.5), (1.0, 1.0, 0.25)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_function_matches_the_definition(transform, dtype):
    temperature, softcap, scale = transform
    leaves, targets = inputs(dtype)

    def f(x):
        return ours.ChunkedLogProbFunction.apply(*x, targets, temperature, 100, softcap, scale)

    def plain(convert):
        def g(x):
            out = definition(x, targets, temperature, softcap, scale)
            return *out[:2], *(y.detach() for y in out[2:])

        return gradients(g, leaves, convert)

    (out, grads), (b_out, b_grads), (t_out, t_grads) = (
        gradients(f, leaves, torch.clone), plain(torch.clone), plain(torch.Tensor.double),
    )  # fmt: skip
    assert torch.equal(out[4], b_out[4]) and out[4].any() and not out[4].all()
    room = 1e-5 if dtype == torch.float32 else 4e-3
    for a, b, t in zip(out[:4] + grads, b_out[:4] + b_grads, t_out[:4] + t_grads, strict=True):
        assert error(a, t) <= 1.5 * error(b, t) + room


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_function_equals_trls(transform):
    temperature, softcap, scale = transform
    leaves, targets = inputs(torch.float32, seed=1)
    results = []
    for function in (theirs()._ChunkedLogProbFunction, ours.ChunkedLogProbFunction):

        def f(x, function=function):
            return function.apply(*x, targets, temperature, 100, softcap, scale)

        results.append(gradients(f, leaves, torch.clone))
    for a, b in zip(results[1][0] + results[1][1], results[0][0] + results[0][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_signatures_are_trls():
    def parameters(f):
        return [(p.name, p.default) for p in inspect.signature(f).parameters.values()]

    utils = theirs()
    assert parameters(ours.add_fused_lm_head) == parameters(utils.add_fused_lm_head)
    assert parameters(ours.ChunkedLogProbFunction.apply) == parameters(utils._ChunkedLogProbFunction.forward)[1:]
    names = [f.name for f in dataclasses.fields(ours.FusedCausalLMOutput)]
    assert names == [f.name for f in dataclasses.fields(utils.FusedCausalLMOutput)]


@pytest.mark.parametrize("outputs", [(), ("log_probs",), ("entropy",), ("mean_logits",), ("is_top1",), EVERY], ids=str)
def test_only_what_was_asked_for(outputs):
    leaves, targets = inputs(torch.float32)
    whole = ours.ChunkedLogProbFunction.apply(*leaves, targets, 1.0, 64, 5.0, 1.0)
    some = ours.ChunkedLogProbFunction.apply(*leaves, targets, 1.0, 64, 5.0, 1.0, outputs)
    for name, a, b in zip(FIELDS, some, whole, strict=True):
        if name in outputs or name == "log_probs":
            torch.testing.assert_close(a, b)
        else:
            assert a is None


def test_is_top1_wants_the_first_of_equals():
    hidden, weight = torch.ones(3, 1), torch.tensor([[0.0], [2.0], [1.0], [2.0]])
    top1 = ours.ChunkedLogProbFunction.apply(hidden, weight, None, torch.tensor([1, 2, 3]), 1.0, 2)[4]
    assert top1.tolist() == [True, False, False]


def test_unscored_rows_are_zero():
    leaves, targets = inputs(torch.float32)
    targets[::2] = -100
    for softcap in (None, 5.0):
        out = ours.ChunkedLogProbFunction.apply(*leaves, targets, 1.0, 64, softcap, 1.0)
        alone = [t[1::2] for t in (leaves[0], targets)]
        expected = ours.ChunkedLogProbFunction.apply(alone[0], *leaves[1:], alone[1], 1.0, 64, softcap, 1.0)
        for a, b in zip(out, expected):
            assert torch.all(a[::2] == 0)
            torch.testing.assert_close(a[1::2], b)


# ---- the head on a model ----

SMALL = dict(
    vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=6, eos_token_id=2,
)  # fmt: skip
MODELS = {
    "llama": lambda: tiny.model("llama"),
    "softcap": lambda: tiny.model("gemma2"),
    "divides": lambda: build(transformers.GraniteConfig(**SMALL, logits_scaling=4.0)),
    "multiplies": lambda: build(transformers.CohereConfig(**SMALL, logit_scale=0.25)),
    "experts": lambda: build(
        transformers.MixtralConfig(**SMALL, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.1)
    ),
    "bias": lambda: build(transformers.PhiConfig(**SMALL)),
}


def build(config):
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.2) if p.ndim > 1 or p is getattr(model.lm_head, "bias", None) else None
    return model.eval()


def batch():
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(7, 300, (3, 9), generator=g)
    mask = torch.ones_like(ids)
    mask[1, 6:], mask[2, 8:] = 0, 0
    labels = torch.where(mask == 1, ids, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask}, labels


@pytest.mark.parametrize("kind", MODELS)
def test_head_is_the_models_own(kind):
    """Fields from the model's own logits, its own loss, and the gradient of both."""
    model = MODELS[kind]()
    plain, (tokens, labels) = copy.deepcopy(model), batch()
    ours.add_fused_lm_head(model, outputs=EVERY)
    out = model(**tokens, labels=labels, fused_lm_head=True)
    expected = plain(**tokens, labels=labels)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-6)
    target = labels[:, 1:]
    scored = target != -100
    fields = definition((expected.logits[:, :-1][scored], torch.eye(320), torch.zeros(320)), target[scored], 1, None, 1)
    assert torch.equal(out.label_mask, scored)
    for name, value in zip(FIELDS, fields, strict=True):
        assert torch.all(out[name][~scored] == 0)
        torch.testing.assert_close(out[name][scored], value, rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(x.loss, list(m.parameters())) for x, m in ((out, model), (expected, plain))]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "cast_lm_head_to_fp32": True}], ids=str)
def test_head_equals_trls(kind, options):
    utils = theirs()
    model = MODELS[kind]()
    other, (tokens, labels) = copy.deepcopy(model), batch()
    ours.add_fused_lm_head(model, outputs=EVERY, **options)
    utils.add_fused_lm_head(other, outputs=EVERY, **options)
    for more in ({"labels": labels}, {"labels": labels, "num_items_in_batch": 11}, {"shift_labels": labels}):
        a, b = (m(**tokens, **more, fused_lm_head=True) for m in (model, other))
        assert list(a) == list(b)
        for name in b:
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5, msg=name)
    assert inspect.signature(model.forward) == inspect.signature(other.forward)


def test_without_the_flag_the_model_is_its_own():
    model, (tokens, labels) = tiny.model("llama"), batch()
    expected, text = model(**tokens, labels=labels), model.generate(**tokens, max_new_tokens=3, do_sample=False)
    cls = type(model).forward
    ours.add_fused_lm_head(model)
    assert type(model).forward is cls and "forward" in vars(model)  # this instance, not the class
    assert torch.equal(expected.logits, model(**tokens).logits)
    assert torch.equal(expected.loss, model(**tokens, labels=labels).loss)
    assert torch.equal(text, model.generate(**tokens, max_new_tokens=3, do_sample=False))


def test_bf16_head_in_float32():
    model, (tokens, labels) = tiny.model("llama").bfloat16(), batch()
    ours.add_fused_lm_head(model, cast_lm_head_to_fp32=True)
    hidden = model.base_model(**tokens).last_hidden_state[:, :-1].double()
    expected = (hidden @ model.lm_head.weight.double().T).log_softmax(-1)
    expected = expected.gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0] * (labels[:, 1:] != -100)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(**tokens, labels=labels, fused_lm_head=True).log_probs
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-5)


def test_nothing_scored_is_a_differentiable_zero():
    model, (tokens, labels) = tiny.model("llama"), batch()
    ours.add_fused_lm_head(model, outputs=EVERY)
    out = model(**tokens, labels=torch.full_like(labels, -100), fused_lm_head=True)
    assert out.loss == 0
    out.loss.backward()
    assert all(torch.all(p.grad == 0) for p in model.parameters() if p.grad is not None)


def test_trl_trainer_runs_on_it():
    """DPOTrainer made by TRL, its model given this head: same loss, metrics and gradients as with TRL's."""
    theirs()
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    rows = [
        {"prompt": "What is the sum?", "chosen": " The answer is seven." * n, "rejected": " apples"} for n in (1, 2)
    ]
    results = []
    for head in (None, ours.add_fused_lm_head):
        args = trl.DPOConfig(output_dir="unused", report_to=[], save_strategy="no", use_cpu=True, bf16=False,
                             per_device_train_batch_size=2, max_length=64, beta=0.3, disable_tqdm=True)  # fmt: skip
        trainer = trl.DPOTrainer(tiny.model("llama"), ref_model=tiny.model("llama", seed=1), args=args,
                                 train_dataset=datasets.Dataset.from_list(rows),
                                 processing_class=tiny.tokenizer())  # fmt: skip
        if head is not None:
            head(trainer.model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
            head(trainer.ref_model)
        loss = trainer.compute_loss(trainer.model.train(), next(iter(trainer.get_train_dataloader())))
        loss.backward()
        metrics = {k: v[0] for k, v in trainer._metrics["train"].items()}
        results.append((loss, metrics, [p.grad for p in trainer.model.parameters()]))
    (loss, metrics, grads), (our_loss, our_metrics, our_grads) = results
    torch.testing.assert_close(our_loss, loss)
    assert {"rewards/margins", "entropy", "mean_token_accuracy"} <= metrics.keys()
    assert our_metrics == pytest.approx(metrics, rel=1e-4)
    assert any(g.abs().max() > 0 for g in grads)
    for a, b in zip(our_grads, grads):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


# ---- adapters ----


@pytest.mark.parametrize("cast", [False, True], ids=["", "in float32"])
def test_lora_on_the_head_is_computed_and_trained(cast):
    peft = pytest.importorskip("peft")
    tokens, labels = batch()
    model = tiny.model("gemma2", tie=False)
    ours.add_fused_lm_head(model, outputs=EVERY, cast_lm_head_to_fp32=cast)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    out, plain = wrapped(**tokens, labels=labels, fused_lm_head=True), wrapped(**tokens, labels=labels)
    target = labels[:, 1:]
    scored = target != -100
    fields = definition((plain.logits[:, :-1][scored], torch.eye(320), torch.zeros(320)), target[scored], 1, None, 1)
    for name, value in zip(FIELDS, fields, strict=True):
        torch.testing.assert_close(out[name][scored], value, rtol=1e-4, atol=1e-5)
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    grads, expected = (torch.autograd.grad(x.loss, trained) for x in (out, plain))
    for a, b in zip(grads, expected, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    with wrapped.disable_adapter():
        expected = wrapped(**tokens, labels=labels).loss
        torch.testing.assert_close(wrapped(**tokens, labels=labels, fused_lm_head=True).loss, expected)


def test_mean_of_logits_with_lora_and_no_softcap():
    peft = pytest.importorskip("peft")
    tokens, labels = batch()
    model = tiny.model("llama", tie=False)
    ours.add_fused_lm_head(model, outputs=("mean_logits",))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    expected = wrapped(**tokens).logits[:, :-1].mean(-1) * (labels[:, 1:] != -100)
    torch.testing.assert_close(
        wrapped(**tokens, labels=labels, fused_lm_head=True).mean_logits, expected.detach(), rtol=1e-4, atol=1e-6
    )


def test_other_adapters_on_the_head_are_refused():
    """Reading the weight would leave them out of the loss, and they would never be trained."""
    peft = pytest.importorskip("peft")
    tokens, labels = batch()
    model = tiny.model("llama", tie=False)
    ours.add_fused_lm_head(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], use_dora=True))
    with pytest.raises(ValueError, match=r"\[head\] peft.*: expected plain LoRA, got Dora"):
        wrapped(**tokens, labels=labels, fused_lm_head=True)


def test_adapter_elsewhere_and_a_head_trained_whole():
    peft = pytest.importorskip("peft")
    tokens, labels = batch()
    model = tiny.model("llama", tie=False)
    ours.add_fused_lm_head(model)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    )
    out = wrapped(**tokens, labels=labels, fused_lm_head=True)
    torch.testing.assert_close(out.loss, wrapped(**tokens, labels=labels).loss, rtol=1e-5, atol=1e-6)
    out.loss.backward()
    trained = {name: p.grad for name, p in wrapped.named_parameters() if p.requires_grad}
    assert any("lm_head" in name for name in trained) and all(g.abs().max() > 0 for g in trained.values())


# ---- refusals ----


def test_bad_input_is_named():
    leaves, targets = inputs(torch.float32)

    def run(**change):
        names = ("temperature", "chunk_size", "final_logit_softcapping", "logit_scale", "outputs")
        return ours.ChunkedLogProbFunction.apply(
            *leaves, targets, *(dict(zip(names, (1.0, 8, None, 1.0, EVERY))) | change).values()
        )

    with pytest.raises(ValueError, match=r"outputs: expected some of log_probs, entropy, .*, got logits"):
        run(outputs=("logits",))
    with pytest.raises(ValueError, match=r"temperature, logit_scale: expected numbers above 0, got 1.0 and 0.0"):
        run(logit_scale=0.0)
    with pytest.raises(ValueError, match=r"temperature, logit_scale: expected numbers above 0, got -1.0 and 1.0"):
        run(temperature=-1.0)
    model, (tokens, _) = tiny.model("llama", tie=False), batch()
    ours.add_fused_lm_head(model)
    with pytest.raises(ValueError, match=r"labels: expected labels or shift_labels, got neither"):
        model(**tokens, fused_lm_head=True)
    model.lm_head.weight.data = torch.empty(0)  # as ZeRO-3 leaves it
    with pytest.raises(ValueError, match=r"lm_head: expected a weight \[V, D\], got \[0\].*ZeRO-3"):
        model(**tokens, labels=tokens["input_ids"], fused_lm_head=True)

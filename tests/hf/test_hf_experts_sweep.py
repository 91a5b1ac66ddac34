# SPDX-License-Identifier: Apache-2.0
"""Every class of transformers that has the experts interface, found by scanning: ours against its own eager forward.

A class gets a configuration that answers whatever it asks for by the name of the field, so no model has to be built."""

import importlib
import re
from pathlib import Path

import pytest
import torch
import transformers

from compare import error
from fastpost.hf import experts as ours

EXPERTS, HIDDEN, INNER, TOKENS, TOP_K = 5, 16, 24, 30, 2
MODELS = Path(transformers.__file__).parent / "models"
DECORATED = re.compile(r"^@use_experts_implementation(?:\(.*\))?\nclass (\w+)", re.M)
FOUND = [
    (path.parent.name, name)
    for path in sorted(MODELS.glob("*/modeling_*.py"))
    for name in DECORATED.findall(path.read_text(encoding="utf-8"))
]
GENERAL = {  # transformers 5.23: not Mixtral's layout or gate
    "AriaExperts", "BeamExperts", "DeepseekV4Experts", "Glm5NextTextExperts", "GptOssExperts", "HYV4Experts",
    "Inkling2Experts", "MiniMaxM3VLExperts", "MuseSparkExperts", "NemotronHExperts", "OpenAIPrivacyFilterExperts",
}  # fmt: skip
CROWDED = {"GptOssExperts", "NemotronHExperts", "OpenAIPrivacyFilterExperts"}  # eager has no room for nobody's choices


class Fields:
    """A configuration: sizes, activations and constants by what their names say."""

    _experts_implementation = "eager"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        for part, value in (
            ("latent", None), ("limit", 0.7), ("alpha", 1.702), ("beta", 1.0), ("eps", 1e-5), ("softcap", 3.0),
            ("act", "relu2" if name == "mlp_hidden_act" else "silu"), ("intermediate", INNER), ("moe_hidden", HIDDEN),
            ("hidden", HIDDEN), ("d_model", HIDDEN), ("expert", EXPERTS), ("bias", False),
        ):  # fmt: skip
            if part in name:
                return value
        raise AttributeError(f"the sweep knows no value for config.{name}")


def build(model, name):
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    try:
        made = getattr(module, name)(Fields())
    except (AttributeError, TypeError) as problem:
        pytest.skip(f"needs a configuration of its own: {problem}")
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.5 if p.ndim > 1 else 1.0))
    return made


def run(made, forward, dtype):
    """Output and gradients of hidden states, gates and every parameter. One choice in ten is for nobody (an index of
    num_experts, which eager skips, too)."""
    made = made.to(dtype)
    g = torch.Generator().manual_seed(5)
    x = torch.randn(TOKENS, HIDDEN, generator=g).to(dtype).requires_grad_()
    index = torch.rand(TOKENS, EXPERTS, generator=g).argsort(-1)[:, :TOP_K]
    index = index.where(torch.rand(index.shape, generator=g) > 0.1, EXPERTS)
    gate = torch.rand(TOKENS, TOP_K, generator=g).to(dtype).requires_grad_()
    if type(made).__name__ in CROWDED:
        index = index.clamp(max=EXPERTS - 1)
    out = forward(made, x, index, gate)
    grad = torch.randn(out.shape, generator=g).to(out.dtype)
    inputs = [x, gate, *made.parameters()]
    return [out, *torch.autograd.grad(out, inputs, grad)]


def test_the_scan_finds_them():
    names = {name for _, name in FOUND}
    assert len(FOUND) >= 40
    assert {"MixtralExperts", "OlmoeExperts", "Qwen3MoeExperts", "GptOssExperts", "DeepseekV3Experts"} <= names


@pytest.mark.parametrize("model, name", FOUND, ids=[name for _, name in FOUND])
def test_ours_is_its_own_eager_forward(model, name):
    made = build(model, name)
    eager = type(made).forward.__wrapped__

    def theirs(module, *args):
        return eager(module, *args)

    truth = run(made, theirs, torch.float64)
    plain = run(made, theirs, torch.float32)
    found = run(made, ours.experts_forward, torch.float32)
    names = ["out", "x", "gate", *dict(made.named_parameters())]
    for label, a, b, c in zip(names, found, truth, plain, strict=True):
        a, b, c = (t.flatten(0, -2) if t.ndim > 1 else t for t in (a, b, c))
        bound = 4 * error(c, b) + 1e-6
        assert error(a, b) <= bound, (label, error(a, b), bound)
    assert ours.is_fused(made) == (name not in GENERAL), "which path it takes"

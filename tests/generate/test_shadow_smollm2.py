# SPDX-License-Identifier: Apache-2.0
"""ShadowCache on a real model, where SmolLM2 is in the user's cache already (tests download nothing)."""

import pytest
import torch
from transformers import DynamicCache

import fastpost
from fastpost.data.word_problems import problems
from fastpost.generate.shadow.rope import Rope, unrotate
from fastpost.hf import folder, smollm2
from fastpost.user_cache import cache_dir

FOLDER = cache_dir() / f"{smollm2.NAME}-{smollm2.VERSION}"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="SmolLM2 is not in the user's cache")


@pytest.fixture(scope="module")
def models():
    return [folder.load_model(FOLDER, torch.float32).eval() for _ in range(2)]


@pytest.fixture(scope="module")
def ids():
    text = "\n".join(str(problem) for problem in problems("train", 40))
    return folder.load_tokenizer(FOLDER)(text, return_tensors="pt")["input_ids"][:, :708]


@torch.no_grad()
def logits(model, cache, ids, prompt=700):
    found = [model(ids[:, :prompt], past_key_values=cache, logits_to_keep=1).logits]
    found += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(prompt, ids.shape[1])]
    return torch.cat(found, 1)


def test_lossless_equals_dense(models, ids):
    ours, theirs = models
    cache = fastpost.ShadowCache(ours.config, rank=192, bits=None, dense_below=0)
    got, want = logits(ours, cache, ids), logits(theirs, DynamicCache(), ids)
    assert cache.rows.counts == [83]
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def test_the_usual_settings_stay_near(models, ids):
    """Rank 30 of 192, a quarter of the chunks, int8: the most likely token is the same, nearly always."""
    ours, theirs = models
    cache = fastpost.ShadowCache(ours.config, rank=None, budget=160)
    got, want = (logits(*run, ids, prompt=684).log_softmax(-1) for run in ((ours, cache), (theirs, DynamicCache())))
    assert (got.argmax(-1) == want.argmax(-1)).float().mean() > 0.8
    assert 1e-4 < (want.exp() * (want - got)).sum(-1).mean() < 0.1
    assert all(0.01 < float(error) < 0.6 for error in cache.errors())
    assert cache.memory()["per_token_layer"] == 30 + 4 + 3 * (64 + 4) / 8


def test_keys_have_lower_rank_before_rope(models, ids):
    """Why the keys are turned back first: the share of each layer's keys that rank 30 misses."""
    model = models[1]
    cache = DynamicCache()
    with torch.no_grad():
        model(ids[:, :700], past_key_values=cache)
    cos, sin = Rope(model.config).tables(torch.arange(700)[None], torch.float32)
    missed = []
    for layer in cache.layers:
        both = layer.keys[0], unrotate(layer.keys[0], cos[0], sin[0])
        s = torch.stack([torch.linalg.svdvals(k.transpose(0, 1).flatten(1)) for k in both])
        missed.append((s[:, 30:].square().sum(1) / s.square().sum(1)).sqrt())
    after, before = torch.stack(missed).T
    assert (before < after).all() and before.mean() < 0.6 * after.mean()

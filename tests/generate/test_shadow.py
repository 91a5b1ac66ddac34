# SPDX-License-Identifier: Apache-2.0
"""ShadowCache with full rank and a budget for everything is dense attention, whatever the model and its RoPE."""

import pytest
import torch
import transformers as tf

import fastpost
import shadow_models as small
from fastpost.generate.shadow.rope import Rope, rotates, unrotate
from fastpost.reference.kv_reconstruct import rotate

LEFT = torch.tensor([[0] * 37 + [1] * 73, [1] * 110, [0] * 5 + [1] * 105])


def close(got, want, mask=None):
    real = torch.ones(want.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    assert got.isfinite().all()
    scale = want[real].abs().max()
    assert (got - want)[real].abs().max() <= 1e-4 * max(1.0, float(scale))


@pytest.mark.parametrize("name", small.MODELS)
@pytest.mark.parametrize("generated", ["keep", "fold"])
def test_lossless_equals_dense(name, generated):
    """Rows of unequal length, padded on the left, then token by token over the point where chunks are folded."""
    ids = small.tokens(3, 190)
    mask = torch.cat([LEFT.to(ids.device), torch.ones(3, 80, dtype=torch.long)], 1)
    model = small.model(name)
    cache = small.cache(model, generated=generated)
    got = small.run(model, cache, ids, prompt=110, mask=mask)
    close(got, small.dense(name, ids, prompt=110, mask=mask), mask)
    compressed = {"keep": [8, 12, 12], "fold": [16, 20, 20]}[generated]
    assert cache.rows.counts == compressed  # so it was not dense attention that was compared with dense attention
    first = cache.shadow_layers[0]
    assert first.store is not None and first.resident.amax() > 0


def test_generate_just_works():
    model, ids = small.model(), small.tokens(2, 110)
    mask = LEFT[:2].to(ids.device)
    options = dict(max_new_tokens=30, do_sample=False, attention_mask=mask)
    want = small.model().generate(ids, **options)
    cache = small.cache(model)
    got = model.generate(ids, past_key_values=cache, **options)
    assert torch.equal(got, want) and cache.rows.counts == [8, 12] and cache.get_seq_length() == 139


def test_padding_on_the_right():
    """As a batch that was padded for training: what follows a row's padding goes on where its tokens ended."""
    ids, model = small.tokens(2, 120), small.model()
    mask = torch.ones_like(ids)
    mask[0, 70:100] = 0
    cache = small.cache(model)
    got = small.run(model, cache, ids, prompt=100, mask=mask)
    close(got, small.dense("llama", ids, prompt=100, mask=mask), mask)
    assert cache.rows.length == [90, 120] and cache.rows.counts == [7, 11]


def test_holes_in_the_mask():
    ids, model = small.tokens(2, 110), small.model()
    mask = torch.ones_like(ids)
    mask[1, 30:41] = 0
    mask[1, 60] = 0
    close(small.run(model, small.cache(model), ids, prompt=90, mask=mask),
          small.dense("llama", ids, prompt=90, mask=mask), mask)  # fmt: skip


def test_positions_that_count_padding():
    """Without position_ids transformers numbers the columns, padding included: each row then has tables of its own."""
    ids, mask = small.tokens(3, 110), LEFT.to(torch.get_default_device())

    @torch.no_grad()
    def logits(model, cache):
        first = model(ids, attention_mask=mask, past_key_values=cache).logits
        longer = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
        return torch.cat([first, model(ids[:, :1], attention_mask=longer, past_key_values=cache).logits], 1)

    model = small.model()
    cache = small.cache(model)
    got, want = logits(model, cache), logits(small.model(), tf.DynamicCache())
    close(got, want, torch.cat([mask, torch.ones(3, 1)], 1))
    assert cache.rows.own is not None and cache.rows.line is None


@pytest.mark.parametrize("pieces", [[40, 30, 20], [1, 89], [90]])
def test_prompt_in_pieces(pieces):
    """Stays dense until the first single token: what all of it says is known then."""
    ids, model = small.tokens(2, 100), small.model()
    cache = small.cache(model, dense_below=50)
    got = small.run(model, cache, ids, prompt=90, pieces=pieces)
    close(got, small.dense("llama", ids, prompt=90))
    if pieces != [1, 89]:  # a prompt that begins with a single token is taken for generation, which is kept dense
        assert cache.rows.counts == [10, 10]
    chunked = model.generate(ids[:, :90], past_key_values=small.cache(model), prefill_chunk_size=32, max_new_tokens=8,
                             do_sample=False)  # fmt: skip
    assert torch.equal(chunked, small.model().generate(ids[:, :90], max_new_tokens=8, do_sample=False))


@pytest.mark.parametrize("generated", ["keep", "fold"])
@pytest.mark.parametrize("more", [5, 60])
def test_turns(generated, more):
    """A second input after compression: few tokens choose for themselves, many attend to all chunks."""
    ids, model = small.tokens(2, 100 + 3 + more + 4), small.model()
    mask = torch.ones_like(ids)
    mask[1, :30] = 0
    mask[0, 103:105] = 0  # the second input is padded too

    @torch.no_grad()
    def logits(model, cache):
        positions, found, start = mask.cumsum(1) - 1, [], 0
        for n in (100, 1, 1, 1, more, 1, 1, 1, 1):
            where = slice(start, start + n)
            out = model(ids[:, where], attention_mask=mask[:, : start + n], past_key_values=cache,
                        position_ids=positions[:, where].clamp(min=0))  # fmt: skip
            found.append(out.logits)
            start += n
        return torch.cat(found, 1)

    cache = small.cache(model, generated=generated)
    close(logits(model, cache), logits(small.model(), tf.DynamicCache()), mask)
    grown = generated == "fold" and more == 60
    assert (max(cache.rows.counts) > 11) == grown


def test_few_tokens_at_once_are_one_by_one():
    """With a small budget: the chunks that speculation's tokens choose are those that they would choose alone."""
    ids, model = small.tokens(1, 120), small.model()
    small_budget = dict(budget=32, rank=8, bits=8, outliers=1)
    alone = small.run(model, small.cache(model, **small_budget), ids, prompt=100)
    cache = small.cache(model, **small_budget)
    with torch.no_grad():
        first = model(ids[:, :100], past_key_values=cache).logits
        model(ids[:, 100:101], past_key_values=cache)
        more = model(ids[:, 101:120], past_key_values=cache).logits
    torch.testing.assert_close(more, alone[:, 101:], rtol=1e-4, atol=1e-4)
    assert torch.equal(first, alone[:, :100])


def test_short_prompt_is_dense_and_says_so_once():
    model = small.model()
    cache = fastpost.ShadowCache(model.config, rank=8, budget=128)
    with pytest.warns(UserWarning, match=r"2 of 2 prompts have 40 to 40 tokens, fewer than the 184 of budget"):
        got = small.run(model, cache, small.tokens(2, 45), prompt=40)
    close(got, small.dense("llama", small.tokens(2, 45), prompt=40))
    assert cache.rows.counts == [0, 0] and cache.errors() == [None, None]
    with pytest.warns() as told:
        small.run(model, fastpost.ShadowCache(model.config, rank=8, budget=128), small.tokens(2, 45), prompt=40)
    assert len([w for w in told if "ShadowCache" in str(w.message)]) == 1


def test_a_short_prompt_that_grows_is_compressed_when_folding():
    model, ids = small.model(), small.tokens(2, 150)
    cache = small.cache(model, generated="fold", dense_below=80)
    with pytest.warns(UserWarning, match="kept dense"):
        got = small.run(model, cache, ids, prompt=30)
    close(got, small.dense("llama", ids, prompt=30))
    assert cache.rows.counts == [17, 17] and cache.memory()["tail"] < 60 * 2 * 2 * 2 * 2 * 32 * 4


def test_rope_goes_back_exactly():
    """Tables that were scaled (yarn) or rounded (bfloat16) have cos² + sin² other than 1."""
    x = torch.randn(2, 3, 50, 24)
    for rounding in (torch.float32, torch.bfloat16):
        angle = torch.rand(50, 8) * 6
        cos, sin = (1.3 * angle.cos()).to(rounding), (1.3 * angle.sin()).to(rounding)
        there = rotate(x, cos.float(), sin.float())
        torch.testing.assert_close(unrotate(there, cos, sin), x, rtol=1e-5, atol=1e-5)
    assert (unrotate(there, cos, sin) - rotate(there, cos.float(), -sin.float())).abs().max() > 0.1


@pytest.mark.parametrize("name", small.MODELS)
def test_rope_is_the_models_own(name):
    """The keys of two inputs that differ in position alone are the same, once turned back."""
    made = small.model(name)
    used = Rope(made.config)
    keys = []
    for shift in (0, 40):
        positions = torch.arange(shift, shift + 12)[None]
        seen = {}

        class Watch(tf.DynamicCache):
            def update(self, key, value, index, *args, **kwargs):
                seen[index] = key  # noqa: B023
                return super().update(key, value, index, *args, **kwargs)

        with torch.no_grad():
            made(torch.full((1, 12), 17), position_ids=positions, past_key_values=Watch(config=made.config))
        cos, sin = used.tables(positions, torch.float32)
        keys.append(used.arrange(seen[1]) if not rotates(made.config, 1)
                    else unrotate(used.arrange(seen[1]), cos[0], sin[0]))  # fmt: skip
    if used.changing:
        return  # other positions, another rotation of what came before: layer 1 sees other hidden states
    # One token repeated: hidden states do not depend on positions, so neither do keys before RoPE.
    torch.testing.assert_close(keys[0], keys[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(keys[0][:, :, :1].expand_as(keys[0]), keys[0], rtol=1e-3, atol=1e-3)

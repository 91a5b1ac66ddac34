# SPDX-License-Identifier: Apache-2.0
"""What a new token looks at, how far it is from dense attention, and what it costs."""

import pytest
import torch

import fastpost
import shadow_models as small

LOSSY = dict(rank=8, budget=32, outliers=2, local=1, bits=8, dense_below=0)


def watched(monkeypatch):
    """Every call of kv_select from here on: (what it was given, what it chose)."""
    from fastpost.generate.shadow import layer as shadow_layer

    calls, real = [], shadow_layer.kv_select

    def select(query, landmark, count, resident, **options):
        before = resident.clone()
        found = real(query, landmark, count, resident, **options)
        calls.append(((query.clone(), before, options), found))
        return found

    monkeypatch.setattr(shadow_layer, "kv_select", select)
    return calls


def test_chosen_chunks_are_the_best_by_brute_force(monkeypatch):
    """From the keys themselves: mean of a chunk, softmax over the chunks, the largest of a group, the best four."""
    calls = watched(monkeypatch)
    model, ids = small.model(), small.tokens(2, 104)
    cache = small.cache(model, **(LOSSY | {"bits": None}))
    small.run(model, cache, ids, prompt=100)
    assert len(calls) == 2 * 4
    keys = small.cache(model, dense_below=10**6)
    with pytest.warns(UserWarning, match="kept dense"):
        small.run(model, keys, ids, prompt=100)
    (query, _, _), found = calls[0]  # layer 0, first new token: what it saw does not depend on the cache
    landmark = keys.shadow_layers[0].tail_keys[:, :, :88].unflatten(2, (11, 8)).mean(3)
    logits = torch.einsum("bgqd,bgcd->bgqc", query.unflatten(1, (2, 2)), landmark) / 4
    kept = cache.shadow_layers[0].kept.long()
    logits.scatter_(3, kept[:, :, None].expand(-1, -1, 2, -1), -torch.inf)
    best = logits.softmax(-1).amax(2).topk(4).indices.sort(-1).values
    assert torch.equal(found.chunks.long(), best)
    members = keys.shadow_layers[0].tail_keys[:, :, :88].unflatten(2, (11, 8))
    likeness = torch.cosine_similarity(members, landmark[:, :, :, None], dim=-1).amin(-1)
    assert torch.equal(kept, likeness.topk(2, largest=False).indices.sort(-1).values)


def test_slots_survive_and_are_used(monkeypatch):
    """The same token twice rebuilds nothing the second time."""
    calls = watched(monkeypatch)
    model, ids = small.model(), small.tokens(2, 100)
    cache = small.cache(model, **LOSSY)
    small.run(model, cache, torch.cat([ids, ids[:, :1]], 1), prompt=100)
    cache.crop(-1)
    small_run = calls.copy()
    calls.clear()
    with torch.no_grad():
        model(ids[:, :1], past_key_values=cache, position_ids=torch.full((2, 1), 100))
    assert all(found.fresh.sum() > 0 for _, found in small_run)
    assert len(calls) == 2 and all(found.fresh.sum() == 0 for _, found in calls)


@pytest.mark.parametrize("value_bits", [None, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_step_has_the_bits_of_a_cold_one(value_bits, dtype):
    """Slots that are filled are worth what empty ones are: nothing but time changes when they are forgotten."""
    model = small.model().to(dtype)
    warm, cold = (small.cache(model, **LOSSY, value_bits=value_bits) for _ in range(2))
    ids = small.tokens(2, 125)
    with torch.no_grad():
        for cache in (warm, cold):
            model(ids[:, :100], past_key_values=cache)
        for i in range(100, 125):
            for layer in cold.shadow_layers:
                if layer.resident is not None:
                    layer.resident.fill_(-1)
                    layer.slots[:, :, : layer.sizes.budget] = torch.nan
            a, b = (model(ids[:, i : i + 1], past_key_values=cache).logits for cache in (warm, cold))
            assert torch.equal(a, b)


def distance(**options):
    """Of the attention's outputs of layer 0 to dense ones, over 20 tokens: no error of earlier layers in between."""
    model, ids = small.model(num_hidden_layers=1), small.tokens(2, 220)
    cache = small.cache(model, **(dict(local=1, outliers=0) | options))
    got = small.run(model, cache, ids, prompt=200)[:, 200:]
    want = small.dense("llama", ids, prompt=200, overrides={"num_hidden_layers": 1})[:, 200:]
    return float((got - want).norm() / want.norm()), cache


def test_error_falls_with_rank():
    found = [distance(rank=rank) for rank in (2, 6, 12, 20, 32)]
    errors = [error for error, _ in found]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-5 < 1e-2 < errors[0]
    reported = [float(cache.errors()[0].mean()) for _, cache in found]
    assert reported == sorted(reported, reverse=True) and reported[-1] < 1e-3 < 0.3 < reported[0]


def test_error_falls_with_budget():
    errors = [distance(budget=budget)[0] for budget in (8, 32, 64, 128, 192)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-5 < 1e-2 < errors[0]


def test_reported_error_is_that_of_the_exact_decomposition():
    model, ids = small.model(), small.tokens(1, 200)
    cache, exact = small.cache(model, rank=8), small.cache(model, dense_below=10**6)
    with torch.no_grad():
        for one in (cache, exact):
            model(ids, past_key_values=one)
    layer = exact.shadow_layers[1]
    tables = exact.rows.row_tables(0, 0, 192, layer.tail_keys)
    from fastpost.generate.shadow.rope import unrotate

    keys = unrotate(layer.tail_keys[0, :, :192], *tables).transpose(0, 1).flatten(1).double()
    s = torch.linalg.svdvals(keys)
    want = (s[8:].square().sum() / s.square().sum()).sqrt()
    assert float(want) <= float(cache.errors()[1]) * (1 + 1e-5) <= 1.002 * float(want)


def test_int8_really_shrinks_and_really_errs():
    plain, eight = (distance(bits=bits, rank=16) for bits in (None, 8))
    values = distance(value_bits=8, rank=16)
    exact = distance(bits=None, rank=32)[0]
    assert exact < 1e-5 < distance(bits=8, rank=32)[0] < 0.05
    assert exact < 1e-5 < distance(value_bits=8, rank=32)[0] < 0.05
    for name in ("factors", "landmarks"):
        assert eight[1].memory()[name] < 0.35 * plain[1].memory()[name]
    assert 0 < values[1].memory()["values"] < 0.35 * plain[1].memory()["values"]


def test_bytes_per_token_of_a_llama():
    """8 key heads of 128, bfloat16, rank 160: int8 factors with a scale (164), and int8 landmarks with scales, of
    eight heads for each eight tokens (132)."""
    options = dict(hidden_size=1024, num_attention_heads=8, num_key_value_heads=8, head_dim=128, num_hidden_layers=1,
                   initializer_range=0.02)  # fmt: skip
    model = small.model("llama", **options).to(torch.bfloat16)
    cache = fastpost.ShadowCache(model.config, budget=64)
    with torch.no_grad():
        model(small.tokens(1, 400), past_key_values=cache)
    memory = cache.memory()
    assert memory["per_token_layer"] == 160 + 4 + 128 + 4 <= 300
    assert memory["dense_per_token_layer"] == 4096
    counted = cache.rows.counts[0] * 8
    assert counted == 368 and memory["factors"] + memory["landmarks"] == counted * 296
    assert memory["values"] == counted * 2048 and memory["tail"] < 4096 * 150
    tensors = [t for layer in cache.shadow_layers for t in [*vars(layer).values(), *vars(layer.store).values()]
               if isinstance(t, torch.Tensor)]  # fmt: skip
    listed = sum(memory[n] for n in ("factors", "landmarks", "constant", "tail"))
    assert 0 <= sum(t.nbytes for t in tensors) - listed < 1024  # all that it has is in the account

# SPDX-License-Identifier: Apache-2.0
"""Rows of a ShadowCache come, go, fork, are reordered and rolled back, and are what a fresh cache would be."""

import copy
import gc

import pytest
import torch

import shadow_models as small

LOSSY = dict(rank=8, budget=32, outliers=2, local=1, bits=8, dense_below=0)  # so that chunks really come and go


@pytest.fixture
def model():
    return small.model()


@torch.no_grad()
def step(model, cache, ids, mask=None):
    """Logits [B, V] of one more token (or more) for each row."""
    before = cache.get_seq_length()
    mask = torch.ones(len(ids), before + ids.shape[1], dtype=torch.long) if mask is None else mask
    positions = (mask.cumsum(1) - 1)[:, before:]
    return model(ids, attention_mask=mask, past_key_values=cache, position_ids=positions).logits[:, -1]


def filled(model, ids, prompt=100, **options):
    """A cache with these tokens, those after the prompt one by one."""
    cache = small.cache(model, **(LOSSY | options))
    small.run(model, cache, ids, prompt=prompt)
    return cache


def same(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("generated", ["keep", "fold"])
@pytest.mark.parametrize("value_bits", [None, 8])
def test_reorder(model, generated, value_bits):
    """As beams are reordered: a row twice, another gone. Goes on long enough to fold into what rows shared."""
    ids, order = small.tokens(3, 106), [2, 0, 2]
    cache = filled(model, ids, generated=generated, value_bits=value_bits)
    cache.reorder_cache(torch.tensor(order))
    fresh = filled(model, ids[order], generated=generated, value_bits=value_bits)
    for i in range(75):
        more = small.tokens(3, 1, seed=10 + i)
        if i % 25 == 0:
            assert cache.rows.source == ([2, 0, 2] if cache.rows.counts == [11] * 3 else [0, 1, 2])
        same(step(model, cache, more), step(model, fresh, more))
    assert cache.rows.counts == fresh.rows.counts == ([11] * 3 if generated == "keep" else [19] * 3)


def test_reorder_twice_then_longer_rows(model):
    ids = small.tokens(2, 104)
    cache = filled(model, ids)
    for order in ([1, 1], [0, 1], [1, 0]):
        cache.reorder_cache(torch.tensor(order))
        same(step(model, cache, ids[[1, 1], :1]), step(model, filled(model, ids[[1, 1]]), ids[[1, 1], :1]))
        cache.crop(-1)


@pytest.mark.parametrize("generated", ["keep", "fold"])
@pytest.mark.parametrize("rows", [None, [1, 1, 0]])
def test_fork(model, generated, rows):
    """Both go on by themselves; what was compressed is there once until one of them folds."""
    ids = small.tokens(2, 104)
    cache = filled(model, ids, generated=generated)
    other = cache.fork(rows)
    store, rows = cache.shadow_layers[0].store, rows or [0, 1]
    assert other.shadow_layers[0].store is store and cache.get_seq_length() == other.get_seq_length() == 104
    fresh, other_fresh = (filled(model, ids[which], generated=generated) for which in ([0, 1], rows))
    for i in range(70):
        a, b = small.tokens(2, 1, seed=i), small.tokens(len(rows), 1, seed=100 + i)
        same(step(model, cache, a), step(model, fresh, a))
        same(step(model, other, b), step(model, other_fresh, b))
    assert (other.shadow_layers[0].store is cache.shadow_layers[0].store) == (generated == "keep")
    assert (generated == "fold") == (min(cache.rows.counts + other.rows.counts) > 11)


def test_forks_fold_apart_where_the_store_has_room(model):
    """Folding grows a store by a quarter, so the next fold would fit; but not where another cache reads."""
    ids, more = small.tokens(1, 655), small.tokens(2, 70)
    cache = filled(model, ids, prompt=580, generated="fold")
    store = cache.shadow_layers[0].store
    assert cache.rows.counts[0] + 8 <= store.chunks
    other = cache.fork()
    for i in range(70):
        for one, row in ((cache, 0), (other, 1)):
            step(model, one, more[row : row + 1, i : i + 1])
    assert store is cache.shadow_layers[0].store or store is other.shadow_layers[0].store
    for one, row in ((cache, 0), (other, 1)):
        fresh = filled(model, torch.cat([ids, more[row : row + 1]], 1), prompt=580, generated="fold")
        assert one.rows.counts == fresh.rows.counts
        same(step(model, one, ids[:, :1]), step(model, fresh, ids[:, :1]))


def test_one_prompt_for_many_rows(model):
    ids = small.tokens(1, 100)
    cache = filled(model, ids)
    one = cache.memory()
    cache.batch_repeat_interleave(4)
    four = cache.memory()
    assert (four["factors"], four["values"]) == (one["factors"], one["values"]) and four["tail"] == 4 * one["tail"]
    fresh = filled(model, ids.expand(4, -1))
    for i in range(6):
        more = small.tokens(4, 1, seed=i)
        same(step(model, cache, more), step(model, fresh, more))


@pytest.mark.parametrize("generated", ["keep", "fold"])
def test_equal_prompts_are_compressed_once(model, generated):
    """generate() repeats the prompt for beams and samples before the cache hears of it."""
    ids = small.tokens(2, 100)[[0, 0, 1, 1, 0]]
    mask = torch.ones_like(ids)
    mask[1, :9] = 0  # the same tokens, but not the same prompt
    cache, alone = (small.cache(model, **LOSSY, generated=generated) for _ in range(2))
    first = step(model, cache, ids, mask)
    one = step(model, alone, ids[2:3])
    assert cache.rows.source == [0, 1, 2, 2, 3] and torch.equal(first[2], first[3])
    assert cache.memory()["factors"] == 4 * alone.memory()["factors"]
    for i in range(70):  # each row goes its own way, over the fold
        more = small.tokens(5, 1, seed=i)
        mask = torch.cat([mask, torch.ones_like(more)], 1)
        got, one = step(model, cache, more, mask), step(model, alone, more[3:4])
        same(got[3:4], one)
    assert cache.rows.source == ([0, 1, 2, 2, 3] if generated == "keep" else [0, 1, 2, 3, 4])


def test_equal_keys_under_another_mask_are_another_prompt(model):
    """Positions that count padding: the keys of both rows are the same, but not what counts."""
    ids, mask = small.tokens(1, 100).expand(2, -1), torch.ones(2, 100, dtype=torch.long)
    mask[1, 80:] = 0
    cache = small.cache(model, **LOSSY)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    assert cache.rows.source == [0, 1] and cache.rows.counts == [11, 9]


def test_rows_that_end_leave_nothing(model):
    ids = small.tokens(3, 103)
    cache = filled(model, ids)
    before = cache.memory()
    cache.batch_select_indices(torch.tensor([False, True, False]))
    after = cache.memory()
    assert all(after[name] * 3 == before[name] for name in ("factors", "landmarks", "values", "tail"))
    same(step(model, cache, ids[1:2, :1]), step(model, filled(model, ids[1:2]), ids[1:2, :1]))
    cache.reset()
    assert not any(n for name, n in cache.memory().items() if "per_token" not in name)
    other = small.cache(model, **LOSSY)
    same(step(model, cache, ids[:2, :100]), step(model, other, ids[:2, :100]))  # other rows than before
    same(step(model, cache, ids[:2, 100:101]), step(model, other, ids[:2, 100:101]))


@pytest.mark.parametrize("generated", ["keep", "fold"])
def test_crop_in_the_tail_leaves_no_trace(model, generated):
    """A probe, then back: the continuation has the same bits."""
    ids = small.tokens(2, 130)
    probed, plain = (filled(model, ids[:, :104], generated=generated) for _ in range(2))
    for i in range(104, 130):
        step(model, probed, small.tokens(2, 1, seed=i))
        probed.crop(-1)
        if i == 110:
            step(model, probed, small.tokens(2, 5, seed=i))
            probed.crop(-5)
        assert torch.equal(step(model, probed, ids[:, i : i + 1]), step(model, plain, ids[:, i : i + 1]))
    assert probed.rows.counts == plain.rows.counts and probed.is_croppable


@pytest.mark.parametrize("left", [93, 88, 51, 16, 3])
def test_crop_into_the_compressed_part(model, left):
    """Lossless factors: as if the rest had never been there. The partial chunk is dense again."""
    ids = small.tokens(2, 120)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    options = dict(budget=512, rank=32, bits=None, outliers=3)
    cache = small.cache(model, **options)
    small.run(model, cache, ids[:, :112], prompt=110, mask=mask[:, :112])
    cache.crop(left - 112)
    n = left - 20
    assert cache.rows.length == [left, max(n, 0)] and cache.get_seq_length() == left
    assert cache.rows.counts == [min(12, left // 8), min(10, max(n, 0) // 8)]
    want = small.dense("llama", ids, prompt=110, mask=mask)
    with torch.no_grad():
        got = model(ids[:, left:110], attention_mask=mask[:, :110], past_key_values=cache,
                    position_ids=(mask.cumsum(1) - 1)[:, left:110].clamp(min=0)).logits  # fmt: skip
    for row in range(2):
        real = mask[row, left:110].bool()
        same(got[row][real], want[row, left:110][real])
    for i in range(110, 120):
        same(step(model, cache, ids[:, i : i + 1], mask[:, : i + 1]), want[:, i])


def test_crop_then_fold_over_what_was_there(model):
    """Chunk numbers come again with other tokens: neither slots nor kept chunks may remember the old ones."""
    ids = small.tokens(2, 260)
    options = dict(budget=512, rank=32, bits=None, outliers=2, generated="fold")
    cache = filled(model, ids[:, :190], **options)
    assert min(cache.rows.counts) > 12
    cache.crop(-110)
    fresh = filled(model, ids[:, :80], prompt=80, **options)
    assert max(cache.rows.counts) <= 10
    for i in range(80, 200):
        cache_logits = step(model, cache, ids[:, i + 60 : i + 61])
        fresh_logits = step(model, fresh, ids[:, i + 60 : i + 61])
    # Not the same outliers (of 100 tokens, or of 80), but both lossless.
    same(cache_logits, fresh_logits)


def test_crop_then_fold_at_once(model):
    """The same with nothing chosen in between: slots that hold a chunk must not pass for its successor."""
    ids = small.tokens(2, 300)
    options = dict(budget=512, rank=32, bits=None, outliers=2, generated="fold")
    cache = filled(model, ids[:, :110], **options)
    cache.crop(-70)
    with torch.no_grad():
        positions = torch.arange(40, 200)[None]
        model(ids[:, 140:], past_key_values=cache, position_ids=positions)
    assert cache.rows.counts == [24, 24]
    want = small.dense("llama", torch.cat([ids[:, :40], ids[:, 140:], ids[:, :1]], 1), prompt=200)
    same(step(model, cache, ids[:, :1]), want[:, -1])


def test_crop_to_nothing_and_wrong_signs(model):
    cache = filled(model, small.tokens(2, 104))
    cache.crop(0)
    assert cache.get_seq_length() == 104
    with pytest.raises(ValueError, match=r"\[ShadowCache\] crop: expected minus the number of tokens.*got 3"):
        cache.crop(3)
    cache.crop(-1000)
    assert cache.get_seq_length() == 0 and cache.shadow_layers[0].store is None


@pytest.mark.parametrize("generated", ["keep", "fold"])
def test_beam_search(model, generated):
    ids = small.tokens(2, 90)
    options = dict(num_beams=3, max_new_tokens=70, do_sample=False, attention_mask=torch.ones_like(ids))
    want = small.model().generate(ids, **options)
    cache = small.cache(model, generated=generated)
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), want)
    assert cache.rows.counts == ([10] * 6 if generated == "keep" else [18] * 6)


def test_speculation(model):
    """transformers' assisted decoding crops what was not accepted; prompt lookup and a smaller model."""
    ids = small.tokens(1, 30).repeat(1, 3)
    options = dict(max_new_tokens=80, do_sample=False, attention_mask=torch.ones_like(ids))
    want = small.model().generate(ids, **options)
    for more in ({"prompt_lookup_num_tokens": 6}, {"assistant_model": small.model("llama", num_hidden_layers=1)}):
        cache = small.cache(model, generated="fold")
        assert torch.equal(model.generate(ids, past_key_values=cache, **options, **more), want)
        assert cache.rows.counts[0] >= 18  # folded while speculating


def test_several_samples(model):
    ids = small.tokens(1, 90)
    cache = small.cache(model)
    got = model.generate(ids, past_key_values=cache, num_return_sequences=3, do_sample=True, max_new_tokens=5,
                         attention_mask=torch.ones_like(ids))  # fmt: skip
    assert got.shape == (3, 95) and cache.rows.length == [94] * 3


@pytest.mark.parametrize("generated", ["keep", "fold"])
def test_no_cap_on_generated_tokens(model, generated):
    ids = small.tokens(1, 500)
    cache = small.cache(model, generated=generated)
    got = small.run(model, cache, ids, prompt=60)
    same(got, small.dense("llama", ids, prompt=60))
    tail = cache.rows.length[0] - 8 * cache.rows.counts[0]
    assert tail == 500 - 6 * 8 if generated == "keep" else tail < 9 * 8
    if generated == "fold":  # 500 tokens, and the dense part is no larger than after 100
        assert cache.shadow_layers[0].tail_keys.shape[2] < 160


def test_what_the_prompt_cannot_say_stays_exact(model):
    """Folded keys that the prompt's directions miss: the worst chunks are kept, and others go on being chosen."""
    one = small.tokens(1, 1)
    ids = torch.cat([one.expand(1, 60), small.tokens(1, 200, seed=3)], 1)  # a prompt of one token over and over
    cache = filled(model, ids, prompt=60, rank=3, generated="fold", outliers=2, bits=None)
    layer = cache.shadow_layers[0]
    kept = layer.kept[0, :, 2:]
    assert (kept >= 6).all() and kept.unique().numel() > 1
    assert (layer.fold_error[0] > 2 * layer.store.error[0]).all()
    exact = layer._rebuild(0, 0, cache.rows.counts[0])[0]
    about = layer._rebuild(0, 0, cache.rows.counts[0], exact=False)[0]
    head = torch.arange(2)[:, None]
    assert (exact - about).flatten(2).norm(dim=2)[head, kept.long()].min() > 0.1
    # and among all folded chunks of a head these are the worst
    truth = small.cache(model, dense_below=10**6)
    with pytest.warns(UserWarning):
        small.run(model, truth, ids, prompt=60)
    keys = truth.shadow_layers[0].tail_keys[0, :, : 8 * cache.rows.counts[0]].unflatten(1, (-1, 8))
    error = ((about - keys).flatten(2).norm(dim=2) / keys.flatten(2).norm(dim=2))[:, 6:]
    count = cache.rows.counts[0]
    torch.testing.assert_close(layer.store.landmark[0, :, :count], keys.mean(2), rtol=1e-4, atol=1e-4)
    assert torch.equal(error.topk(2).indices.sort(1).values + 6, kept.long().sort(1).values)


def test_deepcopy_is_a_cache_of_its_own(model):
    """What transformers' guide does with the cache of a prefix that many prompts share."""
    ids = small.tokens(1, 104)
    cache = filled(model, ids, generated="fold")
    other = copy.deepcopy(cache)
    for i in range(70):
        step(model, other, small.tokens(1, 1, seed=i))
    fresh = filled(model, ids, generated="fold")
    assert torch.equal(step(model, cache, ids[:, :1]), step(model, fresh, ids[:, :1]))
    assert other.rows.counts[0] > cache.rows.counts[0]


def test_a_dropped_cache_is_gone(model):
    import weakref

    cache = filled(model, small.tokens(1, 104))
    fork = cache.fork()
    seen = weakref.ref(cache.shadow_layers[0].store)
    del cache
    gc.collect()
    assert seen() is not None
    del fork
    gc.collect()
    assert seen() is None

# SPDX-License-Identifier: Apache-2.0
"""Values in memory, in a file, in int8; a disk that is full; and what else is refused."""

import gc
import os
import resource

import pytest
import torch
import transformers as tf

import fastpost
import shadow_models as small
from fastpost.generate.shadow.values import ValueFile, ValueStore
from fastpost.hf import cached_attention


@pytest.mark.parametrize("generated", ["keep", "fold"])
@pytest.mark.parametrize("value_bits", [None, 8])
def test_a_value_file_changes_nothing(tmp_path, generated, value_bits):
    path, model, ids = tmp_path / "values", small.model(), small.tokens(2, 280)
    options = dict(generated=generated, value_bits=value_bits)
    cache = small.cache(model, value_file=path, **options)
    got = small.run(model, cache, ids, prompt=100)
    plain = small.cache(model, **options)
    assert torch.equal(got, small.run(model, plain, ids, prompt=100))
    there, here = cache.memory(), plain.memory()
    assert there["values"] == 0 and there["value_file"] == here["values"] > 0
    # what grows by a quarter at a time, and leaves its old place to others, is never more than a few times itself
    assert there["value_file"] <= path.stat().st_size <= 4 * there["value_file"] + 20 * 4096
    assert path.stat().st_blocks * 512 >= there["value_file"]  # claimed, not a hole that a full disk could betray
    size = path.stat().st_size
    cache.reset()
    gc.collect()
    small.run(model, cache, ids[:, :101], prompt=100)
    assert path.stat().st_size == size  # the space is used again
    del cache
    gc.collect()
    assert not path.exists()


def test_full_disk(tmp_path, monkeypatch):
    """Raised where space is claimed, by name and number, and the file is gone afterwards."""
    path, model = tmp_path / "values", small.model()
    cache = small.cache(model, value_file=path)

    def full(handle, offset, length):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"value_file: \S+values needs 24576 bytes more \(it has 0\).*disk has \d+ "):
        small.run(model, cache, small.tokens(2, 100), prompt=100)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"layers \[0, 1\] were left out|a forward was interrupted"):
        small.run(model, cache, small.tokens(2, 100), prompt=100)
    cache.reset()  # and then it works again
    small.run(model, cache, small.tokens(2, 102), prompt=100)
    assert path.stat().st_size == 2 * 24576 and cache.memory()["value_file"] == 2 * 22528  # whole pages


def test_a_file_that_may_not_grow(tmp_path):
    """No mock: the kernel refuses."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    file = ValueFile(tmp_path / "values")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, old[1]))
    try:
        with pytest.raises(OSError, match=r"needs 131072 bytes more \(it has 0\).*File too large"):
            file.tensor((1 << 15,), torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    whole = file.tensor((1 << 15,), torch.float32)
    assert whole.fill_(3).sum() == 3 << 15


def test_value_file_gives_space_back(tmp_path):
    file = ValueFile(tmp_path / "values")
    a, b = (file.tensor((1024,), torch.float32) for _ in range(2))
    a.fill_(1), b.fill_(2)
    half = a[:10]
    del a
    gc.collect()
    assert not file.spare and half.sum() == 10  # a view keeps its place
    del half
    gc.collect()
    c = file.tensor((1000,), torch.float32).fill_(5)
    assert file.size == 2 * 4096 and c.sum() == 5000 and (b == 2).all()


def test_value_store_in_int8():
    values = torch.randn(2, 6, 4, 16)
    for bits in (None, 8):
        store = ValueStore(3, 2, 9, 4, 16, values, bits, None)
        store.write(1, 2, values)
        error = (store.read(1, 2, 8) - values).norm() / values.norm()
        assert error == 0 if bits is None else 1e-4 < error < 0.01
        moved = store.arranged([1, 1], 8)
        assert torch.equal(moved.read(0, 2, 8), store.read(1, 2, 8)) and moved.bytes() < store.bytes()
        assert store.direct == (bits is None)


def refused(message, **options):
    with pytest.raises(ValueError, match=message):
        fastpost.ShadowCache(small.model().config, **options)


def test_options_that_are_refused(tmp_path):
    refused(r"\[ShadowCache\] rank: expected 1 to 32, the width of the keys of layer 0 \(2 key heads of 16\), got 160")
    refused(r"rank=None takes 5, ShadowKV's proportion", rank=33)
    refused("rank: expected 1 to 32", rank=0)
    refused(r"budget: expected a multiple of chunk \(8\), got 100", rank=8, budget=100)
    for name in ("budget", "chunk", "local", "outliers", "dense_below"):
        refused(rf"{name}: expected a whole number from [01] on, got -1", rank=8, **{name: -1})
    refused("bits: expected 8 or None, got 4", rank=8, bits=4)
    refused("value_bits: expected 8 or None, got 2", rank=8, value_bits=2)
    refused("generated: expected 'keep' or 'fold', got 'drop'", rank=8, generated="drop")
    (tmp_path / "there").write_text("mine")
    refused(r"value_file: expected a path where nothing is yet, got \S+there", rank=8, value_file=tmp_path / "there")
    assert (tmp_path / "there").read_text() == "mine"
    with pytest.raises(OSError, match=r"value_file: cannot make \S+none/x: No such file"):
        fastpost.ShadowCache(small.model().config, rank=8, value_file=tmp_path / "none" / "x")
    assert fastpost.ShadowCache(small.model().config, rank=None).shadow_layers[0].sizes.rank == 5


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (lambda: tf.GPT2Config(), "no rotary embedding"),
        (lambda: tf.Llama4TextConfig(), "no rotary embedding"),
        (lambda: tf.DeepseekV3Config(), "keys that are factors already"),
        (lambda: tf.DiffLlamaConfig(), "rearranged between cache and attention"),
    ],
)
def test_models_that_are_refused(config, why):
    with pytest.raises(ValueError, match=rf"expected a Llama-like model.*{why}.*Use transformers' DynamicCache"):
        fastpost.ShadowCache(config(), rank=None)


def test_a_model_of_sliding_windows_alone_is_refused():
    with pytest.raises(ValueError, match="expected layers of full attention, got only sliding_attention"):
        fastpost.ShadowCache(tf.MistralConfig(sliding_window=64))


def filled(model):
    cache = small.cache(model)
    small.run(model, cache, small.tokens(2, 101), prompt=100)
    return cache


def test_another_model_is_refused():
    first, ids = small.model(), small.tokens(2, 1)

    def call(model, cache):
        cached_attention.take_over(model.config)
        with torch.no_grad():
            return model(ids, past_key_values=cache)

    with pytest.raises(ValueError, match=r"layer 0: expected keys of 2 heads of 16.*got 4 of 16.*belongs to the model"):
        call(small.model(num_key_value_heads=4), filled(first))
    with pytest.raises(ValueError, match="layer 2: this cache was made for a model of 2 layers"):
        call(small.model(num_hidden_layers=3), filled(first))
    cache = filled(first)
    call(small.model(num_hidden_layers=1), cache)  # cannot be known yet
    with pytest.raises(ValueError, match=r"layers \[1\] were left out of the last forward"):
        call(small.model(num_hidden_layers=1), cache)
    with pytest.raises(ValueError, match=r"expected torch\.float32 on cpu, as before, got torch\.bfloat16"):
        call(small.model().to(torch.bfloat16), filled(first))
    cache = filled(first)
    other = small.model()
    with torch.no_grad():
        other(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="the model did not attend through this cache"):
            other(ids, past_key_values=cache)


def test_rows_and_masks_that_do_not_fit():
    model = small.model()
    with pytest.raises(ValueError, match=r"batch: expected 2 rows, which the cache holds, got 3"), torch.no_grad():
        model(small.tokens(3, 1), past_key_values=filled(model))
    with pytest.raises(ValueError, match=r"attention_mask: expected 102 columns \(101 in the cache and 1 new\), got 1"):
        with torch.no_grad():
            model(small.tokens(2, 1), past_key_values=filled(model), attention_mask=torch.ones(2, 1))
    with pytest.raises(ValueError, match="This op has no backward"):
        model(small.tokens(2, 1), past_key_values=filled(model))

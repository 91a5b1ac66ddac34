# SPDX-License-Identifier: Apache-2.0
"""Pages: who holds which, what is kept for others, what is given away first; and their tensors."""

import random

import pytest
import torch

import tiny
from fastpost.generate.handle import Handle
from fastpost.generate.paged_cache import LayerShape, PagedCache, UnsupportedModel, layer_shapes
from fastpost.generate.pages import ROOT, Pages
from fastpost.generate.request import Sampling
from fastpost.generate.schedule import Scheduler
from fastpost.generate.takeover import Takeover


def handle(prompt, order=0, **sampling):
    return Handle(None, order, 0, prompt, Sampling(**sampling), (order, 0), None)


def test_a_page_is_free_again_when_its_last_holder_drops_it():
    pages = Pages(3, 4)
    page = pages.take()
    pages.share([page])
    pages.drop([page])
    assert pages.used == 1
    pages.drop([page])
    assert pages.used == 0 and pages.available == 3


def test_recorded_pages_are_found_again_by_their_tokens_and_all_before_them():
    pages = Pages(8, 2)
    first, second = pages.take(), pages.take()
    node = pages.record(first, ROOT, (1, 2))
    pages.record(second, node, (3, 4))
    assert pages.find([1, 2, 3, 4, 5])[0] == [first, second]
    assert pages.find([1, 2, 3, 4])[0] == [first]  # one token is left to compute
    assert pages.find([3, 4, 5])[0] == []  # the same tokens, but not after (1, 2)
    pages.drop([first, second])
    assert pages.kept == 2 and pages.used == 0
    assert pages.find([1, 2, 3, 4, 5])[0] == [first, second]


def test_kept_pages_are_given_away_longest_unused_first_and_the_end_before_the_beginning():
    pages = Pages(4, 2)
    old = [pages.take(), pages.take()]
    pages.record(old[1], pages.record(old[0], ROOT, (1, 2)), (3, 4))
    new = [pages.take(), pages.take()]
    pages.record(new[1], pages.record(new[0], ROOT, (5, 6)), (7, 8))
    pages.drop(old)
    pages.drop(new)
    assert pages.take() == old[1]
    assert pages.find([1, 2, 3, 4, 5])[0] == old[:1]
    assert pages.take() == old[0]
    assert pages.find([1, 2, 3])[0] == []
    assert pages.find([5, 6, 7, 8, 9])[0] == new


def test_a_recorded_page_that_is_written_again_is_no_longer_found():
    pages = Pages(4, 2)
    page = pages.take()
    pages.record(page, ROOT, (1, 2))
    assert pages.writable(page)
    assert pages.find([1, 2, 3])[0] == []
    pages.share([page])
    assert not pages.writable(page)


def test_without_keep_nothing_is_found():
    pages = Pages(4, 2, keep=False)
    page = pages.take()
    pages.record(page, ROOT, (1, 2))
    pages.drop([page])
    assert pages.find([1, 2, 3]) == ([], []) and pages.kept == 0


def test_random_operations_lose_no_page():
    """Against a plain count of holders, for 3000 operations."""
    draw, pages, held = random.Random(0), Pages(12, 2), []
    for _ in range(3000):
        what = draw.random()
        if what < 0.4 and pages.available >= 2:
            mine, node = [pages.take(), pages.take()], ROOT
            for page in mine:
                node = pages.record(page, node, (draw.randrange(3), draw.randrange(3)))
            held.append(mine)
        elif what < 0.6:
            found = pages.find([draw.randrange(3) for _ in range(5)])[0]
            pages.share(found)
            held.append(found)
        elif held:
            pages.drop(held.pop(draw.randrange(len(held))))
        wanted = [sum(mine.count(page) for mine in held) for page in range(12)]
        assert pages.references == wanted
        assert pages.available == wanted.count(0)


def test_who_came_last_gives_way_and_who_came_first_goes_on():
    schedule = Scheduler(Pages(4, 2, keep=False), max_batch=4, prefill_tokens=100)
    first, second = handle([1, 2, 3], 0), handle([4, 5, 6], 1)
    schedule.add(second)
    schedule.add(first)
    parts, _ = schedule.plan()
    assert [(p.handle, p.count) for p in parts] == [(first, 3), (second, 3)]
    for part in parts:
        part.handle.cached += part.count
        for token in (7, 8):
            part.handle.append(token)
    parts, _ = schedule.plan()  # each needs a third page, and none is left
    assert [(p.handle, p.count) for p in parts] == [(first, 2)]
    assert schedule.waiting == [second] and second.pages == [] and schedule.preempted == 1


def test_prompts_are_cut_to_the_budget_and_running_sequences_go_on():
    schedule = Scheduler(Pages(20, 2), max_batch=3, prefill_tokens=5)
    one, two = handle([1], 0), handle(list(range(12)), 1)
    schedule.add(one)
    schedule.add(two)
    counts = []
    for _ in range(4):
        parts, _ = schedule.plan()
        counts.append([p.count for p in parts])
        for part in parts:
            part.handle.cached += part.count
            if part.handle.cached == len(part.handle):
                part.handle.append(9)
    assert counts == [[1, 5], [1, 5], [1, 2], [1, 1]]


def test_a_shared_page_is_copied_before_it_is_written():
    schedule = Scheduler(Pages(6, 4), max_batch=4, prefill_tokens=100)
    one = handle([1, 2, 3], 0)
    schedule.add(one)
    schedule.plan()
    one.cached = 3
    one.append(4)
    two = handle([1, 2, 3], 1)
    schedule.share(one, two)
    two.append(5)
    schedule.add(two)
    (before,) = one.pages
    parts, copies = schedule.plan()
    assert len(parts) == 2
    assert copies == [(before, one.pages[0])]  # the second may then write into the page itself
    assert two.pages == [before]


def test_copying_a_page_copies_it_in_every_layer():
    shapes = [
        LayerShape(2, 4, torch.float32, torch.device("cpu")),
        LayerShape(1, 8, torch.float32, torch.device("cpu")),
    ]
    cache = PagedCache(shapes, pages=3, page=2)
    for store in cache.stores:
        store.normal_()
    before = [layer.keys[:, :, 1].clone() for layer in cache.layers]
    cache.copy([(1, 2)])
    for layer, keys, shape in zip(cache.layers, before, shapes, strict=True):
        assert layer.keys.shape == (1, shape.heads, 3, 2, shape.dim)
        assert torch.equal(layer.keys[:, :, 2], keys)
        assert torch.equal(layer.values[:, :, 2], layer.values[:, :, 1])


@pytest.mark.parametrize("kind", ["llama", "gemma2", "jetmoe"])
def test_what_a_layer_keeps_is_seen_from_the_model(kind):
    model = tiny.model(kind)
    hold = Takeover(model)
    hold.apply()
    with torch.no_grad():
        shapes = layer_shapes(model)
    hold.undo()
    assert [(s.heads, s.dim) for s in shapes] == [(2, 8)] * 2


def test_a_model_of_other_layers_is_refused():
    model = tiny.model()
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(UnsupportedModel, match="LlamaForCausalLM with linear_attention"):
        layer_shapes(model)


def test_a_model_that_does_not_attend_through_the_cache_is_refused():
    with torch.no_grad(), pytest.raises(UnsupportedModel, match="does not attend through its cache in layer 0"):
        layer_shapes(tiny.model())  # not taken over

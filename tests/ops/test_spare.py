# SPDX-License-Identifier: Apache-2.0
"""What goes from a forward to its backward lies in memory that is used again, and never in two tensors at once."""

import gc
import threading

import torch

import fastpost
from fastpost.ops import _spare

MIB = 1 << 20


def test_memory_comes_back_when_the_last_tensor_on_it_ends():
    _spare._spare.clear()
    first = _spare.empty(8 * MIB)
    view, place = first.view(torch.float32)[5:], first.data_ptr()
    del first
    assert _spare.empty(8 * MIB).data_ptr() != place  # the view still lives
    _spare._spare.clear()
    view.fill_(1)
    del view
    assert _spare.empty(8 * MIB).data_ptr() == place


def test_only_what_fits_is_taken():
    for nbytes, taken in ((8 * MIB, True), (4 * MIB, True), (9 * MIB, False), (3 * MIB, False)):  # 3: wastes over half
        _spare._spare[:] = [torch.empty(8 * MIB, dtype=torch.uint8)]
        block = _spare._spare[0]
        t = _spare.empty(nbytes)
        assert t.nbytes == nbytes and (t.data_ptr() == block.data_ptr()) == taken, nbytes


def test_the_largest_free_block_is_held_and_no_other():
    _spare._spare.clear()
    blocks = [_spare.empty(n * MIB) for n in (2, 5, 3)]
    largest = blocks[1].data_ptr()
    del blocks
    assert [len(b) for b in _spare._spare] == [5 * MIB] and _spare._spare[0].data_ptr() == largest


def test_two_steps_share_memory_and_two_open_graphs_do_not():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(64, 32, generator=g), torch.randn(5000, 32, generator=g)
    target = torch.randint(0, 5000, (64,), generator=g)

    def gradient(*scales):
        leaves = [(scale * hidden).requires_grad_() for scale in scales]
        outs = [
            fastpost.linear_logprob(h, weight, target, batch_invariant=True) for h in leaves
        ]  # both graphs are open here
        return [torch.autograd.grad(out.sum(), h)[0] for out, h in zip(outs, leaves)]

    alone = [gradient(1.0)[0], gradient(0.5)[0]]
    for a, b in zip(gradient(1.0, 0.5), alone):
        assert torch.equal(a, b)
    gc.collect()
    assert len(_spare._spare) == 1


def test_threads_never_get_the_same_block():
    _spare._spare.clear()
    wrong = []

    def work(value):
        for _ in range(200):
            t = _spare.empty(MIB)
            t.fill_(value)
            if not bool((t == value).all()):
                wrong.append(value)
            del t

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong

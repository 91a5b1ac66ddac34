# SPDX-License-Identifier: Apache-2.0
"""fork, rollback, extend, probe, prune, cancel: caches under sequences that run."""

import random

import pytest
import torch

import tiny
from fastpost.generate import Engine, Request, Sampling
from prompts import greedy, unequal

PROMPTS = unequal(6)
DRAWN = Sampling(max_new_tokens=24, temperature=0.9, seed=3, ignore_eos=True)


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture
def engine(model):
    with Engine(model, tiny.tokenizer(), page=4, pages=300) as engine:
        yield engine
        while engine._schedule:
            engine.step()
        assert engine.pages.used == 0


def finish(engine, *handles):
    while any(h.finish_reason is None for h in handles):
        engine.step()


def steps(engine, n):
    for _ in range(n):
        engine.step()


def submit(engine, sampling, prompts=PROMPTS):
    return [engine.submit(Request(p, sampling))[0] for p in prompts]


@pytest.mark.parametrize("after", [1, 2, 3, 4, 9])
def test_a_fork_goes_on_like_its_origin_on_the_same_pages(engine, model, after):
    """At every place in a page; both then write, so the page they share is copied."""
    handles = submit(engine, Sampling(max_new_tokens=20, ignore_eos=True))
    steps(engine, after)
    used = engine.pages.used
    forks = [engine.fork(h) for h in handles]
    assert engine.pages.used == used
    assert [f.token_ids for f in forks] == [h.token_ids for h in handles]
    finish(engine, *handles, *forks)
    model.generation_config.eos_token_id = None
    want = [greedy(model, p, 20) for p in PROMPTS]
    model.generation_config.eos_token_id = 2
    assert [h.token_ids for h in handles] == want
    assert [f.token_ids for f in forks] == want
    assert [(f.id, f.index) for f in forks] == [(h.id, 1) for h in handles]


def test_a_fork_with_its_own_sampling_is_a_fresh_run_from_there(engine):
    (origin,) = submit(engine, DRAWN, PROMPTS[:1])
    steps(engine, 6)
    begun = list(origin.token_ids)
    forks = [engine.fork(origin, Sampling(max_new_tokens=15, temperature=0.7, seed=s, ignore_eos=True)) for s in (0, 1)]
    greedy_fork = engine.fork(forks[0], Sampling(max_new_tokens=15, ignore_eos=True))
    finish(engine, origin, greedy_fork, *forks)
    assert all(f.token_ids[:6] == begun and len(f.token_ids) == 15 for f in (*forks, greedy_fork))
    assert len({tuple(f.token_ids) for f in (origin, greedy_fork, *forks)}) == 4
    assert {f.index for f in (*forks, greedy_fork)} == {1, 2, 3}
    ((fresh,),) = engine.generate([Request(PROMPTS[0] + begun, Sampling(max_new_tokens=9, ignore_eos=True))])
    assert greedy_fork.token_ids[6:] == fresh.token_ids


def test_a_fork_has_an_index_of_its_own_whatever_the_sampling_says_of_n(engine):
    handles = engine.submit(Request(PROMPTS[0], Sampling(max_new_tokens=9, temperature=1.0, n=3, ignore_eos=True)))
    steps(engine, 2)
    engine.rollback(handles[0], 1, DRAWN)
    forks = [engine.fork(handles[0]), engine.fork(handles[2])]
    forks.append(engine.fork(forks[0]))
    assert [f.index for f in forks] == [3, 4, 5]


def test_operations_in_a_logits_callback(engine):
    """A fork or a probe there begins before the token that is being chosen; what would change the sequence is
    refused."""
    found, refused = [], []

    def operate(ids, logits):
        if len(ids) == len(PROMPTS[0]) + 4 and not found:
            found.extend([engine.fork(handle, Sampling(max_new_tokens=12, ignore_eos=True)), engine.probe(handle, [])])
            for operation in (lambda: engine.rollback(handle, 1), lambda: engine.extend(handle, [5])):
                with pytest.raises(ValueError, match="got one whose next token is being chosen"):
                    operation()
                refused.append(operation)

    s = Sampling(max_new_tokens=12, ignore_eos=True, logprobs=0, logits_callback=operate)
    (handle,) = engine.submit(Request(PROMPTS[0], s))
    finish(engine, handle)
    fork, probed = found
    finish(engine, fork)
    assert fork.token_ids == handle.token_ids and len(refused) == 2
    assert probed.argmax() == handle.token_ids[4]
    assert probed.max().item() == pytest.approx(handle.logprobs[4], abs=1e-5)


def test_generate_queues_all_requests_or_none(engine):
    with pytest.raises(ValueError, match="prompt: expected at least one token id"):
        engine.generate([Request([5]), Request([])])
    assert not engine._schedule


def test_a_finished_sequence_may_be_forked_to_go_on(engine, model):
    (handle,) = submit(engine, Sampling(max_new_tokens=5), PROMPTS[1:2])
    finish(engine, handle)
    with pytest.raises(ValueError, match="max_new_tokens: expected more than the 5 tokens that the answer has, got 5"):
        engine.fork(handle)
    fork = engine.fork(handle, Sampling(max_new_tokens=12))
    finish(engine, fork)
    assert fork.token_ids == greedy(model, PROMPTS[1], 12) and len(handle.token_ids) == 5


@pytest.mark.parametrize("back", [0, 1, 3, 4, 5, 10])
def test_rolling_back_and_drawing_again_gives_the_same(engine, back):
    want = [c.token_ids for (c,) in engine.generate([Request(p, DRAWN, id=i) for i, p in enumerate(PROMPTS)])]
    handles = [engine.submit(Request(p, DRAWN, id=i))[0] for i, p in enumerate(PROMPTS)]
    steps(engine, 10)
    for h in handles:
        engine.rollback(h, back)
        assert len(h.token_ids) == 10 - back and len(h.pages) == -(-h.cached // 4)
    finish(engine, *handles)
    assert [h.token_ids for h in handles] == want


def test_rolling_back_with_another_seed_is_another_answer_that_a_fork_does_not_feel(engine):
    (handle,) = submit(engine, DRAWN, PROMPTS[:1])
    steps(engine, 10)
    begun = list(handle.token_ids)
    fork = engine.fork(handle, Sampling(max_new_tokens=24, ignore_eos=True))
    engine.rollback(handle, 6, Sampling(max_new_tokens=24, temperature=0.9, seed=4, ignore_eos=True))
    finish(engine, handle, fork)
    assert handle.token_ids[:4] == begun[:4] and handle.token_ids[4:10] != begun[4:]
    ((fresh,),) = engine.generate([Request(PROMPTS[0] + begun, Sampling(max_new_tokens=14, ignore_eos=True))])
    assert fork.token_ids == begun + fresh.token_ids


def test_rolled_back_tokens_leave_text_logprobs_and_penalties(engine):
    s = Sampling(max_new_tokens=12, temperature=0.9, repetition_penalty=1.5, logprobs=2, stop="zzz", ignore_eos=True)
    ((want,),) = engine.generate([Request(PROMPTS[2], s, id=0)])
    heard = []
    (handle,) = engine.submit(Request(PROMPTS[2], s, id=0, stream=heard.append))
    steps(engine, 8)
    engine.rollback(handle, 5)
    assert len(handle.logprobs) == len(handle.top_logprobs) == 3
    finish(engine, handle)
    got = handle.completion()
    assert (got.token_ids, got.text) == (want.token_ids, want.text)
    assert got.logprobs == pytest.approx(want.logprobs, abs=1e-5)


def test_extending_is_as_if_the_tokens_had_been_sampled(engine, model):
    (handle,) = submit(engine, Sampling(max_new_tokens=20, logprobs=0), PROMPTS[3:4])
    steps(engine, 3)
    begun = list(handle.token_ids)
    engine.extend(handle, [50, 60, 70, 80, 90])
    finish(engine, handle)
    assert handle.token_ids == begun + [50, 60, 70, 80, 90] + greedy(
        model, [*PROMPTS[3], *begun, 50, 60, 70, 80, 90], 12
    )
    assert handle.completion().logprobs[3:8] == [None] * 5


def recorded():
    """(callback, what it saw): the bits of every row of logits."""
    seen = []
    return (lambda ids, row: seen.append((tuple(ids), row.clone()))), seen


def test_a_probe_leaves_the_continuation_bit_for_bit(model):
    """Logits of every step, with probes of several lengths in between (over the page's end too) and without; probed
    sequences are in one batch with others."""
    runs = []
    for probing in (False, True):
        callback, seen = recorded()
        s = Sampling(max_new_tokens=16, temperature=1.0, logits_callback=callback, ignore_eos=True)
        with Engine(model, tiny.tokenizer(), page=4, pages=100, prefill_tokens=16) as engine:
            handles = [engine.submit(Request(p, s))[0] for p in PROMPTS]
            step = 0
            while engine._schedule:
                engine.step()
                step += 1
                if probing:
                    used = engine.pages.used
                    for h in handles[step % 3 :: 2]:
                        engine.probe(h, PROMPTS[step % 6][: 1 + step % 7])
                    assert engine.pages.used == used
        runs.append(seen)
    assert len(runs[0]) == 6 * 16
    for (ids, logits), (ids_probed, logits_probed) in zip(*runs, strict=True):
        assert ids == ids_probed and torch.equal(logits, logits_probed)


@pytest.mark.parametrize("state", ["waiting", "in its prompt", "running", "finished"])
@pytest.mark.parametrize("keep", [True, False])
def test_a_probe_is_the_models_next_token(model, state, keep):
    prompt, probe = PROMPTS[0] * 4, [40, 41, 42]
    with Engine(model, None, page=4, pages=200, prefill_tokens=32, reuse_prefix=keep) as engine:
        (handle,) = engine.submit(Request(prompt, Sampling(max_new_tokens=7, ignore_eos=True)))
        pieces = -(-len(prompt) // 32)
        steps(engine, {"waiting": 0, "in its prompt": 2, "running": pieces + 3, "finished": pieces + 6}[state])
        assert (handle.finish_reason is not None) == (state == "finished")
        got = engine.probe(handle, probe)
        assert torch.equal(engine.probe([handle], probe, [5, 9])[0], got[[5, 9]])
    with torch.no_grad():
        want = model(torch.tensor([prompt + handle.token_ids + probe])).logits[0, -1].log_softmax(-1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_probes_of_many_are_those_of_each(engine):
    handles = submit(engine, DRAWN)
    steps(engine, 5)
    together = engine.probe(handles, [33, 34])
    assert together.shape == (6, 320)
    for h, row in zip(handles, together, strict=True):
        torch.testing.assert_close(row, engine.probe(h, [33, 34]), rtol=1e-5, atol=1e-5)


def test_probes_go_one_after_the_other_when_pages_are_few_and_say_when_there_are_none(model):
    with Engine(model, tiny.tokenizer(), page=4, pages=8, reuse_prefix=False) as engine:
        handles = [engine.submit(Request([7, 8, 9], Sampling(max_new_tokens=10, ignore_eos=True)))[0] for _ in range(3)]
        steps(engine, 4)  # 6 of 8 pages
        assert engine.pages.available == 2
        got = engine.probe(handles, [33])
        assert torch.allclose(got[0], got[2], atol=1e-5) and engine.pages.available == 2
        with pytest.raises(ValueError, match=r"\[Engine\] probe: expected free pages for what 18 tokens"):
            engine.probe(handles[0], [33] * 11)
        assert engine.pages.available == 2
        with pytest.raises(ValueError, match=r"probe: expected token ids in \[0, 320\)"):
            engine.probe(handles[0], [320])
        with pytest.raises(ValueError, match="probe: expected at most 512 tokens, got 607"):
            engine.probe(handles[0], [33] * 600)


def test_pruning_frees_pages_at_once(engine):
    handles = engine.submit(Request(PROMPTS[0], Sampling(max_new_tokens=20, temperature=1.0, n=6, ignore_eos=True)))
    steps(engine, 9)
    before = engine.pages.used
    ended = engine.prune(handles, keep=handles[1:3])
    assert [c.index for c in ended] == [0, 3, 4, 5] and all(c.finish_reason == "cancelled" for c in ended)
    assert all(len(c.token_ids) == 9 for c in ended)
    assert engine.pages.used <= before - 4 * 2
    told = engine.step()
    assert sorted(c.index for c in told) == [0, 3, 4, 5]
    finish(engine, *handles)
    assert [len(h.token_ids) for h in handles] == [9, 20, 20, 9, 9, 9]


@pytest.mark.parametrize("when", [0, 1])
@pytest.mark.parametrize("which", [0, 1, 3])
def test_cancelling_one_answer_leaves_the_others(model, which, when):
    """Before its prompt is computed, after a piece of it; whether it computes it or waits for it."""
    s = Sampling(max_new_tokens=6, temperature=1.0, n=4, ignore_eos=True)
    with Engine(model, tiny.tokenizer(), page=4, prefill_tokens=8) as engine:
        (want,) = engine.generate([Request(PROMPTS[0], s, id=0)])
    with Engine(model, tiny.tokenizer(), page=4, prefill_tokens=8) as engine:
        handles = engine.submit(Request(PROMPTS[0], s, id=0))
        steps(engine, when)
        assert engine.cancel(handles[which]).finish_reason == "cancelled"
        engine.cancel(handles[which])  # changes nothing
        ended = list(engine.run([]))
        assert engine.pages.used == 0
    assert sorted(c.index for c in ended) == [0, 1, 2, 3]
    for h, c in zip(handles, want, strict=True):
        assert h.token_ids == ([] if h.index == which else c.token_ids)


def test_ended_sequences_are_not_rolled_back_nor_extended(engine):
    (handle,) = submit(engine, Sampling(max_new_tokens=2, ignore_eos=True), PROMPTS[:1])
    finish(engine, handle)
    for operation in (lambda: engine.rollback(handle, 1), lambda: engine.extend(handle, [5])):
        with pytest.raises(ValueError, match=r"expected a sequence that goes on, got one that ended \(length\)"):
            operation()
    (handle,) = submit(engine, Sampling(max_new_tokens=4, ignore_eos=True), PROMPTS[:1])
    steps(engine, 2)
    with pytest.raises(ValueError, match="rollback: expected 0 to 2 tokens, got 3"):
        engine.rollback(handle, 3)
    with pytest.raises(ValueError, match="max_new_tokens: expected more than the 4 tokens"):
        engine.extend(handle, [5, 6])
    with pytest.raises(ValueError, match=r"extend: expected token ids in \[0, 320\), got 320"):
        engine.extend(handle, [320])


def test_ten_thousand_requests_with_random_ends_leak_nothing():
    """Cancels, forks, rollbacks and probes at random, on few pages."""
    model = tiny.model(layers=1)
    draw = random.Random(0)
    with Engine(model, None, page=4, pages=24, max_batch=24, prefill_tokens=64) as engine:
        alive, ended, made, submitted = {}, 0, 0, 0
        while submitted < 10_000 or engine._schedule:
            while submitted < 10_000 and engine.waiting < 30:
                prompt = [draw.randrange(20) for _ in range(draw.randint(1, 12))]
                s = Sampling(max_new_tokens=draw.randint(1, 8), temperature=1.0, n=draw.choice((1, 1, 1, 2, 3)))
                handles = engine.submit(Request(prompt, s, id=submitted))
                alive |= {id(h): h for h in handles}
                submitted, made = submitted + 1, made + len(handles)
            for h in draw.sample(list(alive.values()), min(len(alive), 4)):
                engine.cancel(h)
            running = [h for h in engine._schedule.running if h.token_ids]
            if running and draw.random() < 0.3:
                h = draw.choice(running)
                what = draw.random()
                if what < 0.4:
                    fork = engine.fork(h)
                    alive[id(fork)] = fork
                    made += 1
                elif what < 0.7:
                    engine.rollback(h, draw.randint(0, len(h.token_ids)))
                elif engine.pages.available > 6:
                    engine.probe(h, [3, 4])
            ended += len(engine.step())
            alive = {key: h for key, h in alive.items() if h.finish_reason is None}
        stats = engine.stats()
        assert ended == made == stats["finished"] + stats["cancelled"]
        assert stats["cancelled"] > 1000 and stats["preempted"] > 100 and stats["finished"] > 2000
        assert engine.pages.used == 0 and set(engine.pages.references) == {0}
        assert engine.pages.available == 24 and not alive

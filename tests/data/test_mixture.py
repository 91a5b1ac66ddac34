# SPDX-License-Identifier: Apache-2.0
from collections import Counter

import numpy as np
import pytest

import tiny
from fastpost.data.loader import load_dataset
from fastpost.data.mixture import Mixture, feedback_factors, updated_ratios
from fastpost.train.config import Config, DataConfig
from fastpost.train.plan import Plan
from fastpost.train.sources import Source


def documents(n: int, length, letter: str) -> list[dict]:
    """n raw documents; document i has length(i) letters, each of them one token, and an EOS."""
    return [{"text": letter * length(i)} for i in range(n)]


def uneven(n: int) -> list[tuple[list[dict], dict]]:
    """Three sources 15 : 1 : 4 of n documents each, of 4 to 43 tokens."""
    return [(documents(n, lambda i, k=k: 3 + i * k % 40, "x"), {"ratio": r}) for k, r in ((3, 15), (7, 1), (11, 4))]


@pytest.fixture
def load(tmp_path):
    def load(*sources: tuple[list[dict], dict], **options):
        listed = []
        for k, (rows, keys) in enumerate(sources):
            listed.append(Source(str(tiny.write_jsonl(tmp_path / f"{k}.jsonl", rows)), **keys))
        return load_dataset(DataConfig(train=listed, **options), tiny.tokenizer())

    return load


def shares(data, indices) -> list[int]:
    """Tokens of each source among `indices`."""
    return [int(sum(data.examples.tokens[i] for i in indices if p.start <= i < p.stop)) for p in data.parts]


def of(data, k: int, indices) -> list[int]:
    """The rows of source k among `indices`, in order, counted from its first."""
    part = data.parts[k]
    return [int(i) - part.start for i in indices if part.start <= i < part.stop]


def test_stability_gap_shares_are_exact_to_a_block(load):
    """METHODS 14: 18 % of the base model's own mixture, 82 % of the new domain, in packed blocks."""
    data = load(
        (documents(300, lambda i: 10 + i % 23, "a"), {"ratio": 18}),
        (documents(900, lambda i: 5 + i % 31, "b"), {"ratio": 82}),
        pack="blocks", max_length=16,
    )  # fmt: skip
    for tokens in (1600, 5000, 7777):
        mixture = Mixture(data, seed=0, tokens=tokens)
        for epoch in range(3):
            got = shares(data, mixture.epoch(epoch))
            assert abs(got[0] - 0.18 * tokens) <= 8 and abs(got[1] - 0.82 * tokens) <= 8  # half a block
    assert shares(data, Mixture(data, seed=0, tokens=1600).epoch(0)) == [288, 1312]  # 18 and 82 blocks


def test_me_llama_shares(load):
    """METHODS 17: biomedical : clinical : general = 15 : 1 : 4, in rows of unequal length."""
    data = load(*uneven(400))
    assert Mixture(data, seed=0).ratios == [0.75, 0.05, 0.20]
    for epoch in range(3):
        got = shares(data, Mixture(data, seed=1, tokens=4000).epoch(epoch))
        assert np.abs(np.array(got) - [3000, 200, 800]).max() <= 22  # half of the longest row


def test_epochs_as_stages(load):
    """JetMoE's richer mixture in the decay: ratios and tokens of each epoch, the last of which hold from there on."""
    data = load(
        (documents(200, lambda i: 7, "a"), {"ratio": [3, 1]}),
        (documents(200, lambda i: 7, "b"), {"ratio": [1, 2, 0]}),
        (documents(50, lambda i: 7, "c"), {"ratio": [0, 1], "repeat": True}),
    )
    mixture = Mixture(data, seed=0, tokens=[800, 320])
    assert [shares(data, mixture.epoch(e)) for e in range(4)] == [
        [600, 200, 0], [80, 160, 80], [160, 0, 160], [160, 0, 160],
    ]  # fmt: skip
    assert mixture.ratios == [0.75, 0.25, 0] and mixture.tokens == 800
    assert mixture.shares(1) == [0.25, 0.5, 0.25] and mixture.shares(9) == [0.5, 0, 0.5]
    lines = mixture.lines()
    assert lines[0] == "mix    800 tokens in epoch 1, ratios 3:1:0, draw dynamic"
    assert lines[8].startswith("mix    320 tokens in epoch 3 on, ratios 1:0:1") and len(lines) == 12
    assert "c.jsonl" not in lines[3] and lines[3].endswith("is 0.00% = 0 tokens (0.0% of it), shuffled")
    # An epoch that is like the first one of a mixture without lists draws what that draws.
    plain = Mixture(load(*[(documents(200, lambda i: 7, x), {"ratio": r}) for x, r in (("a", 3), ("b", 1))]), seed=0,
                    tokens=800)  # fmt: skip
    assert plain.epoch(0).tolist() == mixture.epoch(0).tolist()
    # Without a number of tokens an epoch ends where a source runs out: 1600 of a at 3/4, of b at 1/2, of a at 1/2.
    auto = Mixture(data, seed=0)
    assert [auto.size(epoch) for epoch in range(3)] == [2133, 3200, 3200]


def test_a_stage_that_wants_too_much_is_named(load):
    data = load(
        (documents(100, lambda i: 7, "a"), {"ratio": [1, 3]}), (documents(900, lambda i: 7, "b"), {"ratio": [3, 1]})
    )
    with pytest.raises(ValueError) as error:
        Mixture(data, seed=0, tokens=2000)
    assert str(error.value).startswith("[data] data.train[0] ")
    assert "runs out: epoch 2 of 2000 tokens wants 1500 of it (75.00%), and it has 800." in str(error.value)


def test_a_plan_has_the_steps_of_each_stage(load):
    data = load((documents(200, lambda i: 7, "a"), {"ratio": [3, 1]}), (documents(200, lambda i: 7, "b"), {}))
    cfg = Config()
    cfg.train.epochs, cfg.train.batch_size, cfg.data.epoch_tokens = 3, 10, [1600, 320, 80]
    plan = Plan(cfg, data)
    assert plan.steps == 20 + 4 + 1
    tokens = [sum(plan.tokens(step) for step in part) for part in (range(20), range(20, 24), range(24, 25))]
    assert tokens == [1600, 320, 80]
    assert [plan.epoch(finished) for finished in (20, 22, 24, 25)] == [1, 1.5, 2, 3]


def test_any_stretch_of_an_epoch_holds_the_mixture(load):
    data = load(*uneven(500))
    rows = Mixture(data, seed=0, tokens=5000).epoch(0)
    for n in range(1, len(rows)):
        got = np.array(shares(data, rows[:n]))
        assert np.abs(got - got.sum() * np.array([0.75, 0.05, 0.20])).max() <= 3 * 43


def test_draws_differ_when_dynamic_and_are_equal_when_fixed(load):
    """METHODS 14: rate-fixed-data-dynamic and data-fixed."""
    data = load((documents(200, lambda i: 4, "a"), {"ratio": 1}), (documents(50, lambda i: 4, "b"), {"ratio": 1}))
    dynamic, fixed = (Mixture(data, seed=0, tokens=200, fixed=f) for f in (False, True))
    for k in (0, 1):
        draws = [frozenset(of(data, k, dynamic.epoch(e))) for e in range(4)]
        assert len(set(draws)) == 4 and all(len(d) == 20 for d in draws)
        same = [of(data, k, fixed.epoch(e)) for e in range(4)]
        assert len({frozenset(s) for s in same}) == 1 and len(set(map(tuple, same))) == 4  # in a new order each time
    assert set(of(data, 0, dynamic.epoch(0))) != set(of(data, 0, Mixture(data, seed=1, tokens=200).epoch(0)))


@pytest.mark.parametrize("fixed", [False, True])
def test_a_curriculum_keeps_its_order(load, fixed):
    """METHODS 15: the order within each source is monotone in perplexity, here in the row number."""
    data = load(
        (documents(100, lambda i: 4 + i % 9, "a"), {"ratio": 1, "shuffle": False}),
        (documents(100, lambda i: 4, "b"), {"ratio": 1}),
    )
    mixture = Mixture(data, seed=0, tokens=600, fixed=fixed)
    for epoch in range(3):
        rows = of(data, 0, mixture.epoch(epoch))
        assert rows == sorted(set(rows)) and len(rows) > 30
        assert max(rows) - min(rows) > 80  # from the whole range, not its beginning only
    assert of(data, 1, mixture.epoch(0)) != sorted(of(data, 1, mixture.epoch(0)))


def test_an_exhausted_source_repeats_or_is_an_error(load):
    rows = (documents(100, lambda i: 4, "a"), documents(10, lambda i: 4, "b"))
    data = load((rows[0], {"ratio": 4}), (rows[1], {"ratio": 1, "repeat": True}))
    mixture = Mixture(data, seed=0, tokens=625)  # 500 and 125 tokens: the second has 50
    got = of(data, 1, mixture.epoch(0))
    assert len(got) == 25 and sorted(Counter(got).values()) == [2] * 5 + [3] * 5
    assert sorted(got[:10]) == sorted(got[10:20]) == list(range(10))  # once through before again
    assert "read 2.50 times" in mixture.lines()[2] and "100.0% of it" in mixture.lines()[1]
    ordered = load((rows[0], {"ratio": 4}), (rows[1], {"ratio": 1, "repeat": True, "shuffle": False}))
    got = of(ordered, 1, Mixture(ordered, seed=0, tokens=625).epoch(2))
    assert got[:20] == [*range(10)] * 2 and got[20:] == sorted(got[20:])

    strict = load((rows[0], {"ratio": 4}), (rows[1], {"ratio": 1}))
    with pytest.raises(
        ValueError,
        match=r"\[data\] data.train\[1\] .*1.jsonl: runs out: an epoch of 625 tokens wants 125 of it \(20.00%\), and "
        r"it has 50. Set its repeat to true, or data.epoch_tokens to at most 250",
    ):
        Mixture(strict, seed=0, tokens=625)
    assert Mixture(strict, seed=0, tokens=250).epoch(0).size == 50


def test_without_a_budget_an_epoch_ends_where_a_source_does(load):
    rows = (documents(100, lambda i: 4, "a"), documents(10, lambda i: 4, "b"))
    strict = Mixture(load((rows[0], {"ratio": 4}), (rows[1], {"ratio": 1})), seed=0)
    assert strict.tokens == 250 and len(strict.epoch(0)) == 50
    loose = Mixture(load((rows[0], {"ratio": 4}), (rows[1], {"ratio": 1, "repeat": True})), seed=0)
    assert loose.tokens == 625
    both = Mixture(load(*[(r, {"ratio": 1, "repeat": True}) for r in rows]), seed=0)
    assert both.tokens == 550 and len(both.epoch(0)) == 110


def test_a_single_file_is_ordered_as_ever(load):
    data = load((documents(30, lambda i: 4, "a"), {"ratio": 0.3}))
    from fastpost.data.loader import order

    mixture = Mixture(data, seed=3)
    assert mixture.whole and mixture.lines() == []
    assert [mixture.epoch(e).tolist() for e in range(2)] == [order(3, e, 30) for e in range(2)]


def test_an_epoch_is_a_pure_function(load):
    data = load(*[(documents(40, lambda i: 3 + i % 5, "a"), {"ratio": r}) for r in (2, 1)])
    mixture = Mixture(data, seed=0, tokens=90)
    late = mixture.epoch(7).tolist()
    for epoch in (3, 0, 7):
        assert mixture.epoch(epoch).tolist() == Mixture(data, seed=0, tokens=90).epoch(epoch).tolist()
    assert mixture.epoch(7).tolist() == late


def test_the_account_says_what_was_asked_and_what_is_there(load):
    data = load((documents(100, lambda i: 4, "a"), {"ratio": 18}), (documents(200, lambda i: 4, "b"), {"ratio": 82}))
    first, a, b = Mixture(data, seed=0, tokens=500, fixed=True).lines()
    assert first == "mix    500 tokens an epoch, ratios 18:82, draw fixed"
    assert a.endswith("0.jsonl: wanted 18.00%, is 18.00% = 90 tokens (18.0% of it), shuffled")
    assert b.endswith("1.jsonl: wanted 82.00%, is 82.00% = 410 tokens (41.0% of it), shuffled")


def test_rows_are_numbered_on_through_the_sources(load):
    data = load((documents(5, lambda i: 4, "a"), {}), (documents(3, lambda i: 4, "b"), {}))
    assert [e.row for e in data.examples] == list(range(8)) and [p.report.rows for p in data.parts] == [5, 3]
    assert data.report.rows == 8 and data.report.path.count(" + ") == 1
    assert [len(d) for d in data.split()] == [5, 3] and data.split()[1].examples == data.examples[5:]


def test_a_source_has_settings_of_its_own(load):
    rows = [{"question": "ab", "answer": "cd"}]
    data = load(
        (documents(3, lambda i: 40, "a"), {"pack": "unmasked-blocks", "limit": 2}),
        (rows, {"columns": {"prompt": "question", "completion": "answer"}, "mask": "full"}),
        max_length=10,
    )
    assert [len(e.sequences[0]) for e in data.examples] == [10] * 8 + [5]
    assert list(data.examples[8].sequences[0].trained) == [0, 1, 1, 1, 1]


def test_plan_counts_steps_of_epochs_that_differ_in_rows(load):
    data = load(*[(documents(60, lambda i: 3 + 7 * i % 40, "a"), {"ratio": r}) for r in (2, 1)])
    cfg = Config(data=DataConfig(train=[p.source for p in data.parts], epoch_tokens=900))
    cfg.train.epochs, cfg.train.batch_size = 5, 2
    plan = Plan(cfg, data)
    epochs = [plan.mixture.epoch(e).tolist() for e in range(5)]
    steps = [-(-len(e) // 2) for e in epochs]
    assert len(set(steps)) > 1  # else this test shows nothing
    assert plan.steps == sum(steps)
    flat = [plan.rows(s) for s in reversed(range(plan.steps))][::-1]  # asked for in any order
    at = 0
    for rows, count in zip(epochs, steps):
        assert [r for part in flat[at : at + count] for r in part] == rows
        at += count
        assert plan.epoch(at) == epochs.index(rows) + 1
    assert plan.epoch(1) == 1 / steps[0] and plan.rows(plan.steps - 1)
    assert sum(map(plan.tokens, range(steps[0]))) == data.examples.tokens[epochs[0]].sum()
    once = [row for part in plan.first_epoch() for row in part]
    assert sorted(once) == list(range(len(data))) and once[: len(set(epochs[0]))] == list(dict.fromkeys(epochs[0]))


def test_feedback_on_ratios():
    """METHODS 15's check, worked by hand."""
    assert updated_ratios([0.5, 0.5], [1.2, 0.8]) == pytest.approx([0.6, 0.4])
    assert updated_ratios([0.2, 0.3, 0.5], [1, 1, 1]) == pytest.approx([0.2, 0.3, 0.5])
    assert sum(updated_ratios([3, 1, 4], [0.1, 2, 7])) == pytest.approx(1)
    assert feedback_factors([10, 10], [14, 8], alpha=0.2) == pytest.approx([1.2, 0.9])
    assert feedback_factors([10, 10], [14, 8], alpha=0.2, weights=[0.5, 0]) == pytest.approx([1.1, 1])
    assert feedback_factors([10, 10], [14, 8], alpha=0) == feedback_factors([5], [5], alpha=3) * 2 == [1, 1]
    with pytest.raises(ValueError, match=r"factors\[1\]: expected a number above 0, got -0.5. Lower alpha"):
        updated_ratios([0.5, 0.5], [1.0, -0.5])
    with pytest.raises(ValueError, match=r"factors: expected one for each of 2 ratios, got 1"):
        updated_ratios([0.5, 0.5], [1.0])

# SPDX-License-Identifier: Apache-2.0
"""bench.generate measures what it says."""

import pytest

import tiny
from bench import generate, timing


def test_both_sides_say_the_same_and_only_tokens_asked_for_count():
    model = tiny.model()
    model.generation_config.eos_token_id = None
    requests = generate.unequal(3, model.config.vocab_size)
    case = generate.measure(model, requests, 1, timing.CLOCKS["cpu"]) | {"goal": 3.0}
    assert case["new_tokens"] == sum(n for _, n in requests) and len({n for _, n in requests}) == 3
    assert case["same_tokens"] == 1
    speed = case["tokens_per_second"]
    assert case["ratio"] == pytest.approx(speed["fastpost"] / speed["transformers"])
    assert "3 requests" in generate.line(case) and "100 % of the tokens equal" in generate.line(case)

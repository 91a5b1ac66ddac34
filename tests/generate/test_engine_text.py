# SPDX-License-Identifier: Apache-2.0
"""Text while it grows: whole characters, stop strings over the bounds of tokens, pieces that add up."""

import random

import pytest

import tiny
from fastpost.generate import Engine, Request, Sampling
from fastpost.generate.text import Text

SAID = "What is the sum of 10 € and 20 € — été ≥ 30 €? 😀 The answer is seven."


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def scripted(ids, end=2):
    """A callback that makes any model say `ids`."""

    def callback(so_far, logits):
        said = len(so_far) - 1
        logits[:] = -100
        logits[ids[said] if said < len(ids) else end] = 100

    return callback


def say(tokenizer, ids, **sampling):
    """(completion, pieces) of a model that says `ids` after a prompt of one token."""
    pieces = []
    s = Sampling(max_new_tokens=200, logits_callback=scripted(ids), **sampling)
    with Engine(tiny.model(), tokenizer) as engine:
        ((c,),) = engine.generate([Request([7], s, stream=pieces.append)])
        assert engine.pages.used == 0
    return c, pieces


def test_pieces_add_up_and_split_no_character(tokenizer):
    ids = tokenizer(SAID)["input_ids"]
    c, pieces = say(tokenizer, ids)
    assert c.text == SAID and c.finish_reason == "stop"
    assert "".join(p.text for p in pieces) == SAID
    assert sum((p.token_ids for p in pieces), ()) == tuple(c.token_ids) == (*ids, 2)
    assert not any("\N{REPLACEMENT CHARACTER}" in p.text for p in pieces)
    assert [p.finish_reason for p in pieces] == [None] * len(ids) + ["stop"]
    assert sum(bool(p.text) for p in pieces) > 20  # as it comes, not at the end


@pytest.mark.parametrize("stop", ["sum of", "€ and", "é", "answer is seven.", "is seven", "W", "10 € and 20 €"])
def test_a_stop_string_ends_the_answer_before_it(tokenizer, stop):
    ids = tokenizer(SAID)["input_ids"]
    c, pieces = say(tokenizer, ids, stop=("never said", stop))
    assert c.text == SAID[: SAID.index(stop)] == "".join(p.text for p in pieces)
    assert c.finish_reason == "stop" and c.stop == stop
    assert stop in tokenizer.decode(c.token_ids) and stop not in tokenizer.decode(c.token_ids[:-1])


def test_the_first_of_several_stop_strings_counts_and_a_beginning_of_one_is_said_later(tokenizer):
    ids = tokenizer(SAID)["input_ids"]
    c, pieces = say(tokenizer, ids, stop=("seven", "answer is six", "is s"))
    assert c.stop == "is s" and c.text == SAID[: SAID.index("is s")]
    assert "".join(p.text for p in pieces) == c.text


def test_a_stop_string_that_only_begins_is_part_of_the_text(tokenizer):
    ids = tokenizer("seven apples in the")["input_ids"]
    c, pieces = say(tokenizer, ids, stop="the basket")
    assert c.text == "seven apples in the" == "".join(p.text for p in pieces) and c.stop is None


def test_a_special_token_may_be_the_stop_string(tokenizer):
    ids = [*tokenizer("seven")["input_ids"], tokenizer.convert_tokens_to_ids("<|eot|>"), 60, 61]
    c, _ = say(tokenizer, ids, stop="<|eot|>")
    assert c.text == "seven" and c.token_ids == ids[:-2] and c.stop == "<|eot|>"


def test_bytes_that_are_no_character_come_at_the_end_or_when_another_follows(tokenizer):
    euro = tokenizer("€")["input_ids"]
    assert len(euro) == 3
    c, pieces = say(tokenizer, euro[:2])
    assert c.text == "\N{REPLACEMENT CHARACTER}" == "".join(p.text for p in pieces)
    c, pieces = say(tokenizer, [*euro[:2], *tokenizer("a")["input_ids"]])
    assert c.text == "\N{REPLACEMENT CHARACTER}a" == "".join(p.text for p in pieces)


def test_any_tokens_give_the_text_of_all_at_once(tokenizer):
    """Random bytes are the worst that a model can say."""
    draw = random.Random(0)
    for _ in range(100):
        ids = [draw.randrange(320) for _ in range(draw.randint(1, 30))]
        text = Text(tokenizer, ("never said",))
        pieces = []
        for token in ids:
            text.push([token])
            pieces.append(text.fresh())
        text.push([], last=True)
        assert "".join(pieces) + text.fresh(last=True) == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_listener_that_raises_loses_no_token(tokenizer):
    def listener(piece):
        heard.append(piece)
        if len(heard) == 3:
            raise KeyError("mine")

    heard = []
    ids = tokenizer("seven apples in the basket")["input_ids"]
    with Engine(tiny.model(), tokenizer) as engine:
        s = Sampling(logits_callback=scripted(ids))
        (handle,) = engine.submit(Request([7], s, stream=listener))
        with pytest.raises(KeyError, match="mine"):
            while handle.finish_reason is None:
                engine.step()
        while handle.finish_reason is None:
            engine.step()
    assert handle.token_ids == [*ids, 2]
    assert "".join(p.text for p in heard) == "seven apples in the basket"


def test_a_listener_that_cancels_another_ends_its_pieces_once(tokenizer):
    """The other has sampled in the same step and was not told yet."""
    heard = {"a": [], "b": []}

    def listener(piece):
        heard[piece.id].append(piece)
        if len(heard["a"]) == 3:
            engine.cancel(other)

    s = Sampling(max_new_tokens=5, ignore_eos=True)
    with Engine(tiny.model(), tokenizer) as engine:
        _, other = (engine.submit(Request([7, 8], s, id=name, stream=listener))[0] for name in heard)
        completions = {c.id: c for c in engine.run([])}
    for name, reason in (("a", "length"), ("b", "cancelled")):
        assert [p.finish_reason for p in heard[name]] == [None] * (len(heard[name]) - 1) + [reason]
        assert [t for p in heard[name] for t in p.token_ids] == completions[name].token_ids
        assert "".join(p.text for p in heard[name]) == completions[name].text
    assert len(completions["b"].token_ids) == 3

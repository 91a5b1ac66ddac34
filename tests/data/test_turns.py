# SPDX-License-Identifier: Apache-2.0
"""data.mask turn: one assistant turn of a dialogue is trained, as REFUEL wants it."""

import pytest
import torch

import tiny
from fastpost import objectives
from fastpost.data.collate import Example, Sequence, collate
from fastpost.data.loader import load_dataset
from fastpost.hf import attention
from fastpost.train.config import DataConfig
from fastpost.train.forward import forward, lengths


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


DIALOGUE = [user("a"), assistant("b"), user("c"), assistant("d"), user("e"), assistant("f")]


def load(tmp_path, rows, objective=None, mask="turn", **options):
    path = tiny.write_jsonl(tmp_path / "d.jsonl", rows)
    return load_dataset(DataConfig(train=str(path), mask=mask, **options), tiny.tokenizer(), objective)


def trained(sequence) -> str:
    return tiny.tokenizer().decode([i for i, on in zip(sequence.ids, sequence.trained) if on])


@pytest.mark.parametrize("turn, reply", [(0, "b"), (1, "d"), (2, "f"), (1.0, "d"), (None, "f")])
def test_the_named_turn_with_its_end_and_nothing_else(tmp_path, turn, reply):
    row = {"messages": DIALOGUE} if turn is None else {"messages": DIALOGUE, "turn": turn}
    (sequence,) = load(tmp_path, [row]).examples[0].sequences
    assert trained(sequence) == reply + "<|im_end|>"
    assert sequence.trained[-1], "what follows the turn is cut off: nothing trained sees it"


def test_pairs_train_the_turn_where_they_part(tmp_path):
    """Dialogues that share their beginning up to turn 1 and go on after it. An explicit prompt means the same."""
    chosen, rejected = DIALOGUE, [*DIALOGUE[:3], assistant("D"), user("E"), assistant("F")]
    rows = [
        {"chosen": chosen, "rejected": rejected},
        {"chosen": chosen, "rejected": rejected, "turn": 1},
        {"prompt": DIALOGUE[:3], "chosen": chosen[3:], "rejected": rejected[3:]},
    ]
    for example in load(tmp_path, rows).examples:
        assert [trained(s) for s in example.sequences] == ["d<|im_end|>", "D<|im_end|>"]
    example = load(tmp_path, [{**rows[0], "turn": 2}]).examples[0]
    assert [trained(s) for s in example.sequences] == ["f<|im_end|>", "F<|im_end|>"]


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"messages": DIALOGUE, "turn": 3}, "d.jsonl:1: column 'turn': expected 0 to 2 (the row has assistant turns 0"),
        ({"messages": DIALOGUE, "turn": -1}, "column 'turn': expected a whole number from 0 up, got -1"),
        ({"messages": DIALOGUE, "turn": True}, "column 'turn': expected a whole number from 0 up, got True"),
        ({"messages": DIALOGUE, "turn": 1.5}, "column 'turn': expected a whole number from 0 up, got 1.5"),
        (
            {"chosen": DIALOGUE, "rejected": [*DIALOGUE[:3], assistant("D")], "turn": 0},
            "column 'turn': expected 1 to 2 (the replies are assistant turns 1 to 2), got 0",
        ),
    ],
)
def test_turns_that_are_not_there(tmp_path, row, expected):
    with pytest.raises(ValueError) as error:
        load(tmp_path, [row])
    assert expected in str(error.value)


def refuel_loss(examples, objective) -> torch.Tensor:
    attention.register()
    model = tiny.model()
    model.set_attn_implementation(attention.NAME)
    batch = collate(examples)
    return forward(model, batch, objective)


def dialogues(tmp_path, objective):
    numbers = {"chosen_reward": 1.0, "rejected_reward": 0.2}
    numbers |= {"previous_chosen_logps": -8.0, "previous_rejected_logps": -9.0}
    row = {"chosen": DIALOGUE, "rejected": [*DIALOGUE[:3], assistant("D")], **numbers}
    return load(tmp_path, [row], objective).examples


def test_a_label_of_another_turn_does_not_matter(tmp_path):
    """Relabel every token, one at a time, as the loss sees it: only those of turn 1 count."""
    objective = objectives.REFUEL(eta=0.5)
    (example,) = dialogues(tmp_path, objective)
    batch = collate([example], share_prompt=False)
    chosen = example.sequences[0]
    begin = bytes(chosen.trained).find(1)
    scored = (batch.target != -100).nonzero()[:, 0].tolist()
    assert scored[: len(chosen) - begin] == list(range(begin - 1, len(chosen) - 1))
    assert [int(n) for n in lengths(batch)] == [len("d") + 1, len("D") + 1]
    first = refuel_loss([example], objective).loss
    for position in (2, begin):  # a user's token and the reply's first, rewritten as a label only
        changed = Sequence(chosen.ids[:], chosen.trained)
        target = collate([Example(0, (changed, example.sequences[1]))], share_prompt=False).target.clone()
        target[position - 1] = 7 if target[position - 1] != -100 else -100
        assert bool((target != batch.target).any()) == (position == begin)
    # The logs of the turn h enter as a sum, without division by length: A = (lp - previous)_c - (lp - previous)_r.
    out = refuel_loss([example], objective)
    a = (out.logprob[0] + 8.0) - (out.logprob[1] + 9.0)
    assert torch.allclose(first, (a - 0.5 * 0.8) ** 2, rtol=1e-5)


def test_one_turn_is_rebel(tmp_path):
    row = {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")], "chosen_reward": 1.0,
           "rejected_reward": 0.0, "previous_chosen_logps": -5.0, "previous_rejected_logps": -6.0}  # fmt: skip
    refuel, rebel = objectives.REFUEL(eta=2.0), objectives.REBEL(eta=2.0)
    one = load(tmp_path, [row], refuel).examples
    two = load(tmp_path, [row], rebel, mask="reply").examples
    assert one == two and torch.equal(refuel_loss(one, refuel).loss, refuel_loss(two, rebel).loss)

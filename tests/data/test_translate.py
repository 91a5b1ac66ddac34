# SPDX-License-Identifier: Apache-2.0
"""Rows as other tools write them."""

import pytest

import tiny
from fastpost import objectives
from fastpost.data.columns import Row
from fastpost.data.loader import load_dataset
from fastpost.data.translate import Translator
from fastpost.train.config import DataConfig


def translate(values, **options):
    translator = Translator(**options)
    return translator(Row(0, "f.jsonl:1", values)).values, translator.notes


def message(values, **options) -> str:
    with pytest.raises(ValueError) as error:
        translate(values, **options)
    return str(error.value)


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


CALL = {"name": "weather", "arguments": {"city": "Rome"}}


@pytest.mark.parametrize(
    "theirs, ours, note",
    [
        ({"conversations": [human("a"), gpt("b")]}, {"messages": [user("a"), assistant("b")]}, "sharegpt"),
        ({"conversations": [user("a"), assistant("b")]}, {"messages": [user("a"), assistant("b")]}, "as messages"),
        (
            {"conversations": [human("a"), gpt("b")], "system": "S"},
            {"messages": [{"role": "system", "content": "S"}, user("a"), assistant("b")]},
            "column system is read as the first message",
        ),
        (
            {"conversations": [human("a")], "chosen": gpt("b"), "rejected": gpt("c")},
            {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
            "columns conversations, chosen, rejected are read as prompt, chosen, rejected",
        ),
        (
            {"conversations": [human("a"), gpt("b")], "kto_tag": True},
            {"prompt": [user("a")], "completion": [assistant("b")], "label": True},
            "columns conversations, label are read as prompt, completion",
        ),
        (
            {"conversations": [
                human("a"), {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
                {"from": "observation", "value": "sunny"}, gpt("b"),
            ]},
            {"messages": [
                user("a"), {**assistant(""), "tool_calls": [{"type": "function", "function": CALL}]},
                {"role": "tool", "content": "sunny"}, assistant("b"),
            ]},
            "sharegpt",
        ),
        (
            {"instruction": "a", "input": "", "output": "b"},
            {"prompt": [user("a")], "completion": [assistant("b")]},
            "(alpaca) are read as prompt, completion as a chat",
        ),
        (
            {"instruction": "a", "input": "x", "output": "b", "text": "t", "system": "S", "history": [["q", "r"]]},
            {
                "prompt": [{"role": "system", "content": "S"}, user("q"), assistant("r"), user("a\nx")],
                "completion": [assistant("b")],
            },
            "column text is left aside",
        ),
        (
            {"instruction": "a", "output": ["b", "c"]},
            {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
            "are read as prompt, chosen, rejected",
        ),
        (
            {
                "chosen": [user("a"), assistant("b")], "reject": [user("a"), assistant("c")], "chosen_reward": 1.0,
                "reject_reward": 0.5, "chosen_logprob": -3.0, "reject_logprob": -4.0,
            },
            {
                "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")], "chosen_reward": 1.0,
                "rejected_reward": 0.5, "previous_chosen_logps": -3.0, "previous_rejected_logps": -4.0,
            },
            "column chosen_logprob is read as previous_chosen_logps",
        ),
        (
            {"logp_ref_chosen": -1, "logp_ref_rejected": -2, "logp_t_chosen": -3, "logp_t_rejected": -4},
            {
                "reference_chosen_logps": -1, "reference_rejected_logps": -2, "previous_chosen_logps": -3,
                "previous_rejected_logps": -4,
            },
            "column logp_ref_chosen is read as reference_chosen_logps",
        ),
        (
            {"last_chosen_logps": -3, "last_rejected_logps": -4},
            {"previous_chosen_logps": -3, "previous_rejected_logps": -4},
            "column last_chosen_logps is read as previous_chosen_logps",
        ),
    ],
)  # fmt: skip
def test_each_form(theirs, ours, note):
    given = {**theirs}
    values, notes = translate(theirs)
    assert {k: values[k] for k in ours} == ours and any(note in n for n in notes), notes
    assert theirs == given  # the caller's row is left as it is


def test_rows_of_ours_are_left_alone():
    for row in (
        *tiny.preference_rows(1), *tiny.sft_rows(1), *tiny.unpaired_rows(1), {"text": "a"},
        {"messages": [user("a")], "conversations": [user("z")]},
        {"prompt": "a", "completion": "b", "instruction": "x", "output": "y"},
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 2.0},
        {"reference_chosen_logps": -1.0, "logp_ref_chosen": -9.0},
    ):  # fmt: skip
        assert translate(row) == (row, [])


def test_margin_is_a_difference_of_rewards_where_none_are_given():
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 2.0}
    values, notes = translate(row, margin=True)
    assert (values["chosen_reward"], values["rejected_reward"]) == (2.0, 0.0)
    assert notes == ["column margin is read as chosen_reward = margin, rejected_reward = 0"]
    given = {**row, "chosen_reward": 5.0, "rejected_reward": 4.0}
    assert translate(given, margin=True) == (given, [])


def test_plain_instructions_get_alpacas_text():
    values, notes = translate({"instruction": "Add.", "input": "1, 2", "output": "3"}, plain=True)
    assert values["prompt"].startswith("Below is an instruction that describes a task, paired with an input that")
    assert values["prompt"].endswith("\n\n### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n")
    assert values["completion"] == "3" and "in Alpaca's own text" in notes[0]
    values, _ = translate({"instruction": "Add.", "input": "", "output": "3"}, plain=True)
    assert "describes a task. Write a response" in values["prompt"] and "### Input" not in values["prompt"]
    assert "column 'system' needs a chat template" in message(
        {"instruction": "a", "output": "b", "system": "S"}, plain=True
    )


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"conversations": [human("a"), {"from": "gpt"}]}, "f.jsonl:1: conversations[1]: expected {'from', 'value'}"),
        ({"conversations": [{"from": "alien", "value": "a"}]}, "conversations[0]: from: expected one of human, user"),
        (
            {"conversations": [human("a"), {"from": "function_call", "value": "no"}]},
            "conversations[1]: function_call: expected JSON, got 'no'",
        ),
        ({"instruction": "a", "output": ["b"]}, "column 'output': expected a string or [chosen, rejected], got a list"),
        ({"instruction": None, "output": "b"}, "column 'instruction': expected a string, got NoneType"),
        ({"instruction": "a", "output": 3}, "column 'output': expected a string, got int"),
        ({"instruction": "a", "output": "b", "history": ["q"]}, "column 'history'[0]: expected [question, answer]"),
    ],
)
def test_mistakes(row, expected):
    assert expected in message(row)


def load(tmp_path, rows, objective, **options):
    path = tiny.write_jsonl(tmp_path / "d.jsonl", rows)
    return load_dataset(DataConfig(train=str(path), **options), tiny.tokenizer(), objective)


def test_translated_rows_give_the_examples_of_ours(tmp_path):
    """And the note is said once, however many rows there are."""
    dpo, sft = objectives.DPO(), objectives.SFT()
    ours = [{"prompt": [user(f"{i}?")], "chosen": [assistant("b")], "rejected": [assistant("c")]} for i in range(3)]
    expected = load(tmp_path, ours, dpo)
    alpaca = load(tmp_path, [{"instruction": f"{i}?", "output": ["b", "c"]} for i in range(3)], dpo)
    ranked = [{"conversations": [human(f"{i}?")], "chosen": gpt("b"), "rejected": gpt("c")} for i in range(3)]
    sharegpt = load(tmp_path, ranked, dpo)
    assert expected.examples == alpaca.examples == sharegpt.examples
    assert expected.report.notes() == [] and len(alpaca.report.notes()) == 1 and len(sharegpt.report.notes()) == 2
    chats = load(tmp_path, [{"messages": [user("a"), assistant("b")]}], sft)
    assert load(tmp_path, [{"conversations": [human("a"), gpt("b")]}], sft).examples == chats.examples


def test_refuel_and_inpo_rows_load_with_their_numbers(tmp_path):
    chat = {"chosen": [user("a"), assistant("b")], "reject": [user("a"), assistant("c")]}
    row = {**chat, "chosen_reward": 1.5, "reject_reward": 0.5, "chosen_logprob": -3.0, "reject_logprob": -4.0}
    (example,) = load(tmp_path, [row], objectives.REFUEL()).examples
    assert example.reward == (1.5, 0.5) and example.previous_logprob == (-3.0, -4.0)
    row = {**chat, "chosen_logprob": -3.0, "reject_logprob": -4.0, "margin": 0.75}
    (example,) = load(tmp_path, [row], objectives.REBEL()).examples
    assert example.reward == (0.75, 0.0)
    (example,) = load(tmp_path, [{**row, "margin": 0.75}], objectives.DPO()).examples
    assert example.reward is None
    row = {**chat, **{f"logp_{p}_{s}": -1.0 - i for i, (p, s) in enumerate(
        (p, s) for p in ("ref", "t") for s in ("chosen", "rejected"))}}  # fmt: skip
    path = tiny.write_jsonl(tmp_path / "d.jsonl", [row])
    data = load_dataset(
        DataConfig(train=str(path)), tiny.tokenizer(), objectives.INPO(), require=("reference_logprob",)
    )
    assert data.examples[0].reference_logprob == (-1.0, -2.0) and data.examples[0].previous_logprob == (-3.0, -4.0)


@pytest.mark.parametrize("objective", [objectives.DPO(), objectives.SFT(), objectives.KTO(), None])
def test_prompts_alone_are_recognised_and_refused(tmp_path, objective):
    with pytest.raises(ValueError) as error:
        load(tmp_path, [{"prompt": "a", "id": 3}], objective)
    text = str(error.value)
    assert "d.jsonl:1: the row has a prompt and no reply (its columns: prompt, id)." in text
    assert "add chosen and rejected, or completion, or rename with data.columns" in text
    assert (objective.name if objective else "Training") + " learns from replies that are there" in text

# SPDX-License-Identifier: Apache-2.0
"""The word-problem set: right solutions are right, wrong ones are wrong where they say, and nothing gives them away."""

import hashlib
import json
import re
from collections import Counter

import pytest
import torch

from fastpost.data.word_problem_families import HELD_OUT, TRAINING
from fastpost.data.word_problems import final_answer, problems, reward, write

SPLITS = {"train": 2000, "same": 280, "new": 280}
EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
COMPUTE = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": lambda a, b: a / b}


@pytest.fixture(scope="module")
def rows():
    return {split: problems(split, count) for split, count in SPLITS.items()}


@pytest.fixture(scope="module")
def everything(rows):
    return [row for split in rows.values() for row in split]


def text(row, column):
    return row[column][-1]["content"]


def equations(solution):
    """The equations of a solution as (a, op, b, claimed), from its text alone: one a line but for the last."""
    *work, last = solution.split("\n")
    found = [EQUATION.findall(line) for line in work]
    assert all(len(one) == 1 for one in found), solution
    assert re.fullmatch(r"The answer is \d+\.", last), solution
    return [(int(a), op, int(b), int(c)) for ((a, op, b, c),) in found]


def true(equation):
    a, op, b, claimed = equation
    return COMPUTE[op](a, b) == claimed


def test_the_rows_have_the_columns_of_a_preference_set(everything):
    for row in everything:
        assert [m["role"] for m in row["prompt"]] == ["system", "user"]
        assert [m["role"] for m in row["chosen"]] == [m["role"] for m in row["rejected"]] == ["assistant"]
        assert not re.search(r"[{}]|  ", text(row, "prompt") + text(row, "chosen") + text(row, "rejected"))


def test_every_chosen_solution_is_right_by_its_own_text(everything):
    for row in everything:
        steps = equations(text(row, "chosen"))
        assert all(map(true, steps))
        assert steps[-1][3] == row["answer"] == final_answer(text(row, "chosen"))
        # each number used is given in the question, an earlier result, or a factor between units
        known = {int(n) for n in re.findall(r"\d+", text(row, "prompt"))} | {2, 7, 12, 60}
        for a, _, b, c in steps:
            assert {a, b} <= known
            known.add(c)


def test_every_rejected_solution_is_wrong_where_it_says(everything):
    for row in everything:
        right, wrong = equations(text(row, "chosen")), equations(text(row, "rejected"))
        step = row["error_step"]
        assert wrong[-1][3] == row["wrong"] == final_answer(text(row, "rejected")) != row["answer"]
        assert right[:step] == wrong[:step] and right[step : step + 1] != wrong[step : step + 1]
        false = [i for i, equation in enumerate(wrong) if not true(equation)]
        assert false == ([step] if row["error"] == "slip" else [])
        assert len(wrong) - len(right) == {"dropped": -1, "decoy": 1}.get(row["error"], 0)
        if row["error"] == "operation":
            assert right[step][1] != wrong[step][1] and right[step][0] == wrong[step][0]
        if row["error"] == "unit":
            assert (
                right[step][:2] == wrong[step][:2] and right[step][2] in (2, 7, 12, 60) and right[step] != wrong[step]
            )


def test_the_answer_follows_from_the_question_by_the_rule_of_the_family(rows):
    """An independent solution of one training and one held-out family, from the question's numbers alone."""
    rules = {
        "gifts": (
            r"(?:has|owns) (\d+)[^.]*\..*?(\d+) more, (?:and then \w+ loses|but) (\d+)",
            lambda a, b, c: a + b - c,
        ),
        "tank": (r"(\d+) litres.*?(\d+) litres.*?(\d+) minutes", lambda i, o, m: (i - o) * m),
    }
    extra = {"gifts": r"finds (\d+) more", "tank": r"The tank held (\d+)"}
    seen = Counter()
    for row in rows["train"] + rows["new"]:
        if row["family"] in rules:
            question = text(row, "prompt")
            event = re.search(extra[row["family"]], question)
            pattern, rule = rules[row["family"]]
            decoy = re.sub(r"(The tank held|A second tank holds) \d+ litres[^.]*\. ", "", question)
            numbers = map(int, re.search(pattern, decoy, re.DOTALL).groups())
            assert rule(*numbers) + (int(event[1]) if event else 0) == row["answer"], question
            seen[row["family"]] += 1
    assert min(seen.values()) > 40


def test_families_kinds_and_sizes(rows):
    assert len(TRAINING) >= 10 and len(HELD_OUT) >= 4
    assert not {f.name for f in TRAINING} & {f.name for f in HELD_OUT}
    for split, count in SPLITS.items():
        families = HELD_OUT if split == "new" else TRAINING
        counts = Counter(row["family"] for row in rows[split])
        assert set(counts) == {f.name for f in families} and len(rows[split]) == count
        assert max(counts.values()) - min(counts.values()) <= 1
        kinds = Counter(row["error"] for row in rows[split])
        assert set(kinds) == {"slip", "operation", "operands", "unit", "dropped", "decoy"}
        assert min(kinds.values()) >= 0.025 * count and max(kinds.values()) <= 0.5 * count


def test_no_duplicates_and_no_leaks(rows):
    def problem(row):  # family and numbers, without names and objects; the event's number may vary
        return row["family"], tuple(equations(text(row, "chosen"))[0][:3]), row["answer"]

    def sentence(row):
        return re.sub(r"[^\d ]+", "", row["family"] + text(row, "prompt"))

    questions = [text(row, "prompt") for split in rows.values() for row in split]
    assert len(set(questions)) == len(questions)
    other_seed = [*problems("train", 2000, seed=1)]
    for train in (rows["train"], other_seed):
        assert not {(row["family"], sentence(row)) for row in train} & {
            (row["family"], sentence(row)) for row in rows["same"]
        }
    assert {text(row, "prompt") for row in other_seed} != {text(row, "prompt") for row in rows["train"]}


# ---- what must not give the verdict away -----------------------------------------------------------------------------


def share(flags):
    flags = list(flags)
    return sum(flags) / len(flags)


@pytest.mark.parametrize("split", SPLITS)
def test_length_and_size_rules_guess_no_better_than_a_coin(rows, split):
    """Each rule picks one solution of a pair; a tie counts as half."""
    tolerance = 0.04 if split == "train" else 0.07  # about 3.5 and 2.3 standard deviations of a fair coin

    def score(measure):
        pairs = [(measure(text(r, "chosen")), measure(text(r, "rejected"))) for r in rows[split]]
        return share((a > b) + 0.5 * (a == b) for a, b in pairs)

    for measure in (len, lambda t: len(t.split()), lambda t: sum(map(str.isdigit, t)), final_answer):
        assert abs(score(measure) - 0.5) < tolerance
    for digit in (lambda t: int(final_answer(t)) % 10, lambda t: int(final_answer(t)) % 2):
        assert abs(score(digit) - 0.5) < 0.1


def logistic(features, labels, test_features):
    """Plain logistic regression with a ridge, by Newton's method in float64; returns test scores."""
    mean, std = features.mean(0), features.std(0) + 1e-9
    x = torch.cat([(features - mean) / std, torch.ones(len(features), 1, dtype=torch.float64)], 1)
    test = torch.cat([(test_features - mean) / std, torch.ones(len(test_features), 1, dtype=torch.float64)], 1)
    weight = torch.zeros(x.shape[1], dtype=torch.float64)
    for _ in range(20):
        p = torch.sigmoid(x @ weight)
        hessian = (x * (p * (1 - p))[:, None]).T @ x + torch.eye(len(weight), dtype=torch.float64)
        weight += torch.linalg.solve(hessian, x.T @ (labels - p) - weight)
    return test @ weight


def surface(row, column, vocabulary):
    """What can be seen without arithmetic: sizes, the answer's digits, and how often words and operators occur."""
    solution = text(row, column)
    words = Counter(re.findall(r"[a-z]+|[-+*/=]", solution.lower()))
    answer = int(final_answer(solution))
    lines = solution.count("\n")
    sizes = [
        len(solution),
        len(solution.split()),
        lines,
        lines**2,
        answer,
        answer**0.5,
        answer % 2,
        answer % 5,
        answer % 10,
    ]
    return [*sizes, *(words[word] for word in vocabulary)]


def test_a_classifier_of_surface_features_learns_nothing(rows):
    """Trained on 2,000 pairs, it must not tell right from wrong in the held-out ones, single or in pairs."""
    counts = Counter(re.findall(r"[a-z]+|[-+*/=]", " ".join(text(r, "chosen") for r in rows["train"]).lower()))
    vocabulary = [word for word, _ in counts.most_common(60)]

    def matrix(split):
        both = [surface(r, column, vocabulary) for r in split for column in ("chosen", "rejected")]
        return torch.tensor(both, dtype=torch.float64)

    train = matrix(rows["train"])
    labels = torch.tensor([1.0, 0.0] * len(rows["train"]), dtype=torch.float64)
    held_out = rows["same"] + problems("same", 720, seed=5)
    scores = logistic(train, labels, matrix(held_out))
    single = share(((scores > 0).double() == torch.tensor([1.0, 0.0] * len(held_out))).tolist())
    chosen, rejected = scores[0::2], scores[1::2]
    paired = ((chosen > rejected).double() + 0.5 * (chosen == rejected)).mean().item()
    print(f"surface classifier: single {single:.3f}, paired {paired:.3f}")
    assert single < 0.56 and paired < 0.58


# ---- determinism, files, reward --------------------------------------------------------------------------------------


def test_the_set_is_the_same_for_a_seed(rows, tmp_path):
    paths = write(tmp_path / "a", seed=0, rows=2000, held_out=280)
    digest = {split: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for split, path in paths.items()}
    assert digest == {"train": "eb3744db87fa3636", "same": "c8ba2f004dde8bc2", "new": "cd011dac92a72152"}
    read = [json.loads(line) for line in paths["same"].read_text().splitlines()]
    assert read == rows["same"]
    assert problems("train", 30) == rows["train"][:30]  # a longer set begins with the shorter one


def test_reward_reads_the_final_answer():
    assert reward("6 * 7 = 42\nThe answer is 42.", 42) == 1.0
    assert reward("#### 42", 42) == 1.0
    assert reward([{"role": "assistant", "content": "so the answer is: **1,042**"}], 1042) == 1.0
    assert reward(r"\boxed{42}", 42) == 1.0
    assert reward("The answer is 41. No: the answer is 42.", 42) == 1.0
    assert reward("The answer is 42. No: the answer is 41.", 42) == 0.0
    assert reward("The answer is $42.00 in all.", 42) == 1.0
    assert reward("The answer is -42.", 42) == 0.0
    assert reward("The answer is 42.5", 42) == 0.0
    assert reward("6 * 7 = 42", 42) == 0.0
    assert reward("", 42) == 0.0


def test_reward_agrees_with_the_rows(everything):
    assert all(reward(row["chosen"], row["answer"]) == 1.0 for row in everything)
    assert all(reward(row["rejected"], row["answer"]) == 0.0 for row in everything)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match=r"\[problems\] split: expected train, same or new, got 'test'"):
        problems("test", 1)

# SPDX-License-Identifier: Apache-2.0
"""Complaint 24: training is right and the logged numbers are wrong: means of means, or those of the first rank.

(TRL #2468, #7047, #5352; VeOmni PR #1130)"""

import pytest
import torch

import launch
import runs
import tiny
from fastpost import objectives
from fastpost.data.loader import load_dataset, order
from fastpost.hf import folder
from fastpost.train import metrics
from fastpost.train.distributed import Ranks
from fastpost.train.forward import forward
from fastpost.train.loop import train
from fastpost.train.metrics import Sums

ROWS = {"simpo": tiny.preference_rows, "kto": tiny.unpaired_rows, "sft": tiny.sft_rows}


def recipe(tmp, name, ranks):
    """One step of 5 rows, 2 + 2 + 1 for one process; two ranks have 3 of them and 2, for KTO not the same kinds."""
    cfg = runs.recipe(
        tmp,
        objective={"name": name},
        optim={"precision": "fp32"},
        train={"output_dir": tmp / f"{name}-{ranks}", "batch_size": 5, "micro_batch_size": 2, "max_steps": 1},
    )
    tiny.write_jsonl(tmp / "train.jsonl", ROWS[name](13))
    cfg.data.eval = None
    if name == "kto":
        cfg.model.reference = str(tmp / "other")
        if not (tmp / "other").exists():
            tiny.folder(tmp / "other", seed=1)
    return cfg


def logged(tmp, name, ranks, before=lambda: None):
    cfg = recipe(tmp, name, ranks)

    def action():
        before()
        train(cfg)

    assert launch.Forked(action, ranks).wait() == [0] * ranks
    return metrics.read(tmp / f"{name}-{ranks}" / "metrics.jsonl")[0]


def truth(tmp, name):
    """Every row by itself, then plain means."""
    cfg = recipe(tmp, name, 1)
    objective = objectives.from_name(name)
    data = load_dataset(cfg.data, folder.load_tokenizer(cfg.model.path), objective)
    model = folder.load_model(cfg.model.path, torch.float32)
    other = folder.load_model(tmp / "other", torch.float32) if name == "kto" else None
    found: dict[str, list[float]] = {}

    def add(key, *values):
        found.setdefault(key, []).extend(map(float, values))

    for row in order(0, 0, 13)[:5]:
        batch = data.batch([row])
        with torch.no_grad():
            if other is not None:
                batch.reference_logprob = forward(other, batch, objectives.SFT()).logprob
            out = forward(model, batch, objective)
        if name == "sft":
            add("loss", *(-(out.logprob / out.length)).repeat_interleave(out.length.long()))
            continue
        add("loss", *out.losses)
        if name == "kto":
            kind = "chosen" if batch.reward[0] > 0 else "rejected"
            add(f"rewards/{kind}", *out.rewards)
            add(f"logps/{kind}", *out.logprob)
        else:
            for i, kind in enumerate(("chosen", "rejected")):
                add(f"rewards/{kind}", out.rewards[i])
                add(f"logps/{kind}", out.logprob[i])
            add("rewards/margins", out.rewards[0] - out.rewards[1])
            add("rewards/accuracies", out.rewards[0] > out.rewards[1])
    return {key: sum(values) / len(values) for key, values in found.items()}


def wrong(tmp, name, ranks, before=lambda: None):
    """The logged numbers that are not the means over rows."""
    numbers = logged(tmp, name, ranks, before)
    expected = truth(tmp, name)
    assert set(expected) == {n for n in numbers if n == "loss" or n.startswith(("rewards/", "logps/"))}
    return {n for n, value in expected.items() if numbers[n] != pytest.approx(value, rel=1e-5, abs=1e-6)}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ROWS)
def test_logged_numbers_are_means_over_rows(tmp_path, name, ranks):
    assert wrong(tmp_path, name, ranks) == set()


def means_of_means():
    def means(self, ranks):
        self.parts = {name: [float(t) for t in parts] for name, parts in self._sums.items()}
        return {n: sum(s / c for s, c in zip(p, self.counts[n])) / len(p) for n, p in self.parts.items()}

    def counting(self, name, values, count=None):
        self.counts = getattr(self, "counts", {})
        self.counts.setdefault(name, []).append(values.numel() if count is None else count)
        add(self, name, values, count)

    add, Sums.add, Sums.means = Sums.add, counting, means


def only_the_first_rank():
    Ranks.gather = lambda self, value: [value] if isinstance(value, dict) else gather(self, value)


gather = Ranks.gather


@pytest.mark.parametrize("mistake,ranks", [(means_of_means, 1), (only_the_first_rank, 2)])
def test_each_mistake_would_be_seen(tmp_path, mistake, ranks):
    for name in ROWS:
        (tmp_path / name).mkdir()
        assert "loss" in wrong(tmp_path / name, name, ranks, mistake)

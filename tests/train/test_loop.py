# SPDX-License-Identifier: Apache-2.0
"""The loop from the outside: it learns, it says what it does, and it stops with a sentence when something is wrong."""

import fcntl
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import runs
import tiny
from fastpost.hf import folder
from fastpost.train import checkpoint, metrics, reference, schedule
from fastpost.train.evaluate import evaluate_config
from fastpost.train.export import export
from fastpost.train.loop import initial_check, train
from fastpost.train.metrics import RunLog, Sums
from fastpost.train.step import NotFinite

pytestmark = pytest.mark.usefixtures("one_thread")


def poison(path, name="model.layers.1.mlp.up_proj.weight", value=float("nan")):
    """Put one bad number into a weight file."""
    tensors = load_file(path / "model.safetensors")
    tensors[name].view(-1)[0] = value
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def test_overfits_a_small_set(tmp_path, capsys):
    cfg = runs.recipe(
        tmp_path,
        rows=8,
        objective={"name": "simpo", "gamma_beta_ratio": 0.5},
        optim={"lr": 3e-3},
        train={"epochs": 30, "save_every": 0, "eval_every": 0},
    )
    train(cfg)
    rows = [r for r in metrics.read(tmp_path / "run/metrics.jsonl") if "loss" in r]
    assert len(rows) == 30
    assert rows[0]["loss"] > 0.5 and rows[-1]["loss"] < 0.05
    assert rows[-1]["rewards/accuracies"] == 1.0
    assert rows[-1]["rewards/margins"] == pytest.approx(rows[-1]["rewards/chosen"] - rows[-1]["rewards/rejected"])
    assert rows[-1]["num_tokens"] == 30 * rows[0]["num_tokens"] and rows[-1]["epoch"] == 30
    assert rows[4]["learning_rate"] == 3e-3 * schedule.factor(4, total=30, warmup=3)
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("train  rows 8 (kept 8, dropped 0)")
    steps = [line for line in out if line.startswith("step")]
    assert len(steps) == 30
    for part in ("loss", "margin", "acc 1.00", "gnorm", "lr", "ms", "tok/s", "mfu", "GB", "eta"):
        assert part in steps[-1]
    # The model on disk is the model that was trained.
    cfg.data.eval = cfg.data.train
    again = evaluate_config(cfg, tmp_path / "run/model")
    assert again["rewards/accuracies"] == 1.0 and again["loss"] < 0.05 and again["rows"] == 8
    assert evaluate_config(cfg)["loss"] == pytest.approx(rows[0]["loss"], abs=1e-3)


def test_metrics_have_no_clock_and_timing_has(tmp_path):
    train(runs.recipe(tmp_path))
    names = {
        "step", "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
        "logps/rejected", "grad_norm", "learning_rate", "epoch", "num_tokens",
    }  # fmt: skip
    assert set(metrics.read(tmp_path / "run/metrics.jsonl")[1]) == names
    timing = metrics.read(tmp_path / "run/timing.jsonl")
    assert [t["step"] for t in timing] == [1, 2, 3, 4, 5, 6]
    assert set(timing[0]) == {"step", "ms", "tps", "mfu", "memory/peak_gb", "data_wait"}
    assert all(0 < t["data_wait"] < 1 and t["ms"] > 0 and t["tps"] > 0 and 0 < t["mfu"] < 1 for t in timing)


# ---- the check before the first update -----------------------------------------------------------------------------


def test_dpo_starts_at_ln_2_to_the_last_bits(tmp_path, capsys):
    """Policy and reference see the same packing, so the difference is float32 rounding of ln 2 alone, in bf16 too."""
    train(runs.recipe(tmp_path, "--train.max_steps", "1"))
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("check"))
    assert "reference = start" in line and "expected 0.693147" in line and line.endswith("ok")
    first = metrics.read(tmp_path / "run/metrics.jsonl")[1]
    assert first["loss"] == pytest.approx(0.6931471805599453, abs=1e-7)
    assert first["rewards/margins"] == 0.0 and first["rewards/accuracies"] == 0.5


def test_initial_check_speaks_up():
    assert initial_check(0.75, 0.6931, {"reference_logprob": "start"}, "bf16").endswith("(dropout?)")
    assert "no closed form" in initial_check(0.75, None, {}, "bf16")
    assert "only meaningful" in initial_check(0.75, 0.6931, {"reference_logprob": "columns"}, "bf16")


# ---- references ----------------------------------------------------------------------------------------------------


def test_reference_of_another_folder_and_of_columns_agree(tmp_path):
    """A run against a second model equals a run against that model's log-probs stored in the data."""
    cfg = runs.recipe(tmp_path, optim={"precision": "fp32"})
    other = tiny.folder(tmp_path / "other", seed=1)
    cfg.model.reference = str(other)
    train(cfg)
    with_path = metrics.read(tmp_path / "run/metrics.jsonl")
    assert abs(with_path[1]["rewards/chosen"]) > 0.01

    table = load_file(tmp_path / "run/reference.safetensors")
    for name in ("train", "eval"):
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for row, (chosen, rejected) in zip(rows, table[name].tolist(), strict=True):
            row |= {"reference_chosen_logps": chosen, "reference_rejected_logps": rejected}
        tiny.write_jsonl(tmp_path / f"{name}.jsonl", rows)
    cfg.model.reference, cfg.train.output_dir = "columns", str(tmp_path / "columns")
    train(cfg)
    assert metrics.read(tmp_path / "columns/metrics.jsonl") == with_path


def test_an_objective_without_its_reference(tmp_path):
    with pytest.raises(ValueError, match=r"model.reference: DPO needs log-probs of a reference, got 'none'. Use start"):
        train(runs.recipe(tmp_path, "--model.reference", "none"))
    with pytest.raises(ValueError, match="column 'reference_chosen_logps' is missing"):
        train(runs.recipe(tmp_path, "--model.reference", "columns", "--train.output_dir", str(tmp_path / "other")))


def test_data_that_changed_under_a_run(tmp_path):
    cfg = runs.recipe(tmp_path)
    assert runs.in_child(runs.killed_at(cfg, checkpoint, "save", 1)) != 0
    tiny.write_jsonl(tmp_path / "train.jsonl", tiny.preference_rows(21))
    with pytest.raises(
        ValueError, match=r"expected 21 rows for 'train', got 22. The data changed since this run began"
    ):
        train(cfg)


# ---- numbers that are not ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dpo", "sft"])
def test_nan_weights_stop_the_run(tmp_path, name):
    cfg = runs.recipe(tmp_path, objective={"name": name})
    if name == "sft":
        tiny.write_jsonl(tmp_path / "train.jsonl", tiny.sft_rows(22))
        cfg.data.eval = None
    poison(tmp_path / "model")
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.weight holds NaN or infinity"):
        train(cfg)
    assert not (tmp_path / "run/model").exists() and checkpoint.latest(tmp_path / "run/checkpoints") is None


def test_a_loss_that_blows_up_names_step_and_rows(tmp_path, monkeypatch):
    """One row with an infinite reference makes one bad pair; the step before it is still saved and loads."""
    cfg = runs.recipe(tmp_path, train={"save_every": 1, "epochs": 1})
    good = reference.fill

    def bad(dataset, values, column):
        values = values.clone()
        if len(dataset) == 22:
            values[bad.row, 0] = float("inf")
        good(dataset, values, column)

    from fastpost.data.loader import order

    bad.row = order(0, 0, 22)[9]  # in step 2
    monkeypatch.setattr(reference, "fill", bad)
    with pytest.raises(NotFinite) as error:
        train(cfg)
    message = str(error.value)
    assert "[train] step 2: the loss is" in message and f"Data rows: {bad.row}. The step was not taken" in message
    assert "lower optim.lr (now 0.001)" in message
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "run/checkpoints")] == ["step-000001"]
    assert [r["step"] for r in metrics.read(tmp_path / "run/metrics.jsonl")] == [0, 1]
    monkeypatch.setattr(reference, "fill", good)
    train(cfg)  # and from there it goes on
    assert (tmp_path / "run/model").is_dir()


def test_a_gradient_that_overflows_names_the_step(tmp_path, monkeypatch):
    from fastpost.train import step

    cfg = runs.recipe(tmp_path, train={"epochs": 1})
    plain = step.forward

    def overflowing(*args):
        output = plain(*args)
        if torch.is_grad_enabled():
            output.losses.register_hook(lambda g: g * float("inf"))
        return output

    monkeypatch.setattr(step, "forward", overflowing)
    with pytest.raises(
        NotFinite, match=r"step 1: the gradient norm is (nan|inf) \(every loss is finite\). Data rows: \d+, "
    ):
        train(cfg)


# ---- the run folder ------------------------------------------------------------------------------------------------


def test_other_settings_in_a_used_folder(tmp_path):
    train(runs.recipe(tmp_path, "--train.max_steps", "1"))
    with pytest.raises(ValueError) as error:
        train(runs.recipe(tmp_path, "--train.max_steps", "1", "--optim.lr", "5e-4", "--objective.beta", "0.2"))
    message = str(error.value)
    assert "holds a run with other settings" in message and "choose another folder with --train.output_dir" in message
    assert "optim.lr is 0.001 there, 0.0005 now" in message and "objective.beta is None there, 0.2 now" in message
    # How often a line is printed is no reason to refuse.
    train(runs.recipe(tmp_path, "--train.max_steps", "1", "--log.every", "7"))


def test_a_start_that_failed_leaves_nothing_in_the_way(tmp_path):
    with pytest.raises(ValueError, match=r"none\.jsonl"):
        train(runs.recipe(tmp_path, "--train.max_steps", "1", "--data.train", str(tmp_path / "none.jsonl")))
    train(runs.recipe(tmp_path, "--train.max_steps", "1"))
    assert (tmp_path / "run/model").is_dir()


def test_a_folder_of_something_else(tmp_path):
    cfg = runs.recipe(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("ten years of work")
    with pytest.raises(
        ValueError, match=r"is not empty \(thesis.tex, …\) and no run of fastpost. Nothing is overwritten"
    ):
        train(cfg)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.tex"]
    cfg.train.output_dir = str(tmp_path / "train.jsonl")
    with pytest.raises(ValueError, match="expected a folder, got the file"):
        train(cfg)


def test_resume_never(tmp_path):
    train(runs.recipe(tmp_path, "--train.max_steps", "1"))
    with pytest.raises(ValueError, match="already holds a run and resume is 'never'"):
        train(runs.recipe(tmp_path, "--train.max_steps", "1", "--train.resume", "never"))


def test_a_folder_in_use(tmp_path):
    cfg = runs.recipe(tmp_path)
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run/.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="is in use by another process"):
            train(cfg)


# ---- what comes out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [True, False])
def test_final_model_has_the_files_and_keys_that_came_in(tmp_path, tie):
    train(runs.recipe(tmp_path, "--train.max_steps", "2", model={"tie": tie}))
    before, after = (load_file(tmp_path / p / "model.safetensors") for p in ("model", "run/model"))
    assert {k: (v.dtype, v.shape) for k, v in before.items()} == {k: (v.dtype, v.shape) for k, v in after.items()}
    assert {p.name for p in (tmp_path / "model").iterdir()} == {p.name for p in (tmp_path / "run/model").iterdir()}
    # float32 came in, so the float32 master goes out: not merely bf16 values in float32 clothes
    moved = after["model.layers.0.mlp.up_proj.weight"]
    assert not torch.equal(moved, moved.bfloat16().float())
    assert (moved - before["model.layers.0.mlp.up_proj.weight"]).abs().max() > 1e-4


def test_export_a_checkpoint(tmp_path):
    train(runs.recipe(tmp_path))
    out = export(tmp_path / "run", tmp_path / "four", step=4, dtype="fp32")
    shorter = runs.recipe(tmp_path, "--train.output_dir", str(tmp_path / "again"))
    runs.in_child(runs.killed_at(shorter, train.__globals__["checkpoint"], "save", 2, after=True))
    other = export(tmp_path / "again", tmp_path / "newest")
    assert (out / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    half = export(tmp_path / "run", tmp_path / "final", dtype="bf16")
    assert {v.dtype for v in load_file(half / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(ValueError, match=r"--step: expected one of 2, 4, got 3"):
        export(tmp_path / "run", tmp_path / "x", step=3)
    with pytest.raises(ValueError, match=r"expected a run folder with config\.yaml"):
        export(tmp_path / "model", tmp_path / "x")
    with pytest.raises(ValueError, match="not empty"):
        export(tmp_path / "run", out)


# ---- log and sums --------------------------------------------------------------------------------------------------


def test_sums_weigh_micro_batches_by_their_size():
    sums = Sums()
    sums.add("a", torch.tensor([1.0, 2.0, 3.0]))
    sums.add("a", torch.tensor([10.0]))
    sums.add("loss", torch.tensor([6.0]), count=3)
    sums.add("loss", torch.tensor([2.0]), count=1)
    assert sums.means() == {"a": 4.0, "loss": 2.0}


def test_a_terminal_redraws_and_a_file_gets_lines(tmp_path):
    class Terminal(list):
        def write(self, text):
            self.append(text)

        def flush(self):
            pass

        def isatty(self):
            return self.tty

    values = {"loss": 1.0, "grad_norm": 2.0, "learning_rate": 1e-6}
    timing = {"ms": 10.0, "tps": 41234.0, "mfu": None, "memory/peak_gb": 61.25}
    for tty in (True, False):
        stream = Terminal()
        stream.tty = tty
        with RunLog(tmp_path, finished=0, total=900, every=2, stream=stream) as log:
            for step in (1, 2, 3, 4):
                log.step(step, values, timing)
        text = "".join(stream)
        assert text.count("\n") == 3  # the first, 2 and 4
        assert text.count("\r") == (1 if tty else 0)
        assert "step    4/900 | loss 1.0000 | gnorm 2.00 | lr 1.0e-06 | 10 ms | 41.23k tok/s | 61.2 GB | eta " in text


def test_truncate_keeps_bytes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 0, "eval_loss": 1}\n', '{"step": 1, "loss": 0.1}\n', '{"step": 2, "loss": 0.2}\n']
    path.write_text("".join(lines) + '{"step": 3, "lo')
    assert len(metrics.read(path)) == 3
    metrics.truncate(path, 1)
    assert path.read_text() == "".join(lines[:2])
    metrics.truncate(path, 0)
    assert path.read_text() == ""
    metrics.truncate(tmp_path / "absent", 3)


def test_model_and_tokenizer_of_the_result_answer(tmp_path):
    from fastpost.generate import generate

    train(runs.recipe(tmp_path, "--train.max_steps", "1"))
    model = folder.load_model(tmp_path / "run/model", torch.float32, "sdpa")
    tokenizer = folder.load_tokenizer(tmp_path / "run/model")
    greedy = list(generate(model, tokenizer, ["What is 1 + 1?", "Hello"], max_new_tokens=8))
    again = list(generate(model, tokenizer, ["What is 1 + 1?", "Hello"], max_new_tokens=8, seed=3))
    assert greedy == again and len(greedy) == 2
    how = {"max_new_tokens": 12, "temperature": 1.0, "samples": 2}
    first = list(generate(model, tokenizer, ["Hello", "What is 1 + 1?"], **how))
    assert first == list(generate(model, tokenizer, ["Hello", "What is 1 + 1?"], **how))
    assert first[0] != next(generate(model, tokenizer, ["Hello"], seed=1, **how))
    assert first[0] == next(generate(model, tokenizer, ["Hello"], **how))  # whatever else is asked
    assert first[0][0] != first[0][1]
    with pytest.raises(ValueError, match="expected temperature >= 0"):
        list(generate(model, tokenizer, ["Hello"], temperature=-1))

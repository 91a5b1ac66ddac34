# SPDX-License-Identifier: Apache-2.0
"""Frozen log-probs: where they come from, when they are found again and when they must not be."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import runs
import tiny
from fastpost import objectives
from fastpost.data.collate import Example, Sequence, collate
from fastpost.hf import adapter, folder
from fastpost.train import checkpoint, loop, metrics, reference
from fastpost.train.forward import forward
from fastpost.train.loop import train


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(tmp, name, *overrides, **groups):
    """Train one step into tmp/name with a cache of the test's own; returns the metrics."""
    where = ["--train.output_dir", str(tmp / name), "--train.max_steps", "1", "--data.cache", str(tmp / "cache")]
    train(runs.recipe(tmp, *where, *overrides, **groups))
    return metrics.read(tmp / name / "metrics.jsonl")


def kinds(capsys):
    """ "computed" or "reused" for each line that a run printed about frozen log-probs."""
    lines = [x for x in capsys.readouterr().out.splitlines() if ": log-probs of " in x]
    return ["reused" if " rows reused from " in x else "computed" for x in lines]


def with_previous(tmp, seed=5):
    """The tiny rows with rewards; returns the folder of a model that plays the previous policy."""
    runs.recipe(tmp)
    for name in ("train", "eval"):
        rows = [json.loads(line) for line in (tmp / f"{name}.jsonl").read_text().splitlines()]
        for i, row in enumerate(rows):
            row |= {"chosen_reward": 1.0 + i % 3, "rejected_reward": 0.25}
        tiny.write_jsonl(tmp / f"{name}.jsonl", rows)
    return tiny.folder(tmp / "previous", seed=seed)


# ---- the cache -------------------------------------------------------------------------------------------------------


def test_another_run_reuses_what_one_computed(tmp_path, capsys):
    exact = ["--optim.precision", "fp32"]
    first = run(tmp_path, "a", *exact)
    assert kinds(capsys) == ["computed"] * 2
    other = run(tmp_path, "b", *exact, "--objective.beta", "0.3", "--optim.lr", "1e-4")
    assert kinds(capsys) == ["reused"] * 2
    none = run(tmp_path, "c", *exact, "--data.cache", "none")
    assert kinds(capsys) == ["computed"] * 2 and none == first and other != first
    tables = [load_file(tmp_path / n / "reference.safetensors") for n in "abc"]
    assert all(torch.equal(tables[0][k], t[k]) for t in tables for k in ("train", "eval"))
    run(tmp_path, "d", *exact, "--model.lora.rank", "4")  # a new adapter begins as no change
    assert kinds(capsys) == ["reused"] * 2
    run(tmp_path, "e", *exact, "--model.reference", str(tmp_path / "model"))
    assert kinds(capsys) == ["reused"] * 2
    run(tmp_path, "f")  # bf16 beside float32 masters
    assert kinds(capsys) == ["computed"] * 2
    run(tmp_path, "g", "--model.reference", str(tmp_path / "model"))  # bf16 as loaded: half-way cases round to even
    assert kinds(capsys) == ["computed"] * 2


def change_weights(tmp):
    tensors = load_file(tmp / "model/model.safetensors")
    tensors["model.norm.weight"][3] *= 1.5
    save_file(tensors, tmp / "model/model.safetensors", metadata={"format": "pt"})


def change_config(tmp):
    file = tmp / "model/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 1e-3}))


def change_rows(tmp):
    tiny.write_jsonl(tmp / "train.jsonl", tiny.preference_rows(22, seed=1))


CHANGES = {
    "weights": (change_weights, [], 2),
    "config of the model": (change_config, [], 2),
    "rows": (change_rows, [], 1),
    "which tokens are scored": (None, ["--data.mask", "full"], 2),
    "temperature": (None, ["--model.temperature", "0.7"], 2),
    "packing": (None, ["--train.seed", "1"], 1),  # the held-out rows are packed as before
    "precision": (None, ["--optim.precision", "fp32"], 2),
    "nothing shared": (None, ["--data.share_prompt", "false"], 2),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_changes_numbers_is_computed_anew(tmp_path, capsys, what):
    change, overrides, anew = CHANGES[what]
    run(tmp_path, "a", model={"tie": False})
    capsys.readouterr()
    if change:
        change(tmp_path)
    again = run(tmp_path, "b", *overrides)
    assert kinds(capsys).count("computed") == anew
    assert again == run(tmp_path, "c", *overrides, "--data.cache", "none")


def test_a_new_adapter_on_the_head_takes_another_kernel(tmp_path, capsys):
    """B = 0 changes no number, but in bfloat16 the other kernel's last bits are others."""
    lora = ["--model.lora.rank", "2", "--model.lora.targets"]
    run(tmp_path, "a", *lora, "[q_proj]", "--model.reference", str(tmp_path / "model"), model={"tie": False})
    run(tmp_path, "b", *lora, "[q_proj, lm_head]")
    assert kinds(capsys) == ["computed"] * 4
    run(tmp_path, "c", *lora, "[q_proj, lm_head]", "--objective.beta", "0.2")
    assert kinds(capsys) == ["reused"] * 2


def test_an_adapter_is_part_of_the_key(tmp_path, capsys):
    run(tmp_path, "sft", "--model.lora.rank", "4", "--optim.lr", "1e-2", objective={"name": "simpo"})
    one = run(tmp_path, "a", "--model.reference", str(tmp_path / "sft"))
    run(tmp_path, "b", "--model.reference", str(tmp_path / "sft/adapter"))
    assert kinds(capsys) == ["computed", "computed", "reused", "reused"]
    file = tmp_path / "sft/adapter" / adapter.WEIGHTS
    save_file({k: v * 2 for k, v in load_file(file).items()}, file)
    other = run(tmp_path, "c", "--model.reference", str(tmp_path / "sft"))
    assert kinds(capsys) == ["computed"] * 2 and one[1]["loss"] != other[1]["loss"]


def test_a_damaged_or_unwritable_cache_costs_time_only(tmp_path, capsys, monkeypatch):
    first = run(tmp_path, "a")
    files = list((tmp_path / "cache/logprobs").iterdir())
    assert len(files) == 2 and all(f.suffix == ".safetensors" for f in files)
    for file in files:
        file.write_bytes(file.read_bytes()[:-5])
    capsys.readouterr()
    assert run(tmp_path, "b") == first and kinds(capsys) == ["computed"] * 2
    (tmp_path / "full").write_text("a file where the folder should be")
    assert run(tmp_path, "c", "--data.cache", str(tmp_path / "full")) == first
    assert "cannot be written, so they are not kept" in capsys.readouterr().out


def test_a_resumed_run_notices_another_model(tmp_path):
    cfg = runs.recipe(tmp_path)
    assert runs.in_child(runs.killed_at(cfg, checkpoint, "save", 1)) != 0
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    change_weights(tmp_path)
    with pytest.raises(
        ValueError, match=r"'train' holds log-probs of other tokens or of another model.*another folder"
    ):
        train(cfg)


# ---- where they come from --------------------------------------------------------------------------------------------


def test_previous_of_a_folder_equals_previous_of_columns(tmp_path):
    """INPO needs two frozen models; both may be folders, and both may be stored numbers."""
    previous = with_previous(tmp_path)
    reference_model = tiny.folder(tmp_path / "reference", seed=6)
    inpo = {"objective": {"name": "inpo"}, "optim": {"precision": "fp32"}}
    both = ["--model.reference", str(reference_model), "--model.previous", str(previous)]
    computed = run(tmp_path, "a", *both, **inpo)
    table = load_file(tmp_path / "a/reference.safetensors")
    assert sorted(table) == ["eval", "previous.eval", "previous.train", "train"]
    for name in ("train", "eval"):
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for kind, entry in (("reference", name), ("previous", f"previous.{name}")):
            for row, (chosen, rejected) in zip(rows, table[entry].tolist(), strict=True):
                row |= {f"{kind}_chosen_logps": chosen, f"{kind}_rejected_logps": rejected}
        tiny.write_jsonl(tmp_path / f"{name}.jsonl", rows)
    assert run(tmp_path, "b", "--model.reference", "columns", **inpo) == computed
    # reference = previous: the same numbers in both places, wherever `previous` comes from
    stored = run(tmp_path, "c", "--model.reference", "previous", **inpo)
    assert stored == run(tmp_path, "d", "--model.reference", "previous", "--model.previous", str(previous), **inpo)
    twice = ["--model.reference", str(previous), "--model.previous", str(previous)]
    assert stored == run(tmp_path, "e", *twice, **inpo) != computed


def test_inpo_begins_at_its_closed_form(tmp_path, capsys):
    """Policy = reference = previous: (0 - 1 / 2 eta)^2."""
    with_previous(tmp_path)
    rows = run(tmp_path, "a", "--model.previous", "start", objective={"name": "inpo", "eta": 0.5})
    assert rows[1]["loss"] == pytest.approx(1.0, abs=1e-6)
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("check"))
    assert "reference = start, previous = start" in line and line.endswith("ok")


@pytest.mark.parametrize("name", ["rebel", "refuel"])
def test_rebel_begins_at_eta_squared_reward_difference_squared(tmp_path, name):
    """At the previous policy A = 0 whatever the temperature, as long as both use the same."""
    with_previous(tmp_path)
    objective = {"name": name, "eta": 0.5}
    rows = run(
        tmp_path, "a", "--model.previous", "start", "--model.temperature", "0.8", "--train.batch_size", "22",
        objective=objective,
    )  # fmt: skip
    gaps = [1.0 + i % 3 - 0.25 for i in range(22)]
    assert rows[1]["loss"] == pytest.approx(sum(0.25 * g * g for g in gaps) / 22, abs=1e-6)
    assert rows[1]["grad_norm"] > 0


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_temperature_divides_the_logits(kind):
    model = tiny.model(kind)
    ids = [5, 9, 300, 17, 8, 44]
    batch = collate([Example(0, (Sequence(ids, bytes(2) + b"\1" * 4),))])
    logits = model(torch.tensor([ids])).logits[0].double()
    for temperature in (1.0, 0.8):
        logp = (logits / temperature).log_softmax(-1)[1:-1].gather(1, torch.tensor(ids[2:])[:, None]).sum()
        out = forward(model, batch, objectives.SFT(), temperature)
        torch.testing.assert_close(out.logprob[0].double(), logp, rtol=1e-5, atol=1e-4)


def test_sources_are_resolved_and_checked(tmp_path):
    cfg = runs.recipe(tmp_path).model
    dpo, inpo, sft = objectives.DPO(), objectives.INPO(), objectives.SFT()
    assert reference.sources(cfg, sft) == {} and reference.describe({}) == "none" and not reference.is_start({})
    assert reference.sources(cfg, dpo) == {"reference_logprob": "start"}
    found = reference.sources(cfg, inpo)
    assert found == {"previous_logprob": "columns", "reference_logprob": "start"}
    assert reference.columns(inpo, found) == ("previous_logprob",) and not reference.is_start(found)
    cfg.previous = "base"
    assert reference.columns(inpo, reference.sources(cfg, inpo)) == ()
    assert reference.is_start(reference.sources(cfg, inpo))
    cfg.reference = "previous"
    assert reference.sources(cfg, dpo) == {"previous_logprob": "base", "reference_logprob": "previous"}

    def message(objective, **fields):
        for name, value in fields.items():
            setattr(cfg, name, value)
        with pytest.raises(ValueError) as error:
            reference.sources(cfg, objective)
        return str(error.value)

    assert "model.reference: expected start, base, columns, previous or the folder" in message(dpo, reference="strat")
    assert "got 'strat', and there is no such folder" in message(dpo, reference="strat")
    assert "model.previous: expected start, base, columns or the folder" in message(
        inpo, reference="start", previous="previous"
    )
    (tmp_path / "empty").mkdir()
    assert "no config.json" in message(dpo, reference=str(tmp_path / "empty"))
    assert "DPO needs log-probs of a reference, got 'none'" in message(dpo, reference="none")


def test_data_asks_for_the_columns_that_are_not_computed(tmp_path):
    with_previous(tmp_path)
    with pytest.raises(ValueError, match="column 'previous_chosen_logps' is missing"):
        run(tmp_path, "a", objective={"name": "rebel"})
    run(tmp_path, "b", "--model.previous", "start", objective={"name": "rebel"})
    values = loop.load_data(runs.recipe(tmp_path), tiny.tokenizer(), objectives.REBEL(), {"previous_logprob": "start"})
    values = values["train"]
    assert values.examples[0].previous_logprob is None


def test_a_reference_of_a_run_is_its_result(tmp_path):
    """A full run and an adapter run stand for their models; the same numbers as those of the merged folder, rounded."""
    run(tmp_path, "full", "--optim.lr", "1e-2", objective={"name": "simpo"})
    run(tmp_path, "lora", "--model.lora.rank", "8", "--optim.lr", "1e-2", objective={"name": "simpo"})
    model = adapter.merged(adapter.load(tmp_path / "lora"))
    folder.save_folder(model, tmp_path / "model", tmp_path / "merged")
    exact = {"optim": {"precision": "fp32"}}
    losses = {}
    for name, path in (("full", "full"), ("model", "full/model"), ("lora", "lora"), ("merged", "merged")):
        losses[name] = run(tmp_path, f"after {name}", "--model.reference", str(tmp_path / path), **exact)[1]["loss"]
    assert losses["full"] == losses["model"] != losses["lora"]
    assert losses["lora"] == pytest.approx(losses["merged"], abs=1e-5)

# SPDX-License-Identifier: Apache-2.0
"""Two ranks train the model that one process trains: as copies (ddp) and in parts (fsdp), with rows that do not divide,
through resumes with other ranks, signals and failures."""

import json
import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

import launch
import runs
import tiny
from fastpost.data.collate import Example, Sequence, collate
from fastpost.train import checkpoint, loop, metrics, step
from fastpost.train.distributed import Ranks
from fastpost.train.loop import train
from fastpost.train.plan import even

KINDS = ("ddp", "fsdp")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recipe(tmp, kind, *overrides, name="dpo", precision="fp32", model=None, out=None, **train_keys):
    """8 + 8 + 5 rows in micro-batches of 4, twice: bits do not depend on ranks, but for 5 = 3 + 2 rows."""
    cfg = runs.recipe(
        tmp,
        *overrides,
        rows=21,
        model=model,
        objective={"name": name},
        optim={"lr": 1e-3, "precision": precision, "max_grad_norm": None, "weight_decay": 0.1},
        train={
            "output_dir": tmp / (out or kind), "micro_batch_size": 4, "eval_every": 3, "parallel": kind, **train_keys,
        },
    )  # fmt: skip
    if name in ("sft", "kto"):
        tiny.write_jsonl(tmp / "train.jsonl", {"sft": tiny.sft_rows, "kto": tiny.unpaired_rows}[name](21))
        cfg.data.eval = None
    return cfg


def train_on(ranks, cfg):
    assert launch.Forked(lambda: train(cfg), ranks).wait() == [0] * ranks


def final(run):
    return load_file(run / "model/model.safetensors")


# ---- one curve -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["tied", "separate head"])
def runs_of_each(request, tmp_path_factory):
    tmp, model = tmp_path_factory.mktemp("each"), {"tie": request.param == "tied"}
    for kind, ranks in (("auto", 1), ("ddp", 2), ("fsdp", 2)):
        train_on(ranks, recipe(tmp, kind, "--train.max_steps", "2", model=model))
        train_on(ranks, recipe(tmp, kind, model=model, out=f"{kind}-6"))
    return tmp, request.param


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_are_one_process_to_the_bit(runs_of_each, kind):
    """Steps of two micro-batches: a + b is what either rank adds up. fp32, no clipping (its norm sums in parts)."""
    tmp, head = runs_of_each
    ours, alone = (metrics.read(tmp / out / "metrics.jsonl") for out in (kind, "auto"))
    exact = kind == "ddp" or head == "tied"  # a separate head is computed where its shards are, in another order
    for a, b in zip(ours, alone, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            close = {"rel": 1e-6 if name == "grad_norm" else 1e-14, "abs": 0} if exact else {"rel": 1e-5, "abs": 1e-6}
            assert a[name] == pytest.approx(b[name], **close), name
    for name, weight in final(tmp / "auto").items():
        other = final(tmp / kind)[name]
        assert torch.equal(weight, other) if exact else (weight - other).abs().max() < 2e-5, name


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_do_not_divide(runs_of_each, kind):
    """The third step of each epoch has 5 rows, cut 3 + 2 for two ranks and 4 + 1 for one process."""
    tmp, _ = runs_of_each
    difference = launch.losses(tmp / f"{kind}-6") - launch.losses(tmp / "auto-6")
    assert len(difference) == 6 and difference.abs().max() < 2e-6
    for row, other in zip(*(metrics.read(tmp / f"{k}-6/metrics.jsonl") for k in (kind, "auto")), strict=True):
        assert row.get("eval_rows") == other.get("eval_rows") and row.get("num_tokens") == other.get("num_tokens")
    stored = load_file(tmp / f"{kind}-6/reference.safetensors")
    for name, values in load_file(tmp / "auto-6/reference.safetensors").items():
        torch.testing.assert_close(stored[name], values, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["sft", "kto"])
def test_a_rank_without_rows_adds_nothing(tmp_path, kind, name):
    """Steps of one row on two ranks. KTO: a rank has rewards/chosen or rewards/rejected, never both."""
    keys = {"batch_size": 1, "max_steps": 3, "save_every": 0}
    train_on(1, recipe(tmp_path, "auto", name=name, **keys))
    train_on(2, recipe(tmp_path, kind, name=name, **keys))
    assert (launch.losses(tmp_path / kind) - launch.losses(tmp_path / "auto")).abs().max() < 1e-7
    for a, b in zip(*(metrics.read(tmp_path / k / "metrics.jsonl") for k in (kind, "auto")), strict=True):
        assert a.keys() == b.keys()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_differs_by_noise_without_a_drift(tmp_path, kind):
    keys = {"epochs": 8, "save_every": 0, "eval_every": 0}
    for parallel, ranks in (("auto", 1), (kind, 2)):
        cfg = recipe(tmp_path, parallel, "--optim.lr", "3e-4", precision="bf16", **keys)
        train_on(ranks, cfg)
    residual = launch.losses(tmp_path / kind) - launch.losses(tmp_path / "auto")
    assert len(residual) == 24
    assert residual.abs().max() < 0.01 and residual.mean().abs() < 4 * residual.std() / len(residual) ** 0.5 + 1e-4
    for name, weight in final(tmp_path / "auto").items():  # the float32 master came out, whole
        assert weight.dtype == torch.float32 and not torch.equal(weight, weight.bfloat16().float())
        assert (weight - final(tmp_path / kind)[name]).abs().max() < 24 * 3e-4


@pytest.mark.parametrize("kind", KINDS)
def test_recomputing_changes_no_bit(tmp_path, kind):
    """Dropout included, which ranks draw independently."""
    curves = []
    for how in ("none", "selective", "full"):
        options = {"gradient_checkpointing": how, "max_steps": 2, "save_every": 0}
        train_on(2, recipe(tmp_path, kind, model={"attention_dropout": 0.2}, out=how, **options))
        curves.append((tmp_path / how / "metrics.jsonl").read_bytes())
    assert curves[0] == curves[1] == curves[2]


@pytest.mark.parametrize("kind", KINDS)
def test_adapters(tmp_path, kind):
    """LoRA by peft, on the head, too: only adapters are trained, saved and added up; the frozen weights are sharded."""
    import peft

    from fastpost.hf import attention
    from fastpost.objectives import SimPO
    from fastpost.train.distributed import join
    from fastpost.train.optim import AdamW
    from fastpost.train.sharding import place

    attention.register()

    def sequence(i, k):
        return Sequence([(j * k + i) % 300 for j in range(20 + i)], bytes(5) + bytes([1]) * (15 + i))

    rows = [Example(i, (sequence(i, 7), sequence(i, 5))) for i in range(4)]

    def action():
        with join() as ranks:
            ranks.connect(torch.device("cpu"))
            torch.manual_seed(0)
            model = tiny.model("llama", tie=False)
            model.set_attn_implementation(attention.NAME)
            lora = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj", "lm_head"], init_lora_weights=False)
            model = place(peft.get_peft_model(model, lora), torch.device("cpu"), kind, ranks)
            optimizer = AdamW(model, precision="fp32")
            batches = [collate(rows[:2]), collate(rows[2:])][ranks.rank :: ranks.size]
            found = []
            for number in range(4):
                values = step.train_step(
                    model, SimPO(), optimizer, batches, step=number, lr=1e-3, max_grad_norm=None, ranks=ranks
                )
                found.append(values["loss"])
            checkpoint.save(tmp_path / f"{kind}-{ranks.size}", 4, model, optimizer, ranks=ranks)
            assert checkpoint.load(tmp_path / f"{kind}-{ranks.size}/step-000004", model, optimizer, ranks=ranks) == 4
            names = {name for name in checkpoint.tensors(model, optimizer) if name.startswith("model.")}
            assert len(names) == len(optimizer.parameters) == 10 and all("lora_" in name for name in names)
            if ranks.first:
                (tmp_path / f"losses-{ranks.size}").write_text(json.dumps(found))

    for size in (1, 2):
        assert launch.Forked(action, size).wait() == [0] * size
    alone, two = (json.loads((tmp_path / f"losses-{size}").read_text()) for size in (1, 2))
    assert two == pytest.approx(alone, abs=1e-6) and alone[-1] < alone[0]


# ---- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "pure-bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_resume_with_the_same_ranks_is_exact(tmp_path, kind, precision):
    """Dropout is on, so each rank's own random state matters."""
    options = {"precision": precision, "model": {"attention_dropout": 0.2}}
    train_on(2, recipe(tmp_path, kind, **options))
    cut = recipe(tmp_path, kind, out="cut", **options)
    assert launch.Forked(runs.killed_at(cut, loop, "train_step", 6)).wait() == [-signal.SIGKILL] * 2
    train_on(2, cut)
    assert runs.outcome(tmp_path / "cut") == runs.outcome(tmp_path / kind)


@pytest.mark.slow
@pytest.mark.parametrize("before,after", [("fsdp", "auto"), ("auto", "fsdp"), ("ddp", "fsdp"), ("fsdp", "ddp")])
def test_resume_with_other_ranks(tmp_path, capfd, before, after):
    """Weights, remainders and moments are the same numbers whoever holds them; one line says so."""
    size = {"auto": 1, "ddp": 2, "fsdp": 2}
    cut = recipe(tmp_path, before, precision="bf16", out="cut")
    launch.Forked(runs.killed_at(cut, loop, "train_step", 5), size[before]).wait()
    stored = tmp_path / "cut/checkpoints/step-000004"
    assert stored.is_dir()
    capfd.readouterr()
    cut.train.parallel = after
    train_on(size[after], cut)
    assert f"written by {size[before]} ranks" in capfd.readouterr().out
    train_on(1, recipe(tmp_path, "auto", precision="bf16"))
    assert (launch.losses(tmp_path / "cut") - launch.losses(tmp_path / "auto")).abs().max() < 0.01


def test_a_checkpoint_is_the_same_whoever_wrote_it(tmp_path):
    """The first two steps agree to the bit, so what one process reads from each checkpoint does, too."""
    from fastpost.train.export import export

    states = []
    for kind, ranks in (("auto", 1), ("ddp", 2), ("fsdp", 2)):
        train_on(ranks, recipe(tmp_path, kind, max_steps=3))
        out = export(tmp_path / kind, tmp_path / f"{kind}-model", step=2)
        states.append((out / "model.safetensors").read_bytes())
    assert states[0] == states[1] == states[2]
    shards = [len(list((tmp_path / k / "checkpoints/step-000002").glob("*.safetensors"))) for k in ("auto", "fsdp")]
    assert shards == [1, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_on_one_rank(tmp_path, kind):
    """The second checkpoint fails on rank 1: both ranks end, the first stays, nothing is left behind."""
    import safetensors.torch

    cfg, errors = recipe(tmp_path, kind), tmp_path / "stderr"

    def action():
        save, calls = safetensors.torch.save, 0

        def full(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == 2 and os.environ["RANK"] == "1":
                raise OSError(28, "No space left on device")
            return save(*args, **kwargs)

        safetensors.torch.save = full
        from fastpost.cli.train import main

        raise SystemExit(main([str(tmp_path / "recipe.yaml")]))

    assert launch.Forked(action, stderr=errors).wait() == [1, 1]
    text = errors.read_text()
    assert text.count("[checkpoint] step 4: could not write") == 1 and "No space left on device" in text
    assert "step-000002, is untouched" in text
    assert [p.name for p in (tmp_path / kind / "checkpoints").iterdir()] == ["step-000002"]
    train_on(2, cfg)


# ---- signals -------------------------------------------------------------------------------------------------------


def long_run(tmp, kind, **keys):
    return recipe(tmp, kind, epochs=6, save_every=0, eval_every=0, **keys)


@pytest.mark.slow
@pytest.mark.parametrize("kind,number", [("auto", signal.SIGTERM), ("auto", signal.SIGINT), ("fsdp", signal.SIGTERM)])
def test_asked_to_stop(tmp_path, capfd, kind, number):
    """A signal to one rank stops all of them after the same step, with a checkpoint; then the run goes on."""
    size = 1 if kind == "auto" else 2
    cfg = long_run(tmp_path, kind, model={"attention_dropout": 0.2})
    ranks = launch.Forked(lambda: train(cfg), size)
    launch.wait_for_step(tmp_path / kind, 3, ranks.running)
    ranks.send(number, rank=size - 1)
    assert ranks.wait() == [128 + number] * size
    done = len(launch.losses(tmp_path / kind))
    assert 3 <= done < 18
    assert [p.name for p in (tmp_path / kind / "checkpoints").iterdir()] == [f"step-{done:06d}"]
    said = capfd.readouterr()
    assert said.out.count(f"stopped after step {done}/18; the same command goes on from there") == 1
    assert ("stopping after this step, with a checkpoint" in said.err) == (size == 1)  # the first rank got none
    train_on(size, cfg)
    train_on(size, long_run(tmp_path, kind, out="whole"))
    assert runs.outcome(tmp_path / kind) == runs.outcome(tmp_path / "whole")


def test_a_second_ctrl_c_interrupts_at_once(tmp_path):
    cfg = long_run(tmp_path, "auto")

    def stuck():
        loop.train_step = lambda *args, **kwargs: time.sleep(60)
        train(cfg)

    ranks = launch.Forked(stuck, 1, stderr=tmp_path / "stderr")
    while not (tmp_path / "auto/metrics.jsonl").exists():
        time.sleep(0.01)
    time.sleep(0.2)
    begin = time.monotonic()
    ranks.send(signal.SIGINT)
    time.sleep(0.1)
    ranks.send(signal.SIGINT)  # the same key press, through torchrun
    time.sleep(2.2)
    assert ranks.running()
    ranks.send(signal.SIGINT)
    assert ranks.wait() == [1] and time.monotonic() - begin < 20
    assert "KeyboardInterrupt" in (tmp_path / "stderr").read_text()


# ---- failures ------------------------------------------------------------------------------------------------------


def fails(tmp, action, size=2):
    """Exit codes and stderr of the command `fastpost train` after `action()`; it must not hang."""
    from fastpost.cli import main

    def run():
        action()
        raise SystemExit(main(["train", str(tmp / "recipe.yaml")]))

    begin = time.monotonic()
    codes = launch.Forked(run, size, stderr=tmp / "stderr").wait()
    assert time.monotonic() - begin < 60
    return codes, (tmp / "stderr").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_on_one_rank_ends_all_with_one_message(tmp_path, kind):
    recipe(tmp_path, kind)

    def action():
        forward, calls = step.forward, 0

        def unlucky(*args):
            nonlocal calls
            calls += 1
            if calls == 3 and os.environ["RANK"] == "1":
                raise ValueError("[test] rank 1: expected luck, got none. Try again.")
            return forward(*args)

        step.forward = unlucky

    codes, text = fails(tmp_path, action)
    assert codes == [1, 1]
    assert [line for line in text.splitlines() if line.startswith("fastpost:")] == [
        "fastpost: [test] rank 1: expected luck, got none. Try again."
    ]


def test_the_same_mistake_is_said_once(tmp_path):
    cfg = recipe(tmp_path, "ddp", "--data.train", "none.jsonl")
    recipe_path = tmp_path / "recipe.yaml"
    recipe_path.write_text(recipe_path.read_text().replace(str(tmp_path / "train.jsonl"), "none.jsonl"))
    codes, text = fails(tmp_path, lambda: None)
    assert codes == [1, 1] and text.count("got none.jsonl, and there is no such file") == 1
    (tmp_path / "ddp" / "config.yaml").unlink()
    (tmp_path / "ddp" / "thesis.tex").write_text("ten years of work")
    codes, text = fails(tmp_path, lambda: None)  # only the first rank looks
    assert codes == [1, 1] and text.count("no run of fastpost. Nothing is overwritten") == 1
    assert cfg.train.parallel == "ddp"


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_is_killed(tmp_path, kind):
    recipe(tmp_path, kind)
    codes, text = fails(tmp_path, lambda: killed_in_step_3(rank="1"))
    assert codes == [1, -signal.SIGKILL]
    assert text.count("fastpost:") == 1 and "another rank ended without a word" in text and "same command" in text
    assert [p.name for p in checkpoint.checkpoints(tmp_path / kind / "checkpoints")] == ["step-000002"]


def killed_in_step_3(rank):
    original, calls = step.Gradients.reduce, 0

    def dies(self):
        nonlocal calls
        calls += 1
        if calls == 3 and os.environ["RANK"] == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self)

    step.Gradients.reduce = dies


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_is_not_finite_is_said_once_and_names_the_row(tmp_path, kind):
    recipe(tmp_path, kind)
    from fastpost.data.loader import order

    row = order(0, 0, 21)[9]

    def action():
        attach = loop.reference.attach

        def bad(cfg, sources, data, *args, **options):
            attach(cfg, sources, data, *args, **options)
            values = torch.tensor([example.reference_logprob for example in data["train"].examples])
            values[row, 0] = torch.inf
            data["train"].examples.put("reference_logprob", values)

        loop.reference.attach = bad

    codes, text = fails(tmp_path, action)
    assert codes == [1, 1]
    assert text.count("[train] step 2: the loss is") == 1 and f"Data rows: {row}. The step was not taken" in text


# ---- who computes what ---------------------------------------------------------------------------------------------


class Row:
    def __init__(self, computed):
        self.computed = computed


def test_micro_batches_are_dealt_once_each_and_evenly():
    rows = [Row(n) for n in (50, 10, 40, 30, 20, 60, 5)]
    parts = even([[0, 1, 2], [3, 4], [5, 6]], 4, rows)
    assert len(parts) == 4 and sorted(r for p in parts for r in p) == list(range(7))
    assert [r for p in parts for r in p] == [0, 1, 2, 3, 4, 5, 6]  # cut, not shuffled
    assert even([[0], [1]], 4, rows) == [[0], [1]]  # nothing left to cut
    assert even([[0, 1, 2]], 1, rows) == [[0, 1, 2]]
    for size in (2, 3, 4, 5):
        shares = []
        for rank in range(size):
            ranks = Ranks(rank, size)
            ranks.sharded = True
            shares.append(ranks.deal(parts, rows))
        assert sorted(map(tuple, (p for s in shares for p in s.mine))) == sorted(map(tuple, parts))
        assert len({len(s.mine) + len(s.idle) for s in shares}) == 1  # as many collective calls on each
        assert all(s.idle in ([], [[6]]) for s in shares)  # the smallest row
    assert Ranks(4, 5).deal(parts, rows) == ([], [])  # copies wait for nobody


def test_auto_copies_what_is_small_and_shards_what_is_not():
    from fastpost.train.sharding import choose

    class Model:
        def __init__(self, trained, frozen=0):
            self.all = [
                torch.nn.Parameter(torch.empty(n, dtype=torch.bfloat16, device="meta"), requires_grad=grad)
                for n, grad in ((trained, True), (frozen, False))
            ]

        def parameters(self):
            return iter(self.all)

    two = Ranks(0, 2)
    assert choose("auto", Model(999_000_000), two) == "ddp" and choose("auto", Model(1_001_000_000), two) == "fsdp"
    assert choose("auto", Model(10_000_000, 7_000_000_000), two) == "ddp"  # adapters on a frozen 7B
    assert choose("fsdp", Model(1), two) == "fsdp" and choose("fsdp", Model(1), Ranks()) == "alone"


def test_ranks_and_parallel_do_not_make_another_run(tmp_path):
    cfg = recipe(tmp_path, "ddp", max_steps=1)
    train_on(2, cfg)
    cfg.train.parallel = "fsdp"
    train_on(1, cfg)  # "is finished", not "other settings"
    assert json.loads((tmp_path / "ddp/metrics.jsonl").read_text().splitlines()[1])["step"] == 1

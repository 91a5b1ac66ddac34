# SPDX-License-Identifier: Apache-2.0
"""Averaged checkpoints and the distance that each layer has moved, against numbers worked out by hand."""

import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import runs
import tiny
from fastpost.cli import main
from fastpost.hf import folder
from fastpost.train import averaging, checkpoint
from fastpost.train.export import export
from fastpost.train.loop import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with checkpoints 1 to 5 and a model after 6 steps, in float32 files."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    tmp = tmp_path_factory.mktemp("average")
    train(runs.recipe(tmp, "--train.save_every", "1", "--train.keep_latest", "9", "--optim.lr", "0.01"))
    torch.set_num_threads(before)
    return tmp / "run"


def weights(path):
    return load_file(path / "model.safetensors")


def at(run, step, out):
    return weights(run / "model" if step == 6 else export(run, out / str(step), step=step, dtype="fp32"))


def test_the_mean_of_the_last_checkpoints(run, tmp_path):
    """Masters are averaged, not their bf16 halves, in more than float32, and the finished model is the newest."""
    ours = weights(export(run, tmp_path / "out", average="last:3", dtype="fp32"))
    parts = [at(run, step, tmp_path) for step in (4, 5, 6)]
    assert len(ours) == len(parts[0]) > 10
    for name, w in ours.items():
        expected = (sum(p[name].double() for p in parts) / 3).float()
        assert torch.equal(w, expected), name
        assert w.ndim == 1 or not torch.equal(w, parts[0][name])
    named = weights(export(run, tmp_path / "named", average="final, 4,5", dtype="fp32"))
    assert all(torch.equal(named[k], ours[k]) for k in ours)
    rounded = weights(export(run, tmp_path / "bf16", average="last:3", dtype="bf16"))
    assert all(torch.equal(rounded[k], ours[k].bfloat16()) for k in ours)  # cast once, at the end


def test_equal_checkpoints_give_themselves_and_opposite_ones_zero(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    found = checkpoint.checkpoints(copy / "checkpoints")
    for path in found[1:]:
        shutil.rmtree(path)
        shutil.copytree(found[0], path)
    same = weights(export(copy, tmp_path / "same", average="1,2,3", dtype="fp32"))
    one = weights(export(copy, tmp_path / "one", step=1, dtype="fp32"))
    assert all(torch.equal(same[k], one[k]) for k in one)  # three, so a sum in float32 would round

    # A remainder belongs to the magnitude of its bf16 half, so the opposite weight has the same one.
    for file in found[1].glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            metadata, tensors = stored.metadata(), {k: stored.get_tensor(k) for k in list(stored.keys())}
        save_file({k: -v if k.startswith("model.") else v for k, v in tensors.items()}, file, metadata)
    zero = weights(export(copy, tmp_path / "zero", average="1,2", dtype="fp32"))
    assert all((w == 0).all() for w in zero.values())


def test_frozen_weights_stay_as_they_are(tmp_path):
    train(runs.recipe(tmp_path, "--model.train", "last:1"))
    out = weights(export(tmp_path / "run", tmp_path / "out", average="last:2"))
    start = weights(tmp_path / "model")
    for name, w in start.items():
        assert torch.equal(w, out[name]) == (".layers.1." not in name), name


@pytest.mark.parametrize(
    "which, expected",
    [
        ("last:9", "expected at most 6 checkpoints, got 'last:9'. It has 1, 2, 3, 4, 5, final; train.keep_latest says"),
        ("last:0", "expected at most 6 checkpoints, got 'last:0'."),
        ("4,7", "expected last:N or steps of this run, got '7' in '4,7'. It has 1, 2, 3, 4, 5, final;"),
        ("newest", "expected last:N or steps of this run, got 'newest' in 'newest'."),
        ("4,4", "'4,4' names a checkpoint twice. Name each once."),
    ],
)
def test_what_is_not_there_cannot_be_averaged(run, tmp_path, which, expected):
    with pytest.raises(ValueError) as error:
        export(run, tmp_path / "x", average=which)
    assert str(error.value).startswith(f"[export] --average: {expected}")
    assert not (tmp_path / "x").exists()


def test_average_excludes_step_and_ema(run, tmp_path):
    with pytest.raises(ValueError, match=r"names its checkpoints itself\. Leave --step and --ema out"):
        export(run, tmp_path / "x", average="last:2", step=4)


# ---- how far layers have moved -------------------------------------------------------------------------------------


def test_updates_of_two_layers_by_hand():
    now, start = tiny.model(layers=2), tiny.model(layers=2)
    with torch.no_grad():
        for i, part in ((0, 0.03), (1, 0.01)):
            for p in now.model.layers[i].parameters():
                p.mul_(1 + part)
        now.model.layers[1].mlp.up_proj.weight.copy_(start.model.layers[1].mlp.up_proj.weight * 1.02)
        now.model.embed_tokens.weight.mul_(9)  # no layer
    up = start.model.layers[1].mlp.up_proj.weight.double().norm().item() ** 2
    all_of_it = sum(p.double().norm().item() ** 2 for p in start.model.layers[1].parameters())
    expected = [0.03, (((all_of_it - up) * 0.01**2 + up * 0.02**2) / all_of_it) ** 0.5]
    updates = averaging.layer_updates(now, start)
    assert updates == pytest.approx(expected, rel=1e-5)
    text = averaging.report(updates)
    assert text.splitlines()[1] == "  layer   0  3.000e-02"
    assert f"bottom 1  3.000e-02   top 1  {expected[1]:.3e}   ratio {0.03 / expected[1]:.3f}" in text


def test_bottom_and_top_are_five_layers():
    text = averaging.report([1.0] * 5 + [9.0, 9.0] + [2.0] * 5)
    assert text.splitlines()[-1] == "bottom 5  1.000e+00   top 5  2.000e+00   ratio 0.500"
    assert "the top ones did not move" in averaging.report([1.0, 0.0])
    assert "bottom" not in averaging.report([1.0])


def test_the_command_line(run, tmp_path, capsys):
    assert main(["export", str(run), str(tmp_path / "out"), "--average", "last:2", "--updates"]) == 0
    out = capsys.readouterr().out
    assert "layer   1" in out and "bottom 1" in out and out.strip().endswith(str(tmp_path / "out"))
    folder.load_model(tmp_path / "out", torch.float32)
    assert main(["export", str(run), str(tmp_path / "x"), "--average", "last:7"]) == 1
    assert "expected at most 6 checkpoints" in capsys.readouterr().err

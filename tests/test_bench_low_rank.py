# SPDX-License-Identifier: Apache-2.0
"""bench.low_rank: the keys are the model's own, the counts are those of the singular values."""

import json
import sys
from pathlib import Path

import pytest
import torch

import tiny

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import low_rank

SCALED = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 128}


@pytest.mark.parametrize("kind, options", [("llama", {}), ("qwen2", {}), ("llama", {"rope_parameters": SCALED})])
def test_keys_before_rope_are_what_the_projection_gave(kind, options):
    model = tiny.model(kind, **options)
    projected = []
    for layer in model.model.layers:
        layer.self_attn.k_proj.register_forward_hook(lambda m, i, out: projected.append(out[0].detach()))
    before, after = low_rank.keys_of(model, torch.randint(7, 320, (1, 90)))
    assert len(before) == len(after) == 2
    for found, wanted, rotated in zip(before, projected, after):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
        assert (rotated - wanted).norm() > 0.1 * wanted.norm()


def test_rope_raises_the_rank_of_keys_that_are_few_directions(tmp_path, capsys):
    """Keys that a projection of rank 2 made: 2 directions before RoPE, many after it."""
    model = tiny.model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            left, right = torch.randn(16, 2), torch.randn(2, 32)
            layer.self_attn.k_proj.weight.copy_(left @ right)
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    rows = [
        {"question": f"What is {i} + {j}?", "answer": f"{i + j} apples", "n": i} for i in range(9) for j in range(9)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert low_rank.text_of(str(tmp_path / "rows.jsonl")).startswith("What is 0 + 0?\n0 apples\n\nWhat is 0 + 1?")
    files = ["--model", str(tmp_path / "model"), "--text", str(tmp_path / "rows.jsonl")]
    assert low_rank.main([*files, "--tokens", "300", "--plot", str(tmp_path / "x.png")]) == 0
    out = capsys.readouterr().out
    assert "300 tokens, keys of 16 dimensions" in out and "in 2 of 2 layers" in out
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    for line in [row.split() for row in out.splitlines()][2:4]:  # layer, three pairs "before / after", two errors, ours
        counts = [int(line[i]) for i in (1, 3, 4, 6, 7, 9)]
        assert counts[0] <= counts[2] <= counts[4] == 2 and counts[1] < counts[3] < counts[5] > 5
        assert float(line[10]) == pytest.approx(float(line[13]), abs=2e-3)  # kv_factorize against the eigenvalues


def test_counts_are_those_of_the_singular_values():
    values = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0])
    left, right = (torch.linalg.qr(torch.randn(n, 5)).Q for n in (40, 5))
    shares = low_rank.spectrum(left * values @ right.T)
    torch.testing.assert_close(shares, (values.square() / values.square().sum()).double(), rtol=0, atol=1e-6)
    assert [low_rank.held(shares, p) for p in (0.5, 0.8, 0.95, 0.99)] == [1, 2, 3, 4]
    assert low_rank.truncation(shares, 2) == pytest.approx((5 / 85) ** 0.5, abs=1e-6)

# SPDX-License-Identifier: Apache-2.0
"""Walking a model block by block, folds, AWQ and SmoothQuant: where nothing is rounded, the exact model comes out."""

import copy

import pytest
import torch

import tiny
from fastpost.hf import folder
from fastpost.hf.perplexity import perplexity, spans
from fastpost.quantize import awq, fold
from fastpost.quantize.blocks import Blocks, Inputs
from fastpost.quantize.grid import Grid
from fastpost.quantize.rtn import rtn
from fastpost.quantize.run import streamed_losses
from fastpost.quantize.smoothquant import absmax_round, round_activations, smooth_block, smooth_scale

ROWS = torch.randint(7, 320, (3, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return {kind: tiny.folder(tmp_path_factory.mktemp(kind) / "m", kind) for kind in
            ("llama", "qwen2", "qwen3", "mistral", "gemma2")}  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma2"])
def test_block_by_block_is_the_model(made, kind):
    """Hidden states after the last block, and the loss with tied heads, softcaps and windows of attention."""
    blocks, model = Blocks(made[kind]), folder.load_model(made[kind], torch.float32, "eager")
    hidden = blocks.start(ROWS)
    for i in range(len(blocks)):
        hidden = list(blocks.run(i, blocks.block(i), hidden))
    with torch.no_grad():
        logits = model(ROWS, use_cache=False).logits.float()
        want = model.base_model(ROWS, use_cache=False).last_hidden_state
    norm = blocks._real(blocks.inner.norm, "model.norm")
    assert torch.allclose(norm(torch.cat(hidden)), want, atol=1e-4)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ROWS[:, 1:].flatten(), reduction="sum")
    total, tokens = streamed_losses(blocks, ROWS)
    assert tokens == 3 * 23 and total == pytest.approx(float(loss), rel=1e-4)


def test_untied_head(tmp_path):
    path = tiny.folder(tmp_path / "m", tie=False)
    model = folder.load_model(path, torch.float32, "sdpa")
    with torch.no_grad():
        logits = model(ROWS, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ROWS[:, 1:].flatten(), reduction="sum")
    assert streamed_losses(Blocks(path), ROWS)[0] == pytest.approx(float(loss), rel=1e-4)


def test_layers_with_the_same_input_share_moments(made):
    blocks = Blocks(made["llama"])
    block, seen = blocks.block(0), []
    inputs = Inputs(block, every=5)
    handle = block.mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0][0]))
    with inputs.gathered():
        list(blocks.run(0, block, blocks.start(ROWS)))
    handle.remove()
    leaders = {name.rpartition(".")[2]: leader.rpartition(".")[2] for name, leader in inputs.leader.items()}
    assert leaders == {"q_proj": "q_proj", "k_proj": "q_proj", "v_proj": "q_proj", "o_proj": "o_proj",
                       "gate_proj": "gate_proj", "up_proj": "gate_proj", "down_proj": "down_proj"}  # fmt: skip
    x = torch.cat(seen)
    found = inputs.of("mlp.down_proj")
    assert found.rows == 72 and torch.allclose(found.hessian, 2 * x.T @ x / 72, rtol=1e-4, atol=1e-6)
    assert torch.equal(inputs.sample["mlp.down_proj"], torch.cat([s[::5] for s in seen]))


def test_refused_models(tmp_path):
    mixture = tiny.folder(tmp_path / "mixtral", "mixtral")
    with pytest.raises(ValueError, match="fused or stacked on loading"):
        Blocks(mixture)
    with pytest.raises(ValueError, match="no such folder"):
        Blocks(tmp_path / "nothing")


# ---- folds -----------------------------------------------------------------------------------------------------------


def same_heads(kind="llama"):
    """A block in which v and o have the same shape, so that all four folds exist."""
    made = tiny.model(kind, num_key_value_heads=4, seed=3)
    block = made.model.layers[0]
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.uniform_(0.5, 1.5)
    return made, block


def output(made, block, x):
    positions = torch.arange(x.shape[1])[None]
    turned = made.model.rotary_emb(x, positions)
    with torch.no_grad():
        out = block(x, position_embeddings=turned, attention_mask=None)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folds_change_nothing(kind, dtype):
    """Also when a norm's weight is rounded to bfloat16: the layers behind it take up the difference."""
    made, block = same_heads(kind)
    x = torch.randn(1, 24, 32)
    before = output(made, block, x)
    folds = fold.places(block)
    assert [f.linears[0].rpartition(".")[2] for f in folds] == ["q_proj", "o_proj", "gate_proj", "down_proj"]
    for f in folds:
        columns = dict(block.named_modules())[f.linears[0]].in_features
        used = fold.apply(block, f, torch.rand(columns) * 3 + 0.2, dtype)
        assert (used > 0).all()
    after = output(made, block, x)
    assert torch.allclose(after, before, atol=2e-5, rtol=1e-4)
    assert torch.equal(block.input_layernorm.weight, block.input_layernorm.weight.to(dtype).float())
    fold.check_unchanged(block, before, after, "awq")


def test_grouped_heads_have_no_fold_into_o(made):
    block = Blocks(made["llama"]).layers[0]
    assert [f.previous for f in fold.places(block)] == ["input_layernorm", "post_attention_layernorm", "mlp.up_proj"]
    assert [f.inspect for f in fold.places(block, between=False)] == ["self_attn", "mlp"]


def test_a_norm_that_adds_one_is_noticed():
    made = tiny.model("gemma2")
    block, x = made.model.layers[0], torch.randn(1, 24, 32)
    before = output(made, block, x)
    fold.apply(block, fold.places(block, between=False)[0], torch.full((32,), 2.0))
    with pytest.raises(ValueError, match="not plain scales"):
        fold.check_unchanged(block, before, output(made, block, x), "smoothquant")


def test_another_block_is_refused():
    with pytest.raises(ValueError, match=r"expected a block like Llama's with input_layernorm"):
        fold.places(torch.nn.Sequential(torch.nn.Linear(4, 4)))


# ---- SmoothQuant -----------------------------------------------------------------------------------------------------


def test_smooth_scale_by_hand():
    largest_x, weight = torch.tensor([4.0, 1.0, 0.0]), torch.tensor([[1.0, -4.0, 1.0], [-0.5, 1.0, 1.0]])
    assert smooth_scale(largest_x, [weight], 0.5)[:2].tolist() == [2.0, 0.5]
    assert smooth_scale(largest_x, [weight], 1.0)[:2].tolist() == [4.0, 1.0]
    assert smooth_scale(largest_x, [weight])[2] > 0


def test_absmax_round_by_hand():
    x = torch.tensor([[7.0, -3.4, 0.4], [0.0, 0.0, 0.0]])
    assert absmax_round(x, 4).tolist() == [[7.0, -3.0, 0.0], [0.0, 0.0, 0.0]]


def test_smoothing_helps_where_a_channel_sticks_out():
    made, block = same_heads()
    with torch.no_grad():
        block.input_layernorm.weight[3] = 60.0
    x, folds = torch.randn(1, 24, 32), fold.places(block, between=False)
    want, errors = output(made, block, x), {}
    for smooth in (False, True):
        trial = copy.deepcopy(block)
        if smooth:
            inputs = Inputs(trial, hessian=False)
            with inputs.gathered():
                output(made, trial, x)
            smooth_block(trial, folds, {n: inputs.of(n).max_abs for n in inputs.leader}, 0.5, torch.float32)
            assert torch.allclose(output(made, trial, x), want, atol=1e-4, rtol=1e-4)
        with torch.no_grad():
            for linear in Blocks.linears(trial).values():
                linear.weight.copy_(absmax_round(linear.weight, 6))
        round_activations(trial, 6)
        errors[smooth] = float((output(made, trial, x) - want).norm())
    assert errors[True] < 0.8 * errors[False]


# ---- AWQ -------------------------------------------------------------------------------------------------------------


def test_candidates():
    found = awq.candidates(torch.tensor([0.01, 1.0, 100.0]))
    assert len(found) == 20 and torch.allclose(found[0], torch.ones(3))
    assert all(float(s.max() * s.min()) == pytest.approx(1.0, rel=1e-5) for s in found)
    assert torch.allclose(found[10], torch.tensor([0.1, 1.0, 10.0]))
    assert torch.isfinite(torch.stack(awq.candidates(torch.tensor([0.0, 1.0])))).all()


def test_search_is_never_worse_than_rounding():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(256, 64, generator=g) * torch.logspace(-1, 1.5, 64)
    weight, grid = torch.randn(48, 64, generator=g), Grid(3)

    def loss(trial):
        return float((x @ (trial[0] - weight).T).square().mean())

    plain = loss([rtn(weight, grid, 32).weight])
    scale = awq.search_scale(x.abs().mean(0), [weight], loss, grid, 32)
    assert loss([rtn(weight * scale, grid, 32).weight / scale]) < 0.8 * plain
    assert awq.search_scale(x.abs().mean(0), [weight], lambda trial: 1.0, grid, 32).unique().tolist() == [1.0]


def test_clip_cuts_outliers_and_only_where_it_pays():
    g = torch.Generator().manual_seed(0)
    x, weight, grid = torch.randn(128, 64, generator=g), torch.randn(300, 64, generator=g), Grid(2)
    cut = awq.search_clip(weight, x, grid, 32)
    assert cut.abs().max() <= weight.abs().max() and (cut.sign() == weight.sign()).all()
    lost = [(x @ (rtn(w, grid, 32).weight - weight).T).square().mean() for w in (weight, cut)]
    assert lost[1] < lost[0]
    shrink = cut.unflatten(1, (2, 32)).abs().amax(-1) / weight.unflatten(1, (2, 32)).abs().amax(-1)
    assert shrink.min() > 0.5 and (shrink <= 1).all()
    exact = rtn(weight, Grid(4), 32).weight  # on the grid already: nothing to win
    assert (awq.search_clip(exact, x, Grid(8), 32) - exact).norm() / exact.norm() < 0.05


# ---- windows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens,window,stride", [(10, 4, 3), (10, 4, 1), (10, 4, 4), (9, 4, 2), (4, 8, 7), (2, 8, 3)])
def test_every_token_is_scored_once(tokens, window, stride):
    found = spans(tokens, window, stride)
    scored = [i for _, first, end in found for i in range(first, end)]
    missing = {0, *range(stride, tokens, stride)} if stride == window else {0}
    assert sorted(scored) == scored and set(scored) == set(range(tokens)) - missing
    assert all(begin < first < end <= begin + window for begin, first, end in found)


def test_perplexity_is_that_of_the_definition(made):
    model, tokens = folder.load_model(made["llama"], torch.float32, "sdpa"), ROWS.flatten()
    for window, stride in ((16, None), (16, 5), (16, 16), (200, 60)):
        found, loss, count = perplexity(model, tokens, window, stride), 0.0, 0
        for begin, first, end in spans(len(tokens), window, stride or window - 1):
            with torch.no_grad():
                logits = model(tokens[None, begin:end], use_cache=False).logits[0].double()
            logp = logits.log_softmax(-1)
            loss -= sum(float(logp[t - begin - 1, tokens[t]]) for t in range(first, end))
            count += end - first
        assert found.tokens == count and found.loss == pytest.approx(loss, rel=1e-5)
    assert perplexity(model, tokens, 16).tokens == 71
    rows = perplexity(model, tokens, 24, 24)
    assert rows.loss == pytest.approx(streamed_losses(Blocks(made["llama"]), ROWS)[0], rel=1e-5)
    for wrong in ((1, None), (8, 9), (8, 0)):
        with pytest.raises(ValueError, match="window, stride"):
            perplexity(model, tokens, *wrong)
    with pytest.raises(ValueError, match="two or more"):
        perplexity(model, tokens[:1])

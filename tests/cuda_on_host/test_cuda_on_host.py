# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of cuda/ops, compiled as plain C++ and run on the CPU, against float64."""

import importlib
import itertools
import os
import shutil
import subprocess

import on_host
import pytest
import torch

from compare import FLOATS, error, forward_and_gradients
from fastpost import objectives
from fastpost.reference import linear_logprob as linear_reference
from fastpost.reference import policy_loss as policy_reference
from fastpost.reference import preference_loss as preference_reference
from fastpost.reference import token_logprob as token_reference

pytestmark = pytest.mark.skipif(shutil.which(on_host.COMPILER) is None, reason=f"needs {on_host.COMPILER}")
NAN, INF = torch.nan, torch.inf
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}  # of a gradient, relative to its row


@pytest.fixture
def ops(core, monkeypatch):
    """fastpost's Python ops with the CUDA kernels under them."""
    names = ("token_logprob", "linear_logprob", "preference_loss", "policy_loss")
    modules = {name: importlib.import_module(f"fastpost.ops.{name}") for name in names}
    for module in modules.values():
        monkeypatch.setattr(module, "_core", core)
    return modules


def floats(*shape):
    return torch.full(shape, NAN)  # outputs are poisoned: what is not written shows


# ---- whole ops on the cases that the CPU kernels are tested with ----


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", token_reference.cases(), ids=lambda c: c.name)
def test_token_logprob(case, dtype, ops):
    inputs = case.inputs(dtype)
    run = ops["token_logprob"].token_logprob
    ours, (grad,) = forward_and_gradients(lambda x, t: run(x, t, **case.options), inputs, torch.clone)
    plain, truth = (
        forward_and_gradients(lambda x, t: token_reference.token_logprob(x, t, **case.options), inputs, convert)
        for convert in (torch.clone, torch.Tensor.double)
    )
    for a, b, t in zip(ours, plain[0], truth[0]):
        assert error(a, t) < 1.5 * error(b, t) + 1e-6
    assert error(grad, truth[1][0]) < max(ROUNDING[dtype], 1.5 * error(plain[1][0], truth[1][0]))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", [c for c in linear_reference.cases() if c.n * c.v < 200_000], ids=lambda c: c.name)
def test_linear_logprob(case, dtype, ops):
    hidden, weight, target, bias = case.inputs(dtype)

    def run(op, convert):
        return forward_and_gradients(
            lambda h, w, b: op(h, w, target, bias=b, **case.options), (hidden, weight, bias), convert
        )

    ours, grads = run(ops["linear_logprob"].linear_logprob, torch.clone)
    plain, plain_grads = run(linear_reference.linear_logprob, torch.clone)
    truth, true_grads = run(linear_reference.linear_logprob, torch.Tensor.double)
    for a, b, t in zip((*ours, *grads), (*plain, *plain_grads), (*truth, *true_grads)):
        assert error(a, t) <= 1.5 * error(b, t) + 1e-5


@pytest.mark.parametrize("case", preference_reference.cases(), ids=lambda c: c.name)
def test_preference_loss(case, ops):
    (hidden, weight, target, cu_seqlens), kwargs = case.inputs(torch.float32)
    columns = {k: v for k, v in kwargs.items() if k in ("reference_logprob", "previous_logprob", "reward", "kl")}
    logprob = linear_reference.linear_logprob(hidden, weight, target)
    results = []
    for module, dtype in ((ops["preference_loss"], torch.float32), (preference_reference, torch.float64)):
        x = logprob.to(dtype, copy=True).requires_grad_()
        typed = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in columns.items()}
        out = module.preference_loss_from_logprob(x, target, cu_seqlens, case.objective, **typed)
        g = torch.Generator().manual_seed(3)
        sum((torch.randn(o.shape, generator=g) * o).sum() for o in out[:3]).backward()
        results.append((*out, x.grad))
    *ours, our_grad = results[0]
    *truth, true_grad = results[1]
    assert torch.equal(ours[4], truth[4])
    for a, b in zip((*ours[:4], our_grad), (*truth[:4], true_grad)):
        assert error(a.flatten(), b.flatten()) < 1e-5


@pytest.mark.parametrize("case", policy_reference.cases(), ids=lambda c: c.name)
def test_policy_loss(case, ops):
    (hidden, weight, target, cu_seqlens), kwargs = case.inputs(torch.float32)
    columns = {k: v for k, v in kwargs.items() if k not in ("temperature", "softcap", "memory_budget")}
    logprob = linear_reference.linear_logprob(hidden, weight, target)
    results = []
    for module, dtype in ((ops["policy_loss"], torch.float32), (policy_reference, torch.float64)):
        x = logprob.to(dtype, copy=True).requires_grad_()
        typed = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in columns.items()}
        out = module.policy_loss_from_logprob(x, target, cu_seqlens, case.objective, **typed)
        (3 * out.loss + out.losses.square().sum()).backward()
        results.append((*out, x.grad))
    for a, b in zip(*results, strict=True):
        assert a.dtype == (torch.int32 if b.dtype == torch.int32 else torch.float32)
        assert error(a.flatten(), b.flatten()) < 1e-5
    assert torch.equal(results[0][-1] == 0, results[1][-1] == 0)  # clipped and neutral tokens: exactly nothing


# ---- rows: every way in which a row can meet the 128-bit accesses ----


def row_truth(logits, bias, target, temperature, softcap, g, h):
    z = logits.double().requires_grad_()
    logprob, entropy = token_reference.token_logprob(
        z if bias is None else z + bias.double(), target, temperature=temperature, softcap=softcap, return_entropy=True
    )
    (logprob @ g.double() + entropy @ h.double()).backward()
    return logprob.detach(), entropy.detach(), z.grad


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("v", [1, 2, 7, 8, 9, 31, 257, 2047, 2048, 2050, 5003])
def test_any_alignment(v, dtype, core):
    """Rows start at every offset from a 16-byte boundary; the gradient's rows at another one than the logits'."""
    n = 8
    logits = torch.randn(n, v + 1).to(dtype)[:, :v]  # row stride v + 1: n rows meet most offsets
    target = torch.randint(0, v, (n,))
    g, h = torch.randn(n), torch.randn(n)
    logprob, lse, entropy = floats(n), floats(n), floats(n)
    core.token_logprob(logits, target, 1.3, 0.0, -100, logprob, lse, entropy)
    grad = torch.full((n, v + 3), 7.0, dtype=dtype)
    core.token_logprob_backward(logits, target, 1.3, 0.0, -100, logprob, lse, entropy, g, h, grad[:, 1 : v + 1])
    true_logprob, true_entropy, true_grad = row_truth(logits, None, target, 1.3, None, g, h)
    assert error(logprob, true_logprob) < 1e-6 and error(entropy, true_entropy) < 2e-6
    assert error(grad[:, 1 : v + 1], true_grad) < ROUNDING[dtype]
    assert torch.all(grad[:, 0] == 7) and torch.all(grad[:, v + 1 :] == 7)  # nothing beyond the row is touched
    in_place = torch.cat([logits, logits], dim=1)[:, v : 2 * v]
    core.token_logprob_backward(in_place, target, 1.3, 0.0, -100, logprob, lse, entropy, g, h, in_place)
    assert torch.equal(in_place, grad[:, 1 : v + 1])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("cuts", [(0, 1003), (0, 1, 9, 300, 301, 1003), (0, 512, 1003)], ids=str)
def test_tiles_add_up(cuts, softcap, dtype, core):
    """linear_logprob's kernels over vocabulary slices, bias included, forward and backward."""
    n, v, cap = 6, 1003, softcap or 0.0
    logits, bias = (3 * torch.randn(n, v)).to(dtype), torch.randn(v).to(dtype)
    target = torch.tensor([0, 8, 9, 511, 512, 1002])
    stats = torch.zeros(5, n)
    stats[0], stats[4] = -INF, NAN
    slices = [*itertools.pairwise(cuts)]
    for a, b in slices:
        core.linear_logprob_tile(logits[:, a:b], bias[a:b], target, a, 0.7, cap, True, stats)
    logprob, lse, entropy = floats(n), floats(n), floats(n)
    core.linear_logprob_finish(stats, logprob, lse, entropy)
    g, h = torch.randn(n), torch.randn(n)
    g[2] = h[2] = 0
    true_logprob, true_entropy, true_grad = row_truth(logits, bias, target, 0.7, softcap, g, h)
    assert error(logprob, true_logprob) < 1e-6 and error(entropy, true_entropy) < 2e-6
    grad = torch.full((n, v), NAN, dtype=dtype)
    for a, b in slices:
        tile = logits[:, a:b].clone()
        core.linear_logprob_tile_backward(
            tile, bias[a:b], target, a, 0.7, cap, logprob, lse, entropy, g, h, tile if a else grad[:, a:b]
        )
        if a:
            grad[:, a:b] = tile
    assert error(grad, true_grad) < ROUNDING[dtype] and torch.all(grad[2] == 0)


def test_logits_at_the_maximum_are_found_exactly(core):
    """Two equal logits towering above the rest, under a temperature that no float32 product represents."""
    logits = torch.zeros(1, 1000)
    logits[0, [5, 700]] = 33.3
    logprob, lse = floats(1), floats(1)
    core.token_logprob(logits, torch.tensor([5]), 0.7, 0.0, -100, logprob, lse, None)
    truth = token_reference.token_logprob(logits.double(), torch.tensor([5]), temperature=0.7)
    assert float(logprob) == pytest.approx(float(truth), rel=1e-6)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_masked_vocabulary(softcap, dtype, core):
    """-inf logits: first, last and in between, whole vectors of them. A softcap makes them -softcap."""
    v, cap = 3000, softcap or 0.0
    logits = torch.randn(4, v).to(dtype)
    allowed = torch.ones(v, dtype=torch.bool)
    allowed[:700] = allowed[1500:1600] = allowed[-30:] = False
    logits[:, ~allowed] = -INF
    target = torch.tensor([700, 1499, 1600, 2000])
    g, h = torch.randn(4), torch.randn(4)
    logprob, lse, entropy = floats(4), floats(4), floats(4)
    core.token_logprob(logits, target, 1.0, cap, -100, logprob, lse, entropy)
    grad = torch.full_like(logits, NAN)
    core.token_logprob_backward(logits, target, 1.0, cap, -100, logprob, lse, entropy, g, h, grad)
    if softcap is None:  # the same as if they were not there
        logits, target = logits[:, allowed], allowed.cumsum(0)[target] - 1
        assert torch.all(grad[:, ~allowed] == 0)
        grad = grad[:, allowed]
    true_logprob, true_entropy, true_grad = row_truth(logits, None, target, 1.0, softcap, g, h)
    assert error(logprob, true_logprob) < 1e-6 and error(entropy, true_entropy) < 2e-6
    assert error(grad, true_grad) < ROUNDING[dtype]


@pytest.mark.parametrize("where", [0, 3, 254, 999, 2999])
def test_nan_stays_in_its_row(where, core):
    logits = torch.randn(4, 3000)
    logits[2:] = -INF
    logits[3, 2000] = 1.0
    logits[[1, 3], where] = NAN
    logprob, lse, entropy = floats(4), floats(4), floats(4)
    core.token_logprob(logits, torch.tensor([1, 1, 1, 2000]), 1.0, 0.0, -100, logprob, lse, entropy)
    for result in (logprob, entropy):
        assert torch.isnan(result).tolist() == [False, True, True, True]  # only -inf: NaN, as torch.log_softmax


def test_rows_that_do_not_count_are_not_read(core):
    """Ignored rows and rows without gradient are 0 though their logits are NaN; a target out of range gives NaN."""
    logits = torch.randn(6, 1000)
    target = torch.tensor([1, -7, 2, 1000, -1, 3])
    logits[1] = NAN
    logprob, lse, entropy = floats(6), floats(6), floats(6)
    core.token_logprob(logits, target, 1.0, 0.0, -7, logprob, lse, entropy)
    for result in (logprob, lse, entropy):
        assert result[1] == 0
        assert torch.isnan(result).tolist() == [False, False, False, True, True, False]
    g, h = torch.ones(6), torch.ones(6)
    g[2] = h[2] = 0
    g[5] = 0  # but h is not
    logits[2] = NAN
    grad = torch.full((6, 1000), NAN)
    core.token_logprob_backward(logits, target, 1.0, 0.0, -7, logprob, lse, entropy, g, h, grad)
    assert torch.all(grad[1] == 0) and torch.all(grad[2] == 0)
    assert torch.isnan(grad[3]).all() and torch.isnan(grad[4]).all()
    assert torch.isfinite(grad[[0, 5]]).all() and torch.all(grad[5].abs() > 0)


def test_more_than_2_31_elements(core):
    """Rows 2^30 elements apart in memory that is reserved but never touched in between."""
    stride, v = 1 << 30, 100
    rows = torch.empty(3 * stride + v, dtype=torch.bfloat16).as_strided((4, v), (stride, 1))
    values = torch.randn(4, 104).bfloat16()[:, :v]  # rows aligned as those are, so that the bits must agree
    rows.copy_(values)
    target = torch.tensor([0, 5, 50, 99])
    results = []
    for logits in (rows, values):
        logprob, lse = floats(4), floats(4)
        core.token_logprob(logits, target, 1.0, 0.0, -100, logprob, lse, None)
        core.token_logprob_backward(logits, target, 1.0, 0.0, -100, logprob, lse, None, torch.ones(4), None, logits)
        results.append((logprob, logits.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_no_result_leans_on_the_order_of_threads(core):
    """Blocks run their threads forwards and backwards in turn: equal rows must give equal bits."""
    logits = torch.randn(5001).expand(4, 5001).contiguous()[:, :5000]
    target = torch.full((4,), 17)
    logprob, lse, entropy = floats(4), floats(4), floats(4)
    core.token_logprob(logits.contiguous(), target, 1.0, 0.0, -100, logprob, lse, entropy)
    for result in (logprob, lse, entropy):
        assert len(result.unique()) == 1
    sums, length, rest = floats(4), torch.zeros(4, dtype=torch.int32), [floats(4) for _ in range(3)]
    core.preference_loss(torch.randn(900).repeat(4), torch.zeros(3600, dtype=torch.int64),
                         torch.arange(0, 3601, 900, dtype=torch.int32), -100, *objectives.SFT().core(),
                         None, None, None, None, floats(), rest[0], sums, length, rest[1], rest[2])  # fmt: skip
    assert len(sums.unique()) == 1 and length.tolist() == [900] * 4


# ---- preference_loss: positions that cannot be checked on a GPU ----


@pytest.mark.parametrize("bounds", [[0, 9, 3, 40], [-5, 2, 10, 12], [2, 5, 5, 9], [12, 0, -1, 6]], ids=str)
def test_wild_cu_seqlens_stay_inside(bounds, core):
    t = 12
    guard = torch.full((t + 200,), NAN)
    logprob, grad = guard.clone()[100 : 100 + t], guard.clone()
    logprob.fill_(-1.0)
    cu = torch.tensor(bounds, dtype=torch.int32)
    target = torch.zeros(t, dtype=torch.int64)
    loss, losses, sums, rewards, derivative = floats(), floats(3), floats(3), floats(3), floats(3)
    length = torch.full((3,), -1, dtype=torch.int32)
    sft = objectives.SFT().core()
    core.preference_loss(logprob, target, cu, -100, *sft, None, None, None, None, loss, losses, sums, length, rewards,
                         derivative)  # fmt: skip
    assert torch.equal(sums, -length.float()) and torch.all((length >= 0) & (length <= t)) and torch.isfinite(loss)
    core.preference_loss_backward(target, cu, -100, sft[0], length, derivative, torch.tensor(1.0), None, None,
                                  grad[100 : 100 + t])  # fmt: skip
    assert torch.isfinite(grad[100 : 100 + t]).all() and torch.isnan(grad).sum() == 200


@pytest.mark.parametrize("bounds", [[0, 9, 3, 40], [-5, 2, 10, 12], [2, 5, 5, 9], [12, 0, -1, 6]], ids=str)
def test_wild_cu_seqlens_stay_inside_policy_loss(bounds, core):
    t = 12
    guards = [torch.full((t + 200,), NAN) for _ in range(2)]
    derivative, grad = (guard[100 : 100 + t] for guard in guards)
    logprob, target = torch.full((t,), -1.0), torch.zeros(t, dtype=torch.int64)
    cu = torch.tensor(bounds, dtype=torch.int32)
    loss, losses, count, metrics, sums = floats(), floats(3), floats(), floats(4), floats(3, 7).double()
    length = torch.full((3,), -1, dtype=torch.int32)
    core.policy_loss(logprob, target, cu, -100, *objectives.GRPO("dapo").core(), torch.ones(3), None, None, None, loss,
                     losses, length, derivative, count, metrics, sums)  # fmt: skip
    assert torch.equal(losses, -length.float()) and torch.all((length >= 0) & (length <= t)) and torch.isfinite(loss)
    core.policy_loss_backward(cu, derivative, count, torch.tensor(1.0), None, grad)
    assert torch.isfinite(grad).all() and all(torch.isnan(guard).sum() >= 200 for guard in guards)


# ---- the stand-in for the GPU itself ----


def test_dynamic_shared_memory_and_barriers(core):
    blocks = torch.randn(5, 64)
    sums = floats(5)
    core.block_sum(blocks, sums, 0)
    torch.testing.assert_close(sums, blocks.sum(1))


@pytest.mark.parametrize("mistake,message", [(1, "same number of __syncthreads"), (2, "wait for each other forever")])
def test_barrier_that_not_all_threads_reach_is_reported(mistake, message, core):
    with pytest.raises(RuntimeError, match=message):
        core.block_sum(torch.zeros(1, 64), floats(1), mistake)
    test_dynamic_shared_memory_and_barriers(core)  # and the next launch is not harmed


def test_launch_errors_name_the_op(core):
    with pytest.raises(RuntimeError, match=r"\[block_sum\] CUDA: cudaErrorInvalidConfiguration"):
        core.block_sum(torch.zeros(1, 2048), floats(1), 0)


def test_races(tmp_path):
    """ThreadSanitizer finds nothing in the kernels, and something as soon as a barrier that they need is left out."""
    program = on_host.build_race_check(tmp_path)
    options = "exitcode=0 symbolize=0 suppress_equal_stacks=0 suppress_equal_addresses=0"

    def run(*command):
        return subprocess.run(command, capture_output=True, text=True, timeout=900,
                              env=os.environ | {"TSAN_OPTIONS": options})  # fmt: skip

    done = run(program)
    if "unexpected memory mapping" in done.stderr:  # older sanitizers do not bear much address randomisation
        done = run("setarch", "-R", program)
    assert done.returncode == 0, done.stderr[-1000:]
    races = {(kernel, int(n)): int(count) for kernel, n, count in map(str.split, done.stdout.splitlines())}
    kernels = {kernel for kernel, _ in races}
    assert len(kernels) == 34 and all(races[kernel, -1] == 0 for kernel in kernels), races
    barriers = dict.fromkeys(kernels, 2) | {"linear_logprob_finish": 0, "policy_loss": 4, "policy_loss_backward": 0}
    barriers |= {"linear_logprob_forward": 1, "linear_logprob_exponentials_backward": 0, "linear_logprob_rows": 2 + 6}
    # moe_route's scan over five experts: two, two for each of three steps, one, and two sums.
    barriers |= dict.fromkeys((k for k in kernels if k.startswith("moe_")), 0)
    barriers |= {"moe_route": 2 + 6 + 1 + 4, "moe_route_plan": 2 + 6}
    barriers |= {"grouped_gemm": 6, "grouped_gemm_half": 6, "grouped_gemm_weight_gradient": 4}
    barriers |= {"paged_attention": 4, "paged_attention_prompt": 4, "paged_attention_half_prompt": 9, "kv_select": 18}
    barriers |= {"kv_factorize_gram": 4, "kv_factorize_gram_half": 3, "kv_factorize_project": 4, "kv_landmarks": 0}
    barriers |= {"kv_factorize_project_half": 4, "kv_reconstruct": 6, "kv_reconstruct_half": 2}
    assert all(max(n for k, n in races if k == kernel) + 1 == barriers[kernel] for kernel in kernels), races
    # The first barrier of block_reduce matters only to a kernel that calls it twice, the last of a loop to none. All
    # others are needed.
    reduces = {"token_logprob", "linear_logprob_tile", "preference_loss", "preference_loss_backward", "policy_loss"}
    needless = {(kernel, 0) for kernel in reduces} | {("linear_logprob_rows", 0), ("linear_logprob_rows", 7)}
    needless |= {("moe_route", 2 + 6 + 1), ("grouped_gemm", 3), ("grouped_gemm", 5), ("grouped_gemm_half", 5)}
    needless |= {("kv_factorize_gram", 3), ("kv_factorize_project", 1), ("kv_factorize_project", 3)}
    needless |= {("kv_factorize_project_half", 3)}
    # Of three steps, the second's end opens no place for another.
    needless |= {("paged_attention", 0), ("paged_attention_prompt", 0), ("paged_attention_half_prompt", 5)}
    for (kernel, n), count in races.items():
        if n >= 0 and (kernel, n) not in needless:
            assert count > 0, (kernel, n)

# SPDX-License-Identifier: Apache-2.0
"""linear_logprob_forward on the GPU that it is for; what needs none is in tests/cuda_on_host/test_forward_tiles.py."""

import pytest
import torch

from compare import error
from fastpost import _core
from fastpost.reference import token_logprob as reference

COLUMNS = 256


@pytest.fixture(autouse=True)
def hopper(device):
    if device != "cuda" or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs --device cuda and a GPU of compute capability 9.0")
    probe = torch.zeros(1, 8, dtype=torch.bfloat16, device=device)
    assert _core.linear_logprob_forward_columns(probe, probe) == COLUMNS, "the build has no kernels for sm_90a"


class Forward:
    """Inputs, and the buffers that one forward fills; run() may be recorded in a CUDA graph."""

    def __init__(self, n, v, d, bias=False, temperature=1.0, softcap=0.0):
        self.hidden = torch.randn(n, d, device="cuda").bfloat16()
        self.weight = (torch.randn(v, d, device="cuda") * (3 / d**0.5)).bfloat16()
        self.bias = torch.randn(v, device="cuda").bfloat16() if bias else None
        self.target = torch.randint(0, v, (n,), device="cuda")
        self.options = 0, temperature, softcap
        self.exponentials = torch.full((n, v), torch.nan, dtype=torch.float16, device="cuda")
        self.partials = torch.full((4, -(-v // COLUMNS), n), torch.nan, device="cuda")
        self.start = torch.tensor([-torch.inf, 0, 0, 0, torch.nan], device="cuda")[:, None].repeat(1, n)
        self.stats = self.start.clone()
        self.logprob, self.lse, self.entropy = torch.full((3, n), torch.nan, device="cuda")

    def run(self):
        self.stats.copy_(self.start)
        _core.linear_logprob_forward(self.hidden, self.weight, self.bias, self.target, *self.options, True,
                                     self.exponentials, self.partials, self.stats)  # fmt: skip
        _core.linear_logprob_finish(self.stats, self.logprob, self.lse, self.entropy)
        return self

    def gradient(self, g, h, out):
        _core.linear_logprob_exponentials_backward(
            self.exponentials, self.partials[0], self.target, *self.options, self.logprob, self.lse, self.entropy, g, h,
            out,
        )  # fmt: skip
        return out

    def truth(self, rows=slice(None)):
        """logits, log-probs and entropies of some rows in float64."""
        z = self.hidden[rows].double() @ self.weight.double().T
        z = (z if self.bias is None else z + self.bias.double()).requires_grad_()
        _, temperature, softcap = self.options
        return z, *reference.token_logprob(
            z, self.target[rows], temperature=temperature, softcap=softcap or None, return_entropy=True
        )


SHAPES = {  # rows, vocabulary, D: one of each edge, then what one wave of tiles does not hold
    "one": (1, 1, 8), "below a tile": (127, 255, 64), "a tile": (128, 256, 64), "beyond": (129, 257, 72),
    "ragged": (300, 1003, 576), "many": (1500, 33000, 128),
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"bias": True, "temperature": 0.7, "softcap": 8.0}], ids=["plain", "all"])
@pytest.mark.parametrize("shape", SHAPES)
def test_hopper_small(shape, options):
    torch.manual_seed(0)
    forward = Forward(*SHAPES[shape], **options).run()
    z, logprob, entropy = forward.truth()
    assert error(forward.logprob, logprob) < 2e-6 and error(forward.entropy, entropy) < 5e-6
    n, v = z.shape
    g, h = torch.randn(n, device="cuda"), torch.randn(n, device="cuda")
    g[n // 2] = h[n // 2] = 0
    out = torch.full((n, v), torch.nan, dtype=torch.bfloat16, device="cuda")
    ((logprob * g).sum() + (entropy * h).sum()).backward()
    assert error(forward.gradient(g, h, out), z.grad) < 6e-3
    assert torch.equal(forward.gradient(g, h, forward.exponentials.view(torch.bfloat16)), out)  # in place


def test_hopper_head_of_a_large_model():
    """More elements than 2^31 in logits and exponentials, over many waves of tiles; checked on some rows."""
    torch.manual_seed(0)
    forward = Forward(17000, 128256, 512).run()
    rows = torch.tensor([0, 127, 128, 8191, 16743, 16999], device="cuda")
    _, logprob, entropy = forward.truth(rows)
    assert error(forward.logprob[rows], logprob) < 2e-6 and error(forward.entropy[rows], entropy) < 5e-6
    assert torch.isfinite(forward.stats).all() and torch.isfinite(forward.exponentials).all()


def test_hopper_same_bits():
    """From run to run, and whatever other rows there are."""
    torch.manual_seed(0)
    forward = Forward(700, 5000, 256).run()
    first = forward.logprob.clone(), forward.entropy.clone(), forward.exponentials.clone()
    for _ in range(20):
        forward.run()
        assert all(torch.equal(a, b) for a, b in zip(first, (forward.logprob, forward.entropy, forward.exponentials)))
    alone = Forward(1, 5000, 256)
    for i in (0, 130, 699):
        alone.hidden, alone.weight, alone.target = forward.hidden[i : i + 1], forward.weight, forward.target[i : i + 1]
        alone.run()
        assert torch.equal(alone.logprob, first[0][i : i + 1]) and torch.equal(alone.entropy, first[1][i : i + 1])


def test_hopper_in_a_graph():
    torch.manual_seed(0)
    forward = Forward(300, 3000, 64)
    n = len(forward.target)
    g, out = torch.ones(n, device="cuda"), torch.empty(300, 3000, dtype=torch.bfloat16, device="cuda")
    rows, count = torch.empty_like(forward.target), forward.target.new_empty(1)

    def step():
        forward.run()
        forward.gradient(g, None, out)
        _core.linear_logprob_rows(forward.target, -100, g, None, rows, count)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    forward.hidden.copy_(torch.randn_like(forward.hidden))
    forward.target[::3] = -100
    graph.replay()
    scored = forward.target != -100
    z, logprob, _ = forward.truth(scored)
    logprob.sum().backward()
    assert error(forward.logprob[scored], logprob) < 2e-6 and error(out[scored], z.grad) < 6e-3
    assert int(count) == int(scored.sum()) and torch.equal(rows[: int(count)], scored.nonzero()[:, 0])

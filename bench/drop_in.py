# SPDX-License-Identifier: Apache-2.0
"""Ten lines of plain PyTorch, trained twice: with log_softmax(lm_head(h)).gather and with fastpost.linear_logprob.

    python -m bench.drop_in --model DIR [--steps 20] [--precision bf16|float32]

The same seeds and batches must give the same loss curve. What "the same" can mean is measured: the plain version is
trained again with the head's dot products summed in another order, and again in the next higher precision. Neither
changes anything but the rounding; the larger difference is the noise floor, and the drop-in has to stay near it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext

import torch

import fastpost


def curve(model, batches: torch.Tensor, logprob_of: Callable, autocast: bool, lr: float) -> list[float]:
    """Losses of a plain training loop over batches [steps, B, T]. `model` is trained in place."""
    losses = []
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for ids in batches:
        with torch.autocast(ids.device.type, torch.bfloat16) if autocast else nullcontext():
            hidden = model.base_model(ids[:, :-1]).last_hidden_state
            loss = -logprob_of(hidden, model.lm_head, ids[:, 1:]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def plain(hidden, lm_head, target):
    return torch.log_softmax(lm_head(hidden).to(exact(hidden)), -1).gather(-1, target[..., None])[..., 0]


def exact(hidden):
    """The dtype of the softmax: float32 for half precision, as most people write it."""
    return torch.promote_types(hidden.dtype, torch.float32)


def ours(hidden, lm_head, target):
    return fastpost.linear_logprob(hidden.flatten(0, 1), lm_head.weight, target.flatten())


def reordered(seed: int) -> Callable:
    """`plain` with the sum over the hidden dimension taken in a random order."""

    def run(hidden, lm_head, target):
        order = torch.randperm(hidden.shape[-1], generator=torch.Generator().manual_seed(seed)).to(hidden.device)
        logits = torch.nn.functional.linear(hidden[..., order], lm_head.weight[:, order])
        return torch.log_softmax(logits.to(exact(hidden)), -1).gather(-1, target[..., None])[..., 0]

    return run


def compare(make: Callable, batches: torch.Tensor, autocast: bool, lr: float) -> dict:
    """Curves of all versions from the same start make() (a float32 model), and their largest distance from the plain
    one's."""
    finer = make() if autocast else make().double()
    curves = {
        "plain": curve(make(), batches, plain, autocast, lr),
        "fastpost": curve(make(), batches, ours, autocast, lr),
        "reordered": curve(make(), batches, reordered(0), autocast, lr),
        "float32" if autocast else "float64": curve(finer, batches, plain, False, lr),
    }
    away = {name: max(abs(a - b) for a, b in zip(c, curves["plain"])) for name, c in curves.items()}
    difference = away.pop("fastpost")
    return {"curves": curves, "difference": difference, "noise_floor": max(away.values())}


def main() -> int:
    parser = argparse.ArgumentParser("python -m bench.drop_in", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--model", required=True, help="Hugging Face folder of a causal LM")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4, help="sequences in a step (4)")
    parser.add_argument("--length", type=int, default=64, help="tokens in a sequence (64)")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--precision", choices=("bf16", "float32"), default="bf16", help="bf16 = autocast (default)")
    args = parser.parse_args()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastpost.data.word_problems import problems

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = "\n\n".join(r["prompt"][0]["content"] + "\n" + r["chosen"][0]["content"] for r in problems("train", 2000))
    need = args.steps * args.batch * args.length
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    batches = ids[:need].view(args.steps, args.batch, args.length)

    def make():
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).train()

    result = compare(make, batches, args.precision == "bf16", args.lr)
    names = list(result["curves"])
    print("step  " + "  ".join(f"{n:>12}" for n in names))
    for step, values in enumerate(zip(*result["curves"].values())):
        print(f"{step:4}  " + "  ".join(f"{v:12.6f}" for v in values))
    difference, floor = result["difference"], result["noise_floor"]
    print(f"Largest difference of fastpost from plain: {difference:.2e}; noise floor: {floor:.2e}.")
    return 0 if difference <= 2 * floor else 1  # the floor is two draws of a random size


if __name__ == "__main__":
    sys.exit(main())

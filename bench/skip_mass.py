# SPDX-License-Identifier: Apache-2.0
"""linear_logprob(skip_mass=...) on real hidden states: time beside three plain GEMMs, tiles computed, gradient errors.

    python -m bench.skip_mass --model DIR [--rows 1024] [--repeat 4] [--threads 1]

Rows are the reply tokens of the word problems' right solutions in the model's own chat template; vocabulary entries are
ordered by their mean probability over other problems' replies. Errors are relative to float64.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import fastpost
from bench import timing
from fastpost import _core
from fastpost.data.word_problems import problems
from fastpost.hf import folder
from fastpost.ops import _fused

BUDGET = 256 << 20


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.skip_mass", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--model", required=True, help="Hugging Face folder of a chat model, as SmolLM2-135M-Instruct")
    parser.add_argument("--rows", type=int, default=1024, help="scored tokens (1024)")
    parser.add_argument("--repeat", type=int, default=4, help="interleaved rounds (4)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    model, tokenizer = folder.load_model(args.model, torch.bfloat16), folder.load_tokenizer(args.model)
    rows = problems("train", 400)
    hidden, target = replies(model, tokenizer, rows[:200], args.rows)
    other, _ = replies(model, tokenizer, rows[200:], args.rows)
    weight = model.get_output_embeddings().weight.detach()
    order = (other @ weight.T).float().softmax(-1).mean(0).argsort(descending=True)
    grad = torch.full((len(hidden),), -1 / len(hidden))
    truth = gradients(hidden.double(), weight.double(), target, grad.double())
    full = torch.randn(len(hidden), len(weight), dtype=torch.bfloat16)

    def gemms():
        return hidden @ weight.T, full @ weight, full.T @ hidden

    runs = {"plain GEMMs": gemms}
    masses = (0.0, 1e-4, 1e-3, 1e-2)
    for mass in masses:
        options = {"skip_mass": mass, "vocab_order": order} if mass else {}
        runs[f"skip_mass {mass:g}"] = lambda o=options: gradients(hidden, weight, target, grad, **o)
    with timing.threads(args.threads), timing.no_collection():
        times = {name: [] for name in runs}
        for _ in range(args.repeat + 1):
            for name, run in runs.items():
                begin = time.process_time() if args.threads == 1 else time.perf_counter()
                run()
                times[name].append((time.process_time() if args.threads == 1 else time.perf_counter()) - begin)
    median = {name: statistics.median(each[1:]) for name, each in times.items()}
    print(f"{len(hidden)} rows, D = {hidden.shape[1]}, V = {len(weight)}, bfloat16, {args.threads} threads")
    print(
        f"{'':18} {'ms':>6} {'x GEMMs':>8} {'tiles':>6} {'most dropped':>13} {'error of d hidden':>18} {'d weight':>9}"
    )
    for name, seconds in median.items():
        line = f"{name:18} {1e3 * seconds:6.0f} {seconds / median['plain GEMMs']:8.2f}"
        if name != "plain GEMMs":
            mass = masses[list(runs).index(name) - 1]
            errors = [float((a - b).norm() / b.norm()) for a, b in zip(runs[name](), truth)]
            share, most = skipped(hidden, weight, target, grad, mass, order) if mass else (1.0, 0.0)
            line += f" {share:6.2f} {most:13.1e} {errors[0]:18.2e} {errors[1]:9.2e}"
        print(line)


@torch.no_grad()
def replies(model, tokenizer, rows, count) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [count, D] at which reply tokens are predicted, and these tokens."""
    hidden, target = [], []
    for row in rows:
        prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        begin = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        text = prompt + row["chosen"][0]["content"]
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        hidden.append(model.base_model(ids).last_hidden_state[0, begin - 1 : -1])
        target.append(ids[0, begin:])
        if sum(map(len, target)) >= count:
            break
    return torch.cat(hidden)[:count].contiguous(), torch.cat(target)[:count]


def gradients(hidden, weight, target, grad, **options):
    h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    fastpost.linear_logprob(h, w, target, memory_budget=BUDGET, **options).backward(grad)
    return h.grad, w.grad


def skipped(hidden, weight, target, grad, mass, order) -> tuple[float, float]:
    """Share of tiles computed, and the most probability that any token lost."""
    stats, kept = _fused.forward(hidden, weight, None, target, None, 1.0, 0.0, False, BUDGET, True, mass, order)
    logprob, lse = torch.empty(2, len(target))
    _core.linear_logprob_finish(stats, logprob, lse, None)
    every, account = torch.ones(len(target), dtype=torch.bool), []
    _fused.backward(hidden, weight, None, target, every, every, 1.0, 0.0, logprob, lse, None, kept, grad, None,
                    [True, True, False], BUDGET, None, mass, order, account)  # fmt: skip
    return float(account[0][-1]), float(account[0][:-1].max())


if __name__ == "__main__":
    main()

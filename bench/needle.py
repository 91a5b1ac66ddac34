# SPDX-License-Identifier: Apache-2.0
"""A pass key in a long prompt: does ShadowCache find it wherever full attention does?

    python -m bench.needle --model DIR [--tokens 8000] [--depths 0.1 0.5 0.9] [--budget 2048] [--rank 30]

The prompt repeats five short sentences up to --tokens tokens; at each depth (0: beginning, 1: end) a sentence with a
number of five digits is put in, and the end asks for it. Found means that the digits come next, greedily.
"""

from __future__ import annotations

import argparse
import random
import time

import torch

import fastpost
from fastpost.hf import folder

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
TASK = "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it."
QUESTION = "What is the pass key? The pass key is"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.needle", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--model", required=True, help="Hugging Face folder, as SmolLM2-135M-Instruct")
    parser.add_argument("--tokens", type=int, default=8000, help="length of the prompt (8000)")
    parser.add_argument("--depths", type=float, nargs="+", default=[0.1, 0.3, 0.5, 0.7, 0.9])
    parser.add_argument("--budget", type=int, default=2048, help="tokens chosen for each key head (2048)")
    parser.add_argument("--rank", type=int, help="of the factors (in the proportion 160 of 1024)")
    parser.add_argument("--value-bits", type=int, choices=(8,), help="hold the values in int8")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    tokenizer = folder.load_tokenizer(args.model)
    full, shadow = (folder.load_model(args.model, torch.bfloat16).eval() for _ in range(2))
    draw, missed = random.Random(args.seed), []
    print(f"{args.tokens} tokens, budget {args.budget}; seconds are those of the whole answer")
    for depth in args.depths:
        key = str(draw.randrange(10000, 100000))
        ids = prompt(tokenizer, args.tokens, depth, key)
        cache = fastpost.ShadowCache(shadow.config, rank=args.rank, budget=args.budget, value_bits=args.value_bits)
        (a, a_time), (b, b_time) = answer(full, tokenizer, ids), answer(shadow, tokenizer, ids, past_key_values=cache)
        found, kept = key in a, key in b
        if found and not kept:
            missed.append(depth)
        print(
            f"depth {depth:.2f}, key {key}: full attention {found!s:5} {a!r} in {a_time:.1f} s, "
            f"ShadowCache {kept!s:5} {b!r} in {b_time:.1f} s",
            flush=True,
        )
    memory = cache.memory()
    errors = torch.cat([error for error in cache.errors() if error is not None])
    print(
        f"bytes per token and layer: {memory['per_token_layer']:.0f} beside {memory['dense_per_token_layer']:.0f}; "
        f"rank {cache.shadow_layers[0].sizes.rank}, truncation error {errors.min():.3f} to {errors.max():.3f}"
    )
    if missed:
        print(f"ShadowCache missed what full attention found at depths {missed}.")
    return 1 if missed else 0


def prompt(tokenizer, tokens: int, depth: float, key: str) -> torch.Tensor:
    """[1, tokens] or a few fewer: whole sentences of filler, the needle at its depth."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    filler, needle, task, question = (ids(t) for t in (FILLER + "\n", NEEDLE.format(key=key) + "\n", TASK + "\n",
                                                       QUESTION))  # fmt: skip
    times = (tokens - len(needle) - len(task) - len(question)) // len(filler)
    before = round(times * depth)
    return torch.tensor([task + filler * before + needle + filler * (times - before) + question])


@torch.no_grad()
def answer(model, tokenizer, ids: torch.Tensor, **options) -> tuple[str, float]:
    start = time.perf_counter()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, **options)
    return tokenizer.decode(out[0, ids.shape[1] :]), time.perf_counter() - start


if __name__ == "__main__":
    raise SystemExit(main())

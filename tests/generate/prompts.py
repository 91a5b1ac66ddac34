# SPDX-License-Identifier: Apache-2.0
"""What tests of the engine share: unequal random prompts and transformers' own greedy answers."""

import random

import torch


def unequal(count: int, *, longest: int = 60, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(7, 320) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def greedy(model, prompt: list[int], tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return out[0, len(prompt) :].tolist()

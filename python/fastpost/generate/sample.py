# SPDX-License-Identifier: Apache-2.0
"""Answers to prompts, one at a time, so that an answer never depends on what else was asked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

Prompt = str | list[dict]
"""A user message, or a conversation [{"role": ..., "content": ...}, ...] that ends before the reply."""


@torch.no_grad()
def generate(
    model,
    tokenizer,
    prompts: Iterable[Prompt],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    samples: int = 1,
) -> Iterator[list[str]]:
    """Yield, for each prompt, its `samples` answers without special tokens.

    A string becomes a user message of the tokenizer's chat template when it has one, else plain text to continue.
    temperature 0 is greedy. Sample j of prompt i is seeded by (seed, i, j) alone. Raises ValueError for options out
    of range or an empty prompt.
    """
    if temperature < 0 or not 0 < top_p <= 1 or max_new_tokens < 1 or samples < 1:
        raise ValueError(
            "[generate] options: expected temperature >= 0, 0 < top_p <= 1, max_new_tokens >= 1 and samples >= 1, got "
            f"{temperature}, {top_p}, {max_new_tokens} and {samples}."
        )
    how = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        if temperature
        else {"do_sample": False}
    )
    if not temperature:  # silence transformers about sampling options that come with the folder and do not apply
        how |= {"temperature": None, "top_p": None, "top_k": None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    for i, prompt in enumerate(prompts):
        ids = encode(tokenizer, prompt)
        if not ids:
            raise ValueError(f"[generate] prompt {i}: expected at least one token, got an empty prompt.")
        inputs = torch.tensor([ids], device=model.device)
        answers = []
        for j in range(samples if temperature else 1):
            torch.manual_seed(((seed * 1_000_003 + i) * 1_000_003 + j) % 2**63)
            out = model.generate(
                inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=max_new_tokens, pad_token_id=pad, **how
            )
            answers.append(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip())
        yield answers


def encode(tokenizer, prompt: Prompt, **arguments) -> list[int]:
    """Token ids of a prompt, up to where the model's own words begin. A rendered template is tokenised without a
    second BOS; `arguments` go to it."""
    if isinstance(prompt, str) and not tokenizer.chat_template:
        return tokenizer(prompt)["input_ids"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **arguments)
    return tokenizer(text, add_special_tokens=False)["input_ids"]

# SPDX-License-Identifier: Apache-2.0
"""Answers to prompts, in order: several at once, by the engine."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice

from fastpost.generate.engine import Engine
from fastpost.generate.one_by_one import OneByOne
from fastpost.generate.paged_cache import UnsupportedModel
from fastpost.generate.request import Request, Sampling

Prompt = str | list[dict]
"""A user message, or a conversation [{"role": ..., "content": ...}, ...] that ends before the reply."""


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
    max_batch: int = 32,
) -> Iterator[list[str]]:
    """Yield, for each prompt, its `samples` answers without special tokens.

    A string becomes a user message of the tokenizer's chat template when it has one, else plain text to continue.
    temperature 0 is greedy and gives one answer. The random numbers of sample j of prompt i depend on (seed, i, j)
    alone. At most max_batch answers are under way at once, so prompts are taken before the answers to earlier ones are
    yielded. Between yields the model is as it was. Raises ValueError for options out of range, an empty prompt, or one
    too long for the model, after the answers to those before it.
    """
    if temperature < 0 or not 0 < top_p <= 1 or max_new_tokens < 1 or samples < 1:
        raise ValueError(
            "[generate] options: expected temperature >= 0, 0 < top_p <= 1, max_new_tokens >= 1 and samples >= 1, got "
            f"{temperature}, {top_p}, {max_new_tokens} and {samples}."
        )
    defaults = getattr(model, "generation_config", None)
    sampling = Sampling(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, n=samples if temperature else 1, seed=seed,
        repetition_penalty=getattr(defaults, "repetition_penalty", None) or 1.0,
    )  # fmt: skip
    try:
        engine = Engine(model, tokenizer, max_batch=max_batch)
    except UnsupportedModel as error:
        warnings.warn(f"{error} Prompts go through transformers' generate, one at a time.", stacklevel=2)
        return _through_transformers(model, tokenizer, prompts, sampling)
    engine.pause()
    return _through_engine(engine, prompts, sampling)


def _through_engine(engine: Engine, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[list[str]]:
    tokenizer, numbered, error = engine.tokenizer, enumerate(prompts), None
    groups: deque = deque()  # the handles of each prompt that has not been yielded
    with engine:
        while True:
            while error is None and engine.waiting < max(2, engine.max_batch // 2):
                try:
                    i, prompt = next(numbered)
                except StopIteration:
                    break
                try:
                    groups.append(engine.submit(Request(_encoded(tokenizer, prompt, i), sampling, id=i)))
                except ValueError as raised:
                    error = raised
            if not groups:
                break
            if any(h.finish_reason is None for h in groups[0]):
                engine.resume()
                engine.step()
                continue
            engine.pause()
            yield [tokenizer.decode(h.token_ids, skip_special_tokens=True).strip() for h in groups.popleft()]
    if error is not None:
        raise error


def _through_transformers(model, tokenizer, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[list[str]]:
    """For models that the engine does not take."""
    requests = (Request(_encoded(tokenizer, prompt, i), sampling, id=i) for i, prompt in enumerate(prompts))
    completions = OneByOne(model, tokenizer).run(requests)
    while answers := list(islice(completions, sampling.n)):
        yield [tokenizer.decode(c.token_ids, skip_special_tokens=True).strip() for c in answers]


def _encoded(tokenizer, prompt: Prompt, i: int) -> list[int]:
    ids = encode(tokenizer, prompt)
    if not ids:
        raise ValueError(f"[generate] prompt {i}: expected at least one token, got an empty prompt.")
    return ids


def encode(tokenizer, prompt: Prompt, **arguments) -> list[int]:
    """Token ids of a prompt, up to where the model's own words begin. A rendered template is tokenised without a
    second BOS; `arguments` go to it."""
    if isinstance(prompt, str) and not tokenizer.chat_template:
        return tokenizer(prompt)["input_ids"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **arguments)
    return tokenizer(text, add_special_tokens=False)["input_ids"]

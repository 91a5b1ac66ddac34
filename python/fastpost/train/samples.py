# SPDX-License-Identifier: Apache-2.0
"""Answers of the model while it trains: what the curves do not show.

Greedy, and without a trace in the run: random states are put back, the model's mode too, and no gradient or cache
stays. The loss curve with samples has the bits of the one without.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from fastpost.data.collate import Example
from fastpost.generate.sample import encode

from .config import LogConfig
from .progress import progress

SHORT = 32
"""Tokens of a row without a prompt (plain text, or every token trained) that are given as one, at most half the row."""


class Prompt(NamedTuple):
    ids: list[int]
    text: str
    expected: str | None  # the data's own (chosen) reply, as much of it as a sample may have tokens


class Samples:
    """The prompts of log.samples. answer(model) -> one dict per prompt, as samples.jsonl has it."""

    def __init__(self, cfg: LogConfig, tokenizer, held_out: list[Example]):
        self.tokenizer, self.tokens = tokenizer, cfg.sample_tokens
        if isinstance(cfg.samples, int):
            self.prompts = [self._held_out(e) for e in held_out[: cfg.samples]]
        else:
            self.prompts = [Prompt(self._ids(text, i), text, None) for i, text in enumerate(cfg.samples)]

    def __bool__(self) -> bool:
        return bool(self.prompts)

    def answer(self, model: torch.nn.Module) -> list[dict]:
        with undisturbed(model):
            return [
                {"prompt": p.text, "answer": self._answer(model, p.ids)}
                | ({} if p.expected is None else {"expected": p.expected})
                for p in progress(self.prompts, "sample", unit="answers")
            ]

    def _answer(self, model: torch.nn.Module, ids: list[int]) -> str:
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        inputs = torch.tensor([ids], device=next(model.parameters()).device)
        out = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=self.tokens, pad_token_id=pad,
            do_sample=False, temperature=None, top_p=None, top_k=None,
        )  # fmt: skip
        return self.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip()

    def _held_out(self, example: Example) -> Prompt:
        """What precedes the first trained token of a row: its prompt, just as it is tokenised for training."""
        row = example.sequences[0]
        cut = row.first_scored + 1
        if cut < 2:
            cut = max(1, min(SHORT, len(row) // 2))
        ids, rest = list(row.ids[:cut]), list(row.ids[cut : cut + self.tokens])
        return Prompt(ids, self._decode(ids), self._decode(rest))

    def _ids(self, text: str, index: int) -> list[int]:
        ids = encode(self.tokenizer, text)
        if not text.strip() or not ids:
            raise ValueError(
                f"[log] log.samples[{index}]: expected a user message, got an empty string. Write one or remove it."
            )
        return ids

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


@contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Inside: eval mode, no gradients. Afterwards everything that a step depends on is as before."""
    modes = {module: module.training for module in model.modules()}
    state = random.getstate()
    try:
        with torch.random.fork_rng(), torch.no_grad():
            model.eval()
            yield
    finally:
        random.setstate(state)
        for module, mode in modes.items():
            module.training = mode


def brief(sample: dict, width: int = 110) -> str:
    """`What is 7 + 5? -> 7 + 5 = 12.` on one line of at most about `width` characters."""
    prompt, answer = (" ".join(sample[key].split()) for key in ("prompt", "answer"))
    room = max(20, width - min(len(answer), width // 2))
    prompt = prompt if len(prompt) <= room else "…" + prompt[-room:]
    answer = answer if len(answer) <= width - len(prompt) else answer[: max(20, width - len(prompt))] + "…"
    return f"{prompt} -> {answer or '(nothing)'}"

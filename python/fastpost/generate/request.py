# SPDX-License-Identifier: Apache-2.0
"""What the engine is asked and what it answers. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a request are chosen. Filters apply in transformers' order: repetition penalty, callback,
    temperature, top-k, top-p, min-p.

    max_new_tokens: at most so many tokens are sampled (finish_reason "length").
    temperature: 0 is greedy, the lowest id among equals.
    top_p: the likeliest tokens of this total mass; 1: all. top_k: the likeliest k; 0: all. min_p: tokens at least so
        likely as min_p times the likeliest; 0: all.
    repetition_penalty: logits of tokens in prompt and answer are divided by it (multiplied when negative); 1: none.
    n: answers; the prompt is computed once.
    stop: strings that end an answer. The text has none of them; token_ids keeps every token that was sampled.
    seed: a token depends on (seed, request id, index of the answer, position) and the logits, on nothing else.
    ignore_eos: go on to max_new_tokens.
    logprobs: None: none. k >= 0: the log-prob of each token sampled and of the k likeliest alternatives.
    logprob_of: "model": log softmax(logits / temperature) before penalty, callback and filters, which is what
        fastpost.linear_logprob(..., temperature=) gives in training (temperature 0 counts as 1). "sampled": of the
        distribution that was drawn from, after all of them.
    logits_callback: called with (token ids of prompt and answer so far, logits [V] float32); returns logits to go on
        with, or None for those it was given (which it may have changed in place).
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    n: int = 1
    stop: tuple[str, ...] = ()
    seed: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    logprob_of: Literal["model", "sampled"] = "model"
    logits_callback: Callable | None = None

    def __post_init__(self):
        """Raises ValueError for a value out of range."""
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        else:
            object.__setattr__(self, "stop", tuple(self.stop or ()))
        if self.logprobs is True or self.logprobs is False:
            object.__setattr__(self, "logprobs", 0 if self.logprobs else None)
        whole = {"max_new_tokens": 1, "top_k": 0, "n": 1, "seed": None, "logprobs": 0}
        for name, least in whole.items():
            value = getattr(self, name)
            if value is None and name == "logprobs":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
                _refuse(name, "a whole number" + ("" if least is None else f" of at least {least}"), value)
        for name, allowed, fits in (
            ("temperature", "a number from 0", lambda x: 0 <= x < float("inf")),
            ("top_p", "a number above 0, at most 1", lambda x: 0 < x <= 1),
            ("min_p", "a number from 0 to 1", lambda x: 0 <= x <= 1),
            ("repetition_penalty", "a number above 0", lambda x: 0 < x < float("inf")),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not fits(value):
                _refuse(name, allowed, value)
        for text in self.stop:
            if not isinstance(text, str) or not text:
                _refuse("stop", "strings that are not empty", text)
        if self.logprob_of not in ("model", "sampled"):
            _refuse("logprob_of", "'model' or 'sampled'", self.logprob_of)
        if self.logits_callback is not None and not callable(self.logits_callback):
            _refuse("logits_callback", "a function of (token ids, logits)", self.logits_callback)


def _refuse(name: str, expected: str, got) -> None:
    raise ValueError(f"[Sampling] {name}: expected {expected}, got {got!r}. Correct it or leave it out.")


@dataclass(frozen=True)
class Piece:
    """What a step added to one answer, as Request.stream gets it. Text comes late where it may become a stop string
    or is not yet a whole character; the texts of all pieces together are Completion.text."""

    id: object
    index: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None  # in the last piece


@dataclass(frozen=True)
class Request:
    """A prompt of token ids, at least one. `id` is any str or int; None: the number of the request in its engine, from
    0. `stream(Piece)` is called while the answer grows, from inside Engine.step."""

    prompt: list[int]
    sampling: Sampling = field(default_factory=Sampling)
    id: str | int | None = None
    stream: Callable[[Piece], None] | None = None


@dataclass(frozen=True)
class Completion:
    """One finished answer, the `index`-th of request `id`."""

    id: str | int
    index: int
    prompt_tokens: int
    token_ids: list[int]  # all that were sampled, the end-of-sequence token included
    text: str  # without special tokens, without the stop string
    finish_reason: FinishReason
    stop: str | None = None  # the stop string that ended it
    logprobs: list[float] | None = None  # of token_ids
    top_logprobs: list[list[tuple[int, float]]] | None = (
        None  # (id, or a server's word for it, log-prob) of the likeliest k
    )

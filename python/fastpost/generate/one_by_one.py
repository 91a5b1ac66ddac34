# SPDX-License-Identifier: Apache-2.0
"""Requests through transformers' own generate, one after the other: for models that Engine does not take, and for
caches of another kind, such as ShadowCache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from fastpost.generate.request import Completion, Piece, Request, Sampling
from fastpost.generate.sampling import stream
from fastpost.generate.takeover import end_tokens, longest
from fastpost.generate.text import Text


class OneByOne:
    """The same run() as Engine's. cache: called for each answer, makes its past_key_values; None: the model's own."""

    def __init__(self, model, tokenizer, cache: Callable | None = None):
        self.model, self.tokenizer, self.cache = model, tokenizer, cache
        pad = tokenizer.pad_token_id
        self._pad = pad if pad is not None else tokenizer.eos_token_id
        self._ends = sorted(end_tokens(model, tokenizer))
        self.positions = longest(model)
        self._stats = {"finished": 0, "prompt_tokens": 0, "new_tokens": 0}

    def __enter__(self) -> OneByOne:
        return self

    def __exit__(self, *_) -> None:
        pass

    def stats(self) -> dict:
        return dict(self._stats)

    def check(self, request: Request) -> None:
        """Raises ValueError when the request cannot run: an empty prompt, too long for the model, or what only Engine
        does."""
        how = request.sampling
        if not request.prompt:
            raise ValueError("[OneByOne] prompt: expected at least one token id, got none. Leave the request out.")
        if len(request.prompt) >= self.positions:
            raise ValueError(
                f"[OneByOne] prompt: expected fewer than the model's {self.positions} positions, got "
                f"{len(request.prompt)} tokens. Shorten it."
            )
        if how.ignore_eos or how.logits_callback is not None or how.logprob_of != "model":
            raise ValueError(
                "[OneByOne] sampling: expected no ignore_eos, logits_callback or logprob_of, which only Engine has."
            )

    def run(self, requests: Iterable[Request]) -> Iterator[Completion]:
        for number, request in enumerate(requests):
            self.check(request)
            for index in range(request.sampling.n):
                yield self._answer(request, number if request.id is None else request.id, index)

    @torch.no_grad()
    def _answer(self, request: Request, name, index: int) -> Completion:
        how, prompt = request.sampling, torch.tensor([request.prompt], device=self.model.device)
        room = min(how.max_new_tokens, self.positions - prompt.shape[1])
        kwargs = _options(how) | {
            "max_new_tokens": room,
            "pad_token_id": self._pad,
            "eos_token_id": self._ends or None,
        }
        if how.stop:
            kwargs |= {"stop_strings": list(how.stop), "tokenizer": self.tokenizer}
        if self.cache is not None:
            kwargs["past_key_values"] = self.cache()
        if request.stream is not None:
            kwargs["streamer"] = _Streamer(self.tokenizer, request, name, index)
        with torch.random.fork_rng(devices=[self.model.device] if self.model.device.type == "cuda" else []):
            torch.manual_seed(stream(how.seed, name, index) >> 1)
            out = self.model.generate(
                prompt, attention_mask=torch.ones_like(prompt), return_dict_in_generate=True,
                output_logits=how.logprobs is not None, **kwargs,
            )  # fmt: skip
        ids = out.sequences[0, prompt.shape[1] :].tolist()
        said = Text(self.tokenizer, how.stop)
        said.push(ids, last=True)
        text, stop = said.text, said.stopped
        reason = "stop" if stop is not None or (ids and ids[-1] in self._ends) else "length"
        values, top = _logprobs(out.logits, ids, how) if how.logprobs is not None else (None, None)
        self._stats["finished"] += 1
        self._stats["prompt_tokens"] += prompt.shape[1]
        self._stats["new_tokens"] += len(ids)
        if request.stream is not None:
            kwargs["streamer"].last(reason)
        return Completion(name, index, prompt.shape[1], ids, text, reason, stop, values, top)


def _options(how: Sampling) -> dict:
    """Arguments of model.generate; those that do not apply are put out, for the folder may have others."""
    options = {"do_sample": how.temperature > 0, "num_return_sequences": 1,
               "temperature": None, "top_p": None, "top_k": None, "min_p": None,
               "repetition_penalty": how.repetition_penalty}  # fmt: skip
    if how.temperature > 0:
        options |= {"temperature": how.temperature, "top_p": how.top_p, "top_k": how.top_k, "min_p": how.min_p}
    return options


def _logprobs(logits, ids: list[int], how: Sampling) -> tuple[list[float], list | None]:
    steps = torch.cat([step[:1] for step in logits]).float() / (how.temperature or 1.0)
    every = steps.log_softmax(-1)
    values = every[torch.arange(len(ids)), torch.tensor(ids)].tolist()
    if not how.logprobs:
        return values, None
    best = every.topk(how.logprobs)
    return values, [list(zip(i, v)) for i, v in zip(best.indices.tolist(), best.values.tolist())]


class _Streamer:
    """transformers' streamer, which gets the prompt and then one token at a time, for Request.stream."""

    def __init__(self, tokenizer, request: Request, name, index: int):
        self._text, self._stream, self._where = Text(tokenizer, request.sampling.stop), request.stream, (name, index)
        self._prompt = True

    def put(self, value) -> None:
        if self._prompt:
            self._prompt = False
            return
        ids = value.flatten().tolist()
        self._text.push(ids)
        self._stream(Piece(*self._where, tuple(ids), self._text.fresh(), None))

    def end(self) -> None:
        """Only `last` knows why."""

    def last(self, reason: str) -> None:
        self._text.push([], last=True)
        self._stream(Piece(*self._where, (), self._text.fresh(last=True), reason))

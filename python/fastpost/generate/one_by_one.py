# SPDX-License-Identifier: Apache-2.0
"""Requests through transformers' own generate, one after the other: for models that Engine does not take, and for
caches of another kind, such as ShadowCache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from fastpost.generate.request import Completion, Piece, Request, Sampling


class OneByOne:
    """The same run() as Engine's. cache: called for each answer, makes its past_key_values; None: the model's own."""

    def __init__(self, model, tokenizer, cache: Callable | None = None):
        self.model, self.tokenizer, self.cache = model, tokenizer, cache
        pad = tokenizer.pad_token_id
        self._pad = pad if pad is not None else tokenizer.eos_token_id
        ends = model.generation_config.eos_token_id
        ends = list(ends) if isinstance(ends, (list, tuple)) else [ends]
        self._ends = sorted({end for end in [*ends, tokenizer.eos_token_id] if end is not None})
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
        how, room = request.sampling, getattr(self.model.config, "max_position_embeddings", None)
        if not request.prompt:
            raise ValueError("[generate] prompt: expected at least one token, got an empty prompt.")
        if room is not None and len(request.prompt) + how.max_new_tokens > room:
            raise ValueError(
                f"[generate] prompt: expected prompt and answer within the model's {room} positions, got "
                f"{len(request.prompt)} + {how.max_new_tokens}. Shorten the prompt or max_new_tokens."
            )
        if how.ignore_eos or how.logits_callback is not None or how.logprob_of != "model":
            raise ValueError(
                "[generate] sampling: expected no ignore_eos, logits_callback or logprob_of, which only Engine has."
            )

    def run(self, requests: Iterable[Request]) -> Iterator[Completion]:
        for number, request in enumerate(requests):
            self.check(request)
            for index in range(request.sampling.n):
                yield self._answer(request, number if request.id is None else request.id, index)

    @torch.no_grad()
    def _answer(self, request: Request, name, index: int) -> Completion:
        how, prompt = request.sampling, torch.tensor([request.prompt], device=self.model.device)
        kwargs = _options(how) | {
            "pad_token_id": self._pad,
            "eos_token_id": sorted(e for e in self._ends if e is not None),
        }
        if how.stop:
            kwargs |= {"stop_strings": list(how.stop), "tokenizer": self.tokenizer}
        if self.cache is not None:
            kwargs["past_key_values"] = self.cache()
        if request.stream is not None:
            kwargs["streamer"] = _Streamer(self, request, name, index)
        with torch.random.fork_rng(devices=[self.model.device] if self.model.device.type == "cuda" else []):
            torch.manual_seed(_seed(how.seed, name, index))
            out = self.model.generate(
                prompt, attention_mask=torch.ones_like(prompt), return_dict_in_generate=True,
                output_logits=how.logprobs is not None, **kwargs,
            )  # fmt: skip
        ids = out.sequences[0, prompt.shape[1] :].tolist()
        text, stop = cut(self.tokenizer.decode(ids, skip_special_tokens=True), how.stop)
        reason = "stop" if stop is not None or (ids and ids[-1] in self._ends) else "length"
        values, top = _logprobs(out.logits, ids, how) if how.logprobs is not None else (None, None)
        self._stats["finished"] += 1
        self._stats["prompt_tokens"] += prompt.shape[1]
        self._stats["new_tokens"] += len(ids)
        if request.stream is not None:
            kwargs["streamer"].last(text, reason)
        return Completion(name, index, prompt.shape[1], ids, text, reason, stop, values, top)


def cut(text: str, stops: tuple[str, ...]) -> tuple[str, str | None]:
    """(text up to the first stop string, that string) or (text, None)."""
    found = [(at, stop) for stop in stops if (at := text.find(stop)) >= 0]
    return (text, None) if not found else (text[: min(found)[0]], min(found)[1])


def _options(how: Sampling) -> dict:
    """Arguments of model.generate; those that do not apply are put out, for the folder may have others."""
    options = {"max_new_tokens": how.max_new_tokens, "do_sample": how.temperature > 0, "num_return_sequences": 1,
               "temperature": None, "top_p": None, "top_k": None, "min_p": None,
               "repetition_penalty": how.repetition_penalty if how.repetition_penalty != 1 else None}  # fmt: skip
    if how.temperature > 0:
        options |= {"temperature": how.temperature, "top_p": how.top_p, "top_k": how.top_k, "min_p": how.min_p or None}
    return options


def _logprobs(logits, ids: list[int], how: Sampling) -> tuple[list[float], list | None]:
    steps = torch.cat([step[:1] for step in logits]).float() / (how.temperature or 1.0)
    every = steps.log_softmax(-1)
    values = every[torch.arange(len(ids)), torch.tensor(ids)].tolist()
    if not how.logprobs:
        return values, None
    best = every.topk(how.logprobs)
    return values, [list(zip(i, v)) for i, v in zip(best.indices.tolist(), best.values.tolist())]


def _seed(seed: int, name, index: int) -> int:
    if isinstance(name, int):
        return ((seed * 1_000_003 + name) * 1_000_003 + index) % 2**63
    return (seed * 1_000_003 + sum(ord(c) * 257**i for i, c in enumerate(str(name))) + index) % 2**63


class _Streamer:
    """transformers' streamer: pieces of text as they become certain, that is, without a half character at the end and
    without what may become a stop string."""

    def __init__(self, owner: OneByOne, request: Request, name, index: int):
        self.owner, self.request, self.name, self.index = owner, request, name, index
        self.ids: list[int] = []
        self.sent, self.began = 0, False

    def put(self, value) -> None:
        if not self.began:  # the prompt
            self.began = True
            return
        self.ids += value.flatten().tolist()
        text = self.owner.tokenizer.decode(self.ids, skip_special_tokens=True)
        sure, stop = cut(text, self.request.sampling.stop)
        if stop is None:
            held = 1 if text.endswith("�") else 0
            for word in self.request.sampling.stop:
                held = max([held] + [k for k in range(1, len(word)) if text.endswith(word[:k])])
            sure = text[: len(text) - held]
        self._send(sure, None)

    def end(self) -> None:
        pass

    def last(self, text: str, reason: str) -> None:
        self._send(text, reason)

    def _send(self, text: str, reason) -> None:
        if len(text) > self.sent or reason:
            self.request.stream(Piece(self.name, self.index, (), text[self.sent :], reason))
            self.sent = max(self.sent, len(text))

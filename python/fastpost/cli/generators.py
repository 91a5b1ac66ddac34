# SPDX-License-Identifier: Apache-2.0
"""What `fastpost generate` generates with: a model in this process, or a server. Both are opened as

with open_model(args, failed, say) as (generator, request):
    for row, completions in rows.answer(generator.run, rows, request): ...
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from fastpost.generate.request import Request, Sampling
from fastpost.generate.rows import Row

FIELDS = {
    "max_new_tokens": "--max-new-tokens",
    "temperature": "--temperature",
    "top_p": "--top-p",
    "top_k": "--top-k",
    "min_p": "--min-p",
    "repetition_penalty": "--repetition-penalty",
    "n": "--samples",
    "seed": "--seed",
}
"""Fields of Sampling and their options; --stop and --logprobs are the others."""
HOPELESS = 10
"""Rows that fail before any is answered: the fault is not theirs."""


@dataclass(frozen=True)
class RowRequest(Request):
    """A request that knows its row; `extra` goes into the body that a server gets."""

    row: Row | None = None
    extra: dict = field(default_factory=dict)


def sampling(args) -> Sampling:
    """What the command line asks for, of rows without a wish of their own."""
    asked = {name: getattr(args, option[2:].replace("-", "_")) for name, option in FIELDS.items()}
    try:
        return Sampling(**asked, stop=tuple(args.stop), logprobs=0 if args.logprobs else None)
    except ValueError as error:
        name, _, words = str(error).removeprefix("[Sampling] ").partition(": ")
        raise ValueError(f"generate: {FIELDS.get(name, f'--{name}')}: {words}") from None


def settings(args, model: str | None = None) -> dict:
    """What the answers depend on, by option name. `model`: its name at the endpoint."""
    how = sampling(args)
    found = {option: getattr(how, name) for name, option in FIELDS.items()}
    found |= {"--stop": list(how.stop), "--logprobs": args.logprobs, "--system": args.system, "--plain": args.plain}
    if args.endpoint:
        return found | {"--endpoint-model": model}
    found |= {"MODEL": str(Path(args.model).expanduser().resolve()), "weights of MODEL": _weights(args.model)}
    found |= {"--dtype": args.dtype, "--kv": args.kv}
    return found | (
        {"--shadow-rank": args.shadow_rank, "--shadow-budget": _budget(args)} if args.kv == "shadow" else {}
    )


def open_endpoint(args, failed: Callable[[Row, str], None], say: Callable[[str], None]):
    """An Endpoint whose model is known."""
    from fastpost.generate.endpoint import Endpoint

    endpoint = Endpoint(
        args.endpoint, args.endpoint_model, chat=not args.plain, concurrency=args.batch or 16, timeout=args.timeout,
        patience=args.patience, failed=lambda request, message: failed(request.row, message), say=say,
    )  # fmt: skip
    endpoint.find_model()
    return endpoint


def endpoint_request(args) -> Callable[[Row], Request]:
    how = sampling(args)

    def request(row: Row) -> Request:
        prompt, arguments = conversation(args, row), template_arguments(row)
        extra = {name: arguments.pop(name) for name in ("tools",) if name in arguments}
        extra |= {"chat_template_kwargs": arguments} if arguments else {}
        return RowRequest(prompt, of_row(how, row), row=row, extra=extra)

    return request


@contextmanager
def open_model(args, failed: Callable[[Row, str], None], say: Callable[[str], None]) -> Iterator[tuple]:
    """(generator, request): request(row) is None, and `failed` was called, for a row that cannot be done."""
    import torch

    from fastpost.generate.sample import encode
    from fastpost.hf import adapter, folder
    from fastpost.train.device import pick_device

    tokenizer = folder.load_tokenizer(args.model)
    if args.system is not None and not tokenizer.chat_template:
        raise ValueError(
            "generate: --system: expected a model with a chat template, got one without. Put it into the prompt."
        )
    if args.plain:
        tokenizer.chat_template = None
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    model = adapter.load(args.model, dtype, "sdpa", check=False).to(pick_device(args.device))
    how = sampling(args)
    short: list[str] = []  # the first prompt that --kv shadow does nothing for
    with _engine(args, model, tokenizer, say) as generator, warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\[ShadowCache\] .* kept dense")  # said here, once
        dense_below = generator.cache().rows.dense_below if args.kv == "shadow" else 0

        def request(row: Row) -> Request | None:
            try:
                ids = encode(tokenizer, conversation(args, row), **template_arguments(row))
                made = RowRequest(ids, of_row(how, row), row=row)
                generator.check(made)
                if len(ids) < dense_below and not short:
                    short.append(row.where)
                    say(f"{row.where}: {len(ids)} tokens: prompts of fewer than {dense_below} stay dense")
                return made
            except Exception as error:  # a chat template raises what it likes
                failed(row, str(error))
                return None

        yield generator, request


def _engine(args, model, tokenizer, say: Callable[[str], None]):
    from fastpost.generate.engine import Engine
    from fastpost.generate.one_by_one import OneByOne
    from fastpost.generate.paged_cache import UnsupportedModel

    if args.kv == "shadow":
        from fastpost import ShadowCache

        def cache() -> ShadowCache:
            return ShadowCache(model.config, rank=args.shadow_rank, budget=_budget(args))

        return OneByOne(model, tokenizer, cache)
    try:
        return Engine(model, tokenizer, max_batch=args.batch or 32)
    except UnsupportedModel as error:
        say(f"{error} Prompts go through transformers' generate, one at a time.")
        return OneByOne(model, tokenizer)


def _budget(args) -> int:
    return 2048 if args.shadow_budget is None else args.shadow_budget


def conversation(args, row: Row) -> str | list[dict]:
    """The prompt of a row with the system message that it or the command has; a conversation's own comes first."""
    system = row.system if row.system is not None else args.system
    if system is None or args.plain:
        return row.prompt
    messages = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else row.prompt
    return messages if messages[0]["role"] == "system" else [{"role": "system", "content": system}, *messages]


def of_row(how: Sampling, row: Row) -> Sampling:
    """`how` with what the row says itself. Greedy answers are alike, so there is one."""
    how = replace(how, **row.own)
    return how if how.temperature > 0 else replace(how, n=1)


def template_arguments(row: Row) -> dict:
    """What the columns tools and chat_template_kwargs give to the chat template, as in training."""
    if not any(name in row.values for name in ("tools", "chat_template_kwargs")):
        return {}
    from fastpost.data import columns

    return columns.template_arguments(columns.Row(row.index, row.where, row.values))


def _weights(path: str) -> str:
    """What tells one model from another without reading all of it: names, sizes and times of its weight files."""
    from fastpost.hf import folder

    place = folder.locate(path)
    files = sorted(f for p in (place.base, place.adapter) if p for f in p.glob("*.safetensors"))
    parts = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

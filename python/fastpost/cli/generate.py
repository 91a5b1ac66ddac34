# SPDX-License-Identifier: Apache-2.0
"""`fastpost generate MODEL [PROMPT ...]`: answer prompts, greedy or sampled."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fastpost generate", description="Answer prompts, greedy unless --temperature is given."
    )
    parser.add_argument("model", metavar="MODEL", help="Hugging Face, adapter or run folder")
    parser.add_argument(
        "prompts", nargs="*", metavar="PROMPT", help="user messages; without any, lines of standard input"
    )
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a user message; may be repeated")
    parser.add_argument(
        "--file", type=Path, metavar="JSONL", help="rows whose 'prompt' is a string or a list of messages"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="take only the first N prompts")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (256)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 = greedy (default)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest tokens of total mass P"
    )
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="answers per prompt, when sampling")
    parser.add_argument(
        "--seed", type=int, default=0, help="an answer depends on the seed and its prompt's number only (0)"
    )
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="precision of the model (bf16)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", action="store_true", help="one JSON object per prompt: prompt, answers")
    args = parser.parse_args(argv)
    prompts = args.prompts + args.prompt
    if args.file:
        prompts += read_prompts(args.file)
    if not prompts and not args.file:
        prompts = list(_lines(sys.stdin))
    if not prompts:
        raise ValueError(
            "generate: expected a prompt, got no prompt. Give one as an argument, with --file rows.jsonl, or on stdin."
        )
    prompts = prompts[: args.limit]

    import torch

    from fastpost.generate import generate
    from fastpost.hf import adapter, folder
    from fastpost.train.device import pick_device

    tokenizer = folder.load_tokenizer(args.model)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    model = adapter.load(args.model, dtype, "sdpa", check=False).to(pick_device(args.device))
    answers = generate(
        model, tokenizer, prompts, max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p,
        seed=args.seed, samples=args.samples,
    )  # fmt: skip
    for prompt, texts in zip(prompts, answers, strict=True):
        if args.json:
            print(json.dumps({"prompt": prompt, "answers": texts}, ensure_ascii=False), flush=True)
        else:
            shown = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            print(f"> {shown}", *texts, sep="\n", end="\n\n", flush=True)
    return 0


def read_prompts(path: Path) -> list:
    """The 'prompt' of each row of a .jsonl file. Raises ValueError with the line for a broken row."""
    if not path.is_file():
        raise ValueError(f"{path}: expected a .jsonl file of prompts, got no such file. Check the path of --file.")
    prompts = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip():
            continue
        try:
            prompts.append(json.loads(text)["prompt"])
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}:{number}: expected an object with 'prompt', got broken JSON: {error}. Correct or remove it."
            ) from None
        except (KeyError, TypeError):
            row = json.loads(text)
            got = f"columns {', '.join(row)}" if isinstance(row, dict) else type(row).__name__
            raise ValueError(
                f"{path}:{number}: expected an object with 'prompt', got {got}. Rename the column, or write it."
            ) from None
    return prompts


def _lines(stream) -> Iterator[str]:
    return (line.rstrip("\n") for line in stream if line.strip())

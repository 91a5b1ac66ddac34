# SPDX-License-Identifier: Apache-2.0
"""`fastpost eval MODEL [MODEL ...] --perplexity TEXT`: perplexity of a held-out text, model by model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fastpost eval",
        description="Perplexity of a text that the models have not seen, in windows. Models are Hugging Face, adapter "
        "or run folders, quantised or not.",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folder; several make a table")
    parser.add_argument(
        "--perplexity", required=True, metavar="TEXT",
        help=".txt, or .jsonl, .json, .parquet with text, messages, or prompt and completion; rows are read as one "
        "text, each ended by EOS",
    )  # fmt: skip
    parser.add_argument("--window", type=int, metavar="N", help="tokens at once (2048, or what the model can read)")
    parser.add_argument(
        "--stride", type=int, metavar="N",
        help="begin of the next window after this one's (N - 1: every token is scored, with the shortest past)",
    )  # fmt: skip
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N tokens")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="precision of the computation (bf16)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", action="store_true", help="one JSON object a model")
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 2:
        raise ValueError(f"eval: --limit: expected 2 tokens or more, got {args.limit}.")

    import torch

    from fastpost.cli.built_in import PREFIX, data, model
    from fastpost.hf import folder
    from fastpost.hf.perplexity import load, perplexity
    from fastpost.quantize.calibration import token_stream
    from fastpost.train.device import pick_device

    device, dtype = pick_device(args.device), {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    rows, text = [], data(args.perplexity, "--perplexity")
    for path in (model(name, "MODEL") if name.startswith(PREFIX) else name for name in args.models):
        tokens = token_stream(text, folder.load_tokenizer(path), args.limit)[: args.limit]
        loaded = load(path, dtype).to(device)
        limit = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
        window = args.window or min(2048, limit or 2048)
        if limit and window > limit:
            raise ValueError(f"eval: --window: {path} reads {limit} tokens at most, got {window}. Take less.")
        found = perplexity(loaded, tokens, window, args.stride)
        row = {"model": str(path), "perplexity": found.perplexity, "loss": found.mean, "tokens": found.tokens,
               "windows": found.windows, "window": window, "stride": args.stride or window - 1,
               "megabytes": size(path)}  # fmt: skip
        rows.append(row)
        del loaded  # before the next one comes
        if args.json:
            print(json.dumps(row), flush=True)
    if not args.json:
        width = max(len(r["model"]) for r in rows)
        print(f"{'model':<{width}}  {'perplexity':>10}  {'loss':>8}  {'tokens':>9}  {'windows':>7}  {'MB':>8}")
        for r in rows:
            print(f"{r['model']:<{width}}  {r['perplexity']:>10.4f}  {r['loss']:>8.4f}  {r['tokens']:>9}  "
                  f"{r['windows']:>7}  {r['megabytes']:>8.1f}")  # fmt: skip
    return 0


def size(path: str | Path) -> float:
    """MB of the weight files that stand behind a path."""
    from fastpost.hf import folder

    place = folder.locate(path)
    files = [f for p in (place.base, place.adapter) if p for f in p.glob("*.safetensors")]
    return sum(f.stat().st_size for f in files) / 1e6

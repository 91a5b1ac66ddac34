# SPDX-License-Identifier: Apache-2.0
"""`fastpost quantize MODEL --method NAME --out DIR`: a model in fewer bits."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

DEFAULT_TEXT, DEFAULT_HELD_OUT = "built-in/word-problems/texts/train.jsonl", "built-in/word-problems/texts/new.jsonl"
HELD_OUT_WINDOWS = 16


def main(argv: list[str]) -> int:
    args = parse(argv)

    import torch

    from fastpost.cli.built_in import data, model
    from fastpost.hf import folder
    from fastpost.quantize.calibration import ENOUGH, draw, token_stream
    from fastpost.quantize.methods import settings
    from fastpost.quantize.output import expect_plain
    from fastpost.quantize.run import quantize_model
    from fastpost.train.device import pick_device

    how = settings(
        args.method, args.bits, args.group_size, args.format, args.seed, symmetric=args.symmetric,
        act_order=args.act_order, double_quant=args.double_quant, damping=args.damping, alpha=args.alpha,
        binary_share=args.binary_share,
    )  # fmt: skip
    source = model(args.model, "MODEL") if args.model.startswith("built-in/") else Path(args.model).expanduser()
    base = folder.locate(source).base
    expect_plain(base)
    folder.expect_new(args.out)
    length = longest(base) if args.length is None else args.length
    if args.threads:
        torch.set_num_threads(args.threads)
    tokenizer, rows, left = folder.load_tokenizer(source), None, None
    calibrated = how.needs != "nothing"
    if not calibrated and (args.calibration or args.rows):
        raise ValueError(f"quantize: --calibration, --rows: {how.method} looks at weights alone. Leave them out.")
    if calibrated:
        text = data(args.calibration or DEFAULT_TEXT, "--calibration")
        tokens = token_stream(text, tokenizer, ENOUGH * (args.rows or 128) * length)
        rows, left = draw(tokens, args.rows, length, args.seed, text)
    where = args.perplexity or (DEFAULT_HELD_OUT if args.calibration is None else None)
    if where is not None:
        path = data(where, "--perplexity")
        stream = token_stream(path, tokenizer, HELD_OUT_WINDOWS * length)
        length = min(length, max(2, len(stream)))
        left, _ = draw(stream, max(1, min(HELD_OUT_WINDOWS, len(stream) // length)), length, args.seed, path)
    held_out = None if left is None else left[:HELD_OUT_WINDOWS]
    print(f"{source}: {how.says()}" + (f", calibrated on {len(rows)} rows of {rows.shape[1]} tokens" if calibrated
                                       else ""), flush=True)  # fmt: skip
    begin = time.monotonic()
    result = quantize_model(source, args.out, how, rows, held_out, device=pick_device(args.device))
    if result.resumed:
        print(f"{result.resumed} blocks were there from an earlier attempt")
    print(table(source, result, held_out, where, time.monotonic() - begin))
    return 0


def longest(base: Path) -> int:
    """2048 tokens, or as many as the model can read."""
    import json

    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    return min(2048, config.get("max_position_embeddings") or 2048)


def table(source: Path, result, held_out, where: str | None, seconds: float) -> str:
    """Before and after, for people."""
    from fastpost.cli.perplexity import size
    from fastpost.train.progress import duration

    lines = [f"{'':22s}{'before':>12}{'after':>12}"]
    if result.before is not None:
        values = [math.exp(min(loss / tokens, 700)) for loss, tokens in (result.before, result.after)]
        text = where or "the calibration file that were not drawn"
        lines.append(f"{'perplexity':22s}{values[0]:>12.4f}{values[1]:>12.4f}   "
                     f"{len(held_out)} windows of {held_out.shape[1]} tokens of {text}")  # fmt: skip
    else:
        lines.append(f"{'perplexity':22s}{'?':>12}{'?':>12}   no text is left to measure on: give --perplexity TEXT")
    lines.append(f"{'MB':22s}{size(source):>12.1f}{size(result.out):>12.1f}")
    lines.append(f"{'bits a weight':22s}{'':>12}{result.bits:>12.3f}   {result.matrices} linear layers, codes alone "
                 f"{result.code_bits:.3f}")  # fmt: skip
    lines.append(f"{'error of the weights':22s}{'':>12}{result.error:>12.4f}   |W' - W| / |W|")
    return "\n".join([*lines, f"{result.out}: written in {duration(seconds)}"])


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fastpost quantize",
        description="Write a model with the linear layers of its decoder blocks in fewer bits. One block is in memory "
        "at a time; a run that was ended goes on when it is called again.",
        epilog="rtn, nf4, db-llm and ir-qlora need no text; gptq, awq, smoothquant, quip, pb-llm and billm do.",
    )
    parser.add_argument("model", metavar="MODEL", help="Hugging Face folder in full precision, or built-in/smollm2")
    parser.add_argument(
        "--method", required=True, metavar="NAME",
        help="rtn, gptq, awq, nf4, smoothquant, quip, pb-llm, billm, db-llm or ir-qlora",
    )  # fmt: skip
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="must not exist or be empty")
    parser.add_argument(
        "--bits", type=int, metavar="N",
        help="1 to 8 for rtn, gptq, awq (4) and quip (2); 4, 6 or 8 for smoothquant (8); the others do one number",
    )  # fmt: skip
    parser.add_argument(
        "--group-size", type=int, metavar="N", help="columns that share a scale (128; nf4, ir-qlora 64); -1: a row"
    )
    parser.add_argument(
        "--format", metavar="NAME",
        help="fastpost (four bits in groups), gptq, awq, or bf16: dequantised, which everything reads. Default: "
        "fastpost where it can be",
    )  # fmt: skip
    text = parser.add_argument_group("texts")
    text.add_argument(
        "--calibration", metavar="FILE",
        help=".txt, or .jsonl, .json, .parquet with text, messages, or prompt and completion (the built-in problems)",
    )  # fmt: skip
    text.add_argument("--rows", type=int, metavar="N", help="calibration rows (128, or seven eighths of the text)")
    text.add_argument("--length", type=int, metavar="N", help="tokens of a row (2048, or what the model can read)")
    text.add_argument("--seed", type=int, default=2, help="of the choice of rows, and of quip's rotations (2)")
    text.add_argument(
        "--perplexity", metavar="FILE", help="measure on this text instead of on what calibration leaves of its file"
    )
    own = parser.add_argument_group("options of single methods")
    own.add_argument("--symmetric", action="store_true", help="rtn, gptq, awq: no zero points")
    own.add_argument("--act-order", action="store_true", help="gptq: the columns that matter first")
    own.add_argument("--double-quant", action="store_true", help="nf4: scales in eight bits")
    own.add_argument(
        "--damping", type=float, metavar="X", help="gptq, pb-llm, billm: share of the mean diagonal (0.01)"
    )
    own.add_argument("--alpha", type=float, metavar="X", help="smoothquant: how much goes to the weights (0.5)")
    own.add_argument("--binary-share", type=float, metavar="X", help="pb-llm: share of weights in one bit (0.9)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (torch's default)")
    return parser.parse_args(argv)

# SPDX-License-Identifier: Apache-2.0
"""The decode engine beside transformers' generate: one request, and 32 requests of unequal length.

    python -m bench.generate --model DIR --threads 1 [--json]        writes bench/results/<machine>-generate.json

Greedy, bf16, every answer to its full length (no end token), the same model object on both sides in turn. transformers
gets the 32 as one batch padded on the left and goes on to the longest answer; only tokens that were asked for count.
Tokens per second are new tokens by all of the time, prompts included. The goals are those of the project: at least 1.5
times transformers at one request, 3 times at 32.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from pathlib import Path

import torch

from bench import machine, timing

ONE, MANY = 1.5, 3.0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.generate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--model", required=True, help="Hugging Face folder, as SmolLM2-135M-Instruct")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--requests", type=int, default=32, help="of the second case (32)")
    parser.add_argument("--repeat", type=int, default=3, help="rounds, both sides in turn (3)")
    parser.add_argument("--clock", choices=sorted(timing.CLOCKS), default="wall", help="cpu: for one thread only")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument(
        "--json", nargs="?", const="", metavar="FILE", help="results/<machine>-generate.json by default"
    )
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    from transformers import AutoModelForCausalLM

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation="sdpa").to(device).eval()
    model.generation_config.eos_token_id = None
    result = machine.describe(device) | {"model": Path(args.model).name, "threads": args.threads, "dtype": args.dtype,
                                         "clock": args.clock, "generate": []}  # fmt: skip
    before = machine.probe()
    vocab = model.config.vocab_size
    for requests, goal in ((unequal(1, vocab), ONE), (unequal(args.requests, vocab), MANY)):
        case = measure(model, requests, args.repeat, timing.CLOCKS[args.clock]) | {"goal": goal}
        result["generate"].append(case)
        print(line(case), flush=True)
    after = machine.probe()
    result["probe"] = {"before": before, "after": after, "verdict": machine.verdict(before, after, args.clock)}
    print("\n".join(result["probe"]["verdict"]))
    if args.json is not None:
        path = Path(args.json or Path(__file__).parent / "results" / f"{result['machine']}-generate.json")
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"Wrote {path}.")
    return 0


def unequal(count: int, vocab: int = 10_000) -> list[tuple[list[int], int]]:
    """(prompt ids, new tokens) of each request: 16 to 256 and 8 to 128, evenly in their logarithm."""
    draw = random.Random(count)
    top = min(vocab, 10_000)
    sizes = [(int(16 * 16 ** draw.random()), int(8 * 16 ** draw.random())) for _ in range(count)]
    return [([draw.randrange(100, top) for _ in range(p)], n) for p, n in ([(32, 64)] if count == 1 else sizes)]


def measure(model, requests: list[tuple[list[int], int]], repeat: int, clock: timing.Clock) -> dict:
    """Seconds of both sides, and how many of the tokens are the same (the sums are rounded in different order)."""
    from fastpost.generate import Engine, Request, Sampling

    engine = Engine(model, None, max_batch=32, reuse_prefix=False)
    engine.pause()
    asked = [Request(prompt, Sampling(max_new_tokens=n, ignore_eos=True)) for prompt, n in requests]
    said: dict[str, list[list[int]]] = {}

    def ours(_: int) -> None:
        engine.resume()
        said["fastpost"] = [c.token_ids for (c,) in engine.generate(asked)]
        engine.pause()

    longest, most = max(len(p) for p, _ in requests), max(n for _, n in requests)
    ids = torch.tensor([[0] * (longest - len(p)) + p for p, _ in requests], device=model.device)
    seen = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p, _ in requests], device=model.device)

    def theirs(_: int) -> None:
        out = model.generate(ids, attention_mask=seen, max_new_tokens=most, do_sample=False, pad_token_id=0)
        said["transformers"] = [row[:n] for row, (_, n) in zip(out[:, longest:].tolist(), requests, strict=True)]

    times = timing.interleave({"fastpost": ours, "transformers": theirs}, repeat, model.device, clock)
    stats = engine.stats()
    engine.close()
    tokens = sum(n for _, n in requests)
    rows = zip(said["fastpost"], said["transformers"], strict=True)
    same = sum(a == b for ours_, theirs_ in rows for a, b in zip(ours_, theirs_, strict=True))
    return {
        "requests": len(requests), "prompt_tokens": sum(len(p) for p, _ in requests), "new_tokens": tokens,
        "seconds": times, "tokens_per_second": {k: tokens / statistics.median(t) for k, t in times.items()},
        "ratio": statistics.median(times["transformers"]) / statistics.median(times["fastpost"]),
        "same_tokens": same / tokens,
        "outside_forward_ms": 1e3 * (stats["seconds"] - stats["forward_seconds"]) / stats["steps"],
    }  # fmt: skip


def line(case: dict) -> str:
    speed = case["tokens_per_second"]
    return (
        f"{case['requests']} requests, {case['prompt_tokens']} prompt and {case['new_tokens']} new tokens: fastpost "
        f"{speed['fastpost']:.1f} tokens/s, transformers {speed['transformers']:.1f}, {case['ratio']:.2f} x (goal "
        f"{case['goal']} x); {100 * case['same_tokens']:.0f} % of the tokens equal; a step takes "
        f"{case['outside_forward_ms']:.2f} ms outside the model's forward"
    )


if __name__ == "__main__":
    raise SystemExit(main())

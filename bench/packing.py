# SPDX-License-Identifier: Apache-2.0
"""What packing is worth: optimizer steps on packed rows and on the same rows padded to the longest of the step.

    python -m bench.packing --model DIR [--rows 16] [--repeat 3] [--data GSM8K]

Both are fastpost's train_step with the same model, optimizer, recomputation and fused head (which computes scored
tokens alone, padded or not), in one process, taking turns. The padded rows go through transformers' ordinary forward:

    padded            with its attention mask, as trainers do
    padded, no mask   right padding under causal attention needs none, so attention may take its fast path

Pairs are packed with the prompt that chosen and rejected share there once. One thread.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

import fastpost
from bench import train_rows
from bench.timing import CLOCKS
from bench.train_sides import MAX_LENGTH, OBJECTIVES
from fastpost import objectives
from fastpost.data.collate import IGNORE, Batch, collate
from fastpost.train import step

FORMS = ("packed", "padded", "padded, no mask")
MEASURED = ("sft", "simpo")
"""Rows and pairs. (A step of DPO costs what one of SimPO does once it has its reference log-probs.)"""


@dataclass
class Padded(Batch):
    """input_ids int64 [S, L] and `mask` int64 [S, L] or None; target int64 [S L]; cu_seqlens 0, L, 2 L, ..."""

    mask: torch.Tensor | None = None


def pad(examples: list, masked: bool) -> Padded:
    """The sequences of `examples`, one a row, filled up on the right."""
    sequences = [s for e in examples for s in e.sequences]
    longest, packed = max(map(len, sequences)), collate(examples, share_prompt=False)
    lengths = packed.cu_seqlens.diff().tolist()

    def rows(flat: torch.Tensor, fill: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(flat.split(lengths), batch_first=True, padding_value=fill)

    mask = rows(torch.ones_like(packed.target), 0)
    return Padded(
        **{**vars(packed), "input_ids": rows(packed.input_ids[0], 0), "target": rows(packed.target, IGNORE).flatten(),
           "cu_seqlens": torch.arange(len(sequences) + 1, dtype=torch.int32) * longest},
        mask=mask if masked else None,
    )  # fmt: skip


def forward(model: torch.nn.Module, batch: Padded, objective, temperature: float = 1.0):
    """fastpost.train.forward.forward of a padded batch."""
    from fastpost.train.forward import Output

    out = model.base_model(input_ids=batch.input_ids, attention_mask=batch.mask, use_cache=False)
    weight, hidden = model.get_output_embeddings().weight, out.last_hidden_state.flatten(0, 1)
    scored = fastpost.preference_loss(hidden, weight, batch.target, batch.cu_seqlens, objective)
    return Output(*scored, None, None, None)  # no routers


def measure(model: str, kind: str, data: Path, *, size: int, repeat: int, clock: str) -> dict:
    """Seconds of a step in each form, and its loss; `size` sequences a step."""
    from fastpost.data.loader import load_dataset
    from fastpost.hf.folder import load_tokenizer
    from fastpost.train.config import from_dict
    from fastpost.train.forward import load_policy
    from fastpost.train.optim import AdamW

    count = size // 2 if train_rows.PAIRED[kind] else size
    source, texts = train_rows.texts(data, count * (repeat + 1))
    tokenizer, now = load_tokenizer(model), CLOCKS[clock]
    with tempfile.TemporaryDirectory() as name:
        train_rows.write(Path(name), texts, kind, tokenizer)
        cfg = from_dict({
            "model": {"path": str(model)}, "objective": OBJECTIVES[kind],
            "data": {"train": f"{name}/fastpost.jsonl", "max_length": MAX_LENGTH, "cache": None},
        })  # fmt: skip
        objective = objectives.from_name(cfg.objective.name, **cfg.objective.fields)
        examples = load_dataset(cfg.data, tokenizer, objective).examples
    policy = load_policy(cfg, torch.device("cpu"))
    optimizer = AdamW.from_config(policy, cfg)
    policy.train()

    def run(form: str, turn: int) -> tuple[float, float]:
        rows, begin = examples[turn * count : (turn + 1) * count], now()
        batch = collate(rows) if form == "packed" else pad(rows, masked=form == "padded")
        with mock.patch.object(step, "forward", step.forward if form == "packed" else forward):
            # At a rate of 0 every form starts from the same weights.
            values = step.train_step(policy, objective, optimizer, [batch], step=turn, lr=0.0, max_grad_norm=1.0)
        return now() - begin, values["loss"]

    times, losses = {f: [] for f in FORMS}, {f: [] for f in FORMS}
    for turn in range(repeat + 1):
        for form in FORMS[:: -1 if turn % 2 else 1]:
            seconds, loss = run(form, turn)
            if turn:  # the first warms up
                times[form].append(seconds)
                losses[form].append(loss)
    used = examples[count : (repeat + 1) * count]
    lengths = [[len(s) for e in used[i : i + count] for s in e.sequences] for i in range(0, len(used), count)]
    return {
        "kind": kind, "rows": source, "sequences_a_step": size, "clock": clock,
        "tokens": sum(map(sum, lengths)),
        "computed": sum(e.computed for e in used),
        "padded": sum(len(x) * max(x) for x in lengths),
        "seconds": times, "loss": losses,
    }  # fmt: skip


def speedup(case: dict, form: str) -> float:
    """How many times the tokens per second of `form` packed rows do: the median over the steps."""
    return statistics.median(b / a for a, b in zip(case["seconds"]["packed"], case["seconds"][form]))


def report(case: dict) -> str:
    title = f"{case['kind']}, {case['sequences_a_step']} sequences a step from {case['rows']}: {case['tokens']} tokens"
    lines = [f"\n{title}, {case['computed']} computed when packed, {case['padded']} when padded"]
    for form, seconds in case["seconds"].items():
        away = max(abs(a - b) for a, b in zip(case["loss"][form], case["loss"]["packed"]))
        figures = f"{statistics.median(seconds):7.2f} s/step {case['tokens'] / sum(seconds):8.1f} tok/s"
        other = (
            "" if form == "packed" else f"   loss {away:.1e} away; packed is {speedup(case, form):.2f} times as fast"
        )
        lines.append(f"  {form:16} {figures}{other}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser("python -m bench.packing", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--model", required=True, help="Hugging Face folder of a chat model, as SmolLM2-135M-Instruct")
    parser.add_argument("--data", default=os.environ.get("FASTPOST_GSM8K", "gsm8k"), help="GSM8K folder")
    parser.add_argument("--rows", type=int, default=16, help="sequences in a step (16)")
    parser.add_argument("--repeat", type=int, default=3, help="steps that are timed (3)")
    parser.add_argument("--clock", choices=CLOCKS, default="cpu", help="cpu (default): leaves out what others took")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    cases = []
    for kind in MEASURED:
        cases.append(measure(args.model, kind, Path(args.data), size=args.rows, repeat=args.repeat, clock=args.clock))
        print(report(cases[-1]), flush=True)
    return cases


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""`fastpost data RECIPE`: what the model will see. Most mistakes of post-training are silent and live in the mask; here
they show.

Prints what was kept, cut and dropped and why, lengths, the share of trained tokens, BOS, whether the end of a turn is
trained, and three rows with their trained tokens marked: in colour on a terminal, in [[ ]] elsewhere."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
from pathlib import Path

from fastpost.train.config import Config, help_text, load_config

ROWS = 3
USAGE = """usage: fastpost data RECIPE [--group.key VALUE ...]                    show what the model will see
       fastpost data score RECIPE OUT.jsonl [--ngram REFERENCE]       perplexity of each document
       fastpost data select SCORED.jsonl OUT.jsonl --tokens BUDGET    the documents of lowest perplexity"""


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{USAGE}\n\n{help_text()}")
        return 0
    if argv[0] in ("score", "select"):
        return importlib.import_module(f"fastpost.cli.{argv[0]}").main(argv[1:])
    cfg = load_config(argv[0], argv[1:])
    from fastpost import objectives
    from fastpost.data.loader import load_dataset
    from fastpost.data.mixture import Mixture
    from fastpost.hf.folder import load_tokenizer
    from fastpost.train import reference

    objective = objectives.from_name(cfg.objective.name, **cfg.objective.fields)
    tokenizer = load_tokenizer(cfg.model.path)
    require = reference.columns(objective, reference.sources(cfg.model, objective))
    for path in [cfg.data.train] + [cfg.data.eval] * (cfg.data.eval not in (None, cfg.data.train)):
        data = load_dataset(cfg.data, tokenizer, objective, path=path, require=require)
        for part in data.split():
            print("\n".join(describe(cfg, part, tokenizer)))
            if path == cfg.data.train:
                for example in part.examples[:ROWS]:
                    print("\n".join(show(example, tokenizer, colour())))
        if path == cfg.data.train:
            mixture = Mixture(data, seed=cfg.train.seed, tokens=cfg.data.epoch_tokens, fixed=cfg.data.draw == "fixed")
            print(*mixture.lines(), sep="\n", end="\n" * (not mixture.whole))
        print()
    return 0


def describe(cfg: Config, data, tokenizer) -> list[str]:
    """The account of a dataset in a few lines, warnings last."""
    report = data.report
    sequences = [s for e in data.examples for s in e.sequences]
    lengths = sorted(len(s) for s in sequences)
    trained = sum(s.trained.count(1) for s in sequences)
    p50, p95 = (lengths[min(len(lengths) - 1, int(len(lengths) * q))] for q in (0.5, 0.95))
    end = f"{report.end} trained in {report.ends_trained}/{report.sequences}" if report.end else "none trained"
    share = f"trained {trained} ({trained / sum(lengths):.1%})"
    lines = [
        f"{report.path}  ({report.kind.replace('_', '-')})",
        report.line(),
        f"tokens {sum(lengths)}   p50 {p50}  p95 {p95}  max {lengths[-1]}   {share}",
        f"BOS {report.bos} a sequence   end of turn {end}   {template(tokenizer)}",
    ]
    lines += [part.cache for part in data.parts if part.cache]
    if report.inner_ends:
        lines.append(f"note: {report.inner_ends} documents hold {report.end} inside")
    if report.merged:
        lines.append(
            f"note: {report.merged} sequences would share a token between prompt and reply; "
            "they are tokenised apart, as when serving"
        )
    if not report.end:
        lines.append("warning: no sequence trains a token that ends a turn; the model will not learn to stop")
    stops = stop_tokens(Path(cfg.model.path), tokenizer)
    if report.end and stops and report.end not in stops:
        lines.append(f"warning: turns end with {report.end}, but generation stops at {', '.join(sorted(stops))}")
    if "strftime_now" in (tokenizer.chat_template or ""):
        lines.append("warning: the chat template writes today's date, so the same data differs from day to day")
    return lines


def show(example, tokenizer, in_colour: bool) -> list[str]:
    """A row with its trained tokens marked."""
    left, right = ("\033[1;32m", "\033[0m") if in_colour else ("[[", "]]")
    lines = []
    paired = len(example.sequences) == 2 and not example.packed
    names = ("chosen", "rejected") if paired else ("",) * len(example.sequences)
    for name, s in zip(names, example.sequences):
        text = ""
        for on, ids in runs(s):
            piece = tokenizer.decode(ids, skip_special_tokens=False)
            text += f"{left}{piece}{right}" if on else piece
        cut = ", cut to length" if s.truncated else ""
        label = f"row {example.row} {name}".rstrip()
        lines.append(f"{label} ({len(s)} tokens, {s.trained.count(1)} trained{cut})")
        lines += ["  " + line for line in text.split("\n")]
    return lines


def runs(sequence) -> list[tuple[int, list[int]]]:
    """Neighbouring tokens with the same mask, together."""
    found = []
    for token, on in zip(sequence.ids, sequence.trained):
        if not found or found[-1][0] != on:
            found.append((on, []))
        found[-1][1].append(token)
    return found


def template(tokenizer) -> str:
    """The chat template by its hash: equal hashes render equally."""
    text = tokenizer.chat_template
    return f"template {hashlib.sha256(text.encode()).hexdigest()[:8]} (the model's own)" if text else "no chat template"


def stop_tokens(folder: Path, tokenizer) -> set[str]:
    """The tokens at which this model's generation stops: generation_config.json's, or the tokenizer's EOS."""
    stops = [tokenizer.eos_token_id]
    file = folder / "generation_config.json"
    if file.is_file():
        ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        stops = ids if isinstance(ids, list) else [ids] if ids is not None else stops
    return {tokenizer.convert_ids_to_tokens(i) for i in stops if i is not None}


def colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")

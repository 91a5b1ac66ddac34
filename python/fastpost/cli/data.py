# SPDX-License-Identifier: Apache-2.0
"""`fastpost data RECIPE`: what the model will see. Most mistakes of post-training are silent and live in the mask; here
they show.

Prints what was kept, cut and dropped and why, a table of lengths, the share of trained tokens, BOS, whether the end of
a turn is trained, and some rows with their trained tokens marked: in colour on a terminal, in [[ ]] elsewhere. With
--html FILE the same as a page, token by token."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from fastpost.cli.built_in import resolve
from fastpost.train.config import Config, help_text, load_config

ROWS = 3
USAGE = """usage: fastpost data RECIPE [--html FILE] [--rows N] [--group.key VALUE ...]   show what the model will see
       fastpost data score RECIPE OUT.jsonl [--ngram REFERENCE]              perplexity of each document
       fastpost data select SCORED.jsonl OUT.jsonl --tokens BUDGET           the documents of lowest perplexity

  --html FILE
      Write the account and the rows also as a page that needs no network: trained tokens coloured, chosen and
      rejected side by side, borders and ids of tokens under the pointer.
  --rows N [3]
      How many rows to show, from the first kept row on.
"""


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{USAGE}\n{help_text()}")
        return 0
    if argv[0] in ("score", "select"):
        return importlib.import_module(f"fastpost.cli.{argv[0]}").main(argv[1:])
    own, rest = own_options(argv[1:])
    cfg = resolve(load_config(argv[0], rest))
    from fastpost import objectives
    from fastpost.cli.account import account
    from fastpost.data.loader import load_dataset
    from fastpost.data.mixture import Mixture
    from fastpost.hf.folder import load_tokenizer
    from fastpost.train import reference

    objective = objectives.from_name(cfg.objective.name, **cfg.objective.fields)
    tokenizer = load_tokenizer(cfg.model.path)
    require = reference.columns(objective, reference.sources(cfg.model, objective))
    parts, wrote = [], ""
    for path in [cfg.data.train] + [cfg.data.eval] * (cfg.data.eval not in (None, cfg.data.train)):
        data = load_dataset(cfg.data, tokenizer, objective, path=path, require=require)
        sources = data.split()
        new = [(account(cfg, s, tokenizer), s.examples[: own["rows"] * (path == cfg.data.train)]) for s in sources]
        parts += new
        if own["html"]:  # before anything is printed: `| head` may end this process while it prints
            wrote = write_page(Path(own["html"]), argv[0], cfg, parts, tokenizer)
        for (facts, shown), source in zip(new, sources, strict=True):
            print("\n".join(describe(facts)))
            print(*[p.cache + "\n" for p in source.parts if p.cache], sep="", end="")
            for example in shown:
                print("\n".join(show(example, facts.kind, tokenizer, colour())))
        if path == cfg.data.train:
            mixture = Mixture(data, seed=cfg.train.seed, tokens=cfg.data.epoch_tokens, fixed=cfg.data.draw == "fixed")
            print(*mixture.lines(), sep="\n", end="\n" * (not mixture.whole))
        print()
    if wrote:
        print(wrote)
    return 0


def own_options(argv: list[str]) -> tuple[dict, list[str]]:
    """({"html": FILE or None, "rows": N}, what is left for the recipe). Raises ValueError for a value that is none."""
    own, rest, words = {"html": None, "rows": ROWS}, [], list(argv)
    while words:
        flag, equals, value = words.pop(0).partition("=")
        if flag not in ("--html", "--rows"):
            rest.append(flag + equals + value)
            continue
        if not equals:
            if not words:
                raise ValueError(f"command line: {flag} has no value. Write {flag} VALUE.")
            value = words.pop(0)
        if flag == "--rows" and not value.isdecimal():
            raise ValueError(f"command line: --rows: expected a whole number from 0 up, got {value!r}.")
        own[flag[2:]] = int(value) if flag == "--rows" else value
    return own, rest


def write_page(file: Path, recipe: str, cfg: Config, parts: list, tokenizer) -> str:
    """Write the page; returns the line that says so."""
    from fastpost.cli.page import page

    settings = [
        ("model", cfg.model.path),
        ("objective", cfg.objective.name),
        ("mask", cfg.data.mask),
        ("max_length", str(cfg.data.max_length)),
    ]
    text = page(recipe, settings, parts, tokenizer)
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"command line: --html {file}: {error.strerror}. Name a file in a folder that exists."
        ) from None
    return f"wrote {file} ({len(text.encode()) / 1024:.0f} kB)"


def describe(a) -> list[str]:
    """An account in lines for the terminal, warnings last."""
    dropped = a.rows - a.kept
    reasons = ", ".join(f"{reason} {n}" for reason, n, _ in a.dropped)
    lines = [
        f"{a.path}  ({a.kind})",
        f"rows {a.rows} (kept {a.kept}, dropped {dropped}{': ' + reasons if reasons else ''})",
    ]
    for reason, n, where in a.dropped:
        lines.append(f"  {reason}: {', '.join(where)}{' ...' if n > len(where) else ''}")
    columns = list(a.quantiles("sequence"))
    width = max(6, *(len(f"{a.quantiles(n)['max']}") + 2 for n in a.lengths))
    lines.append(f"{'tokens':11s}" + "".join(f"{c:>{width}s}" for c in columns))
    for name in a.lengths:
        lines.append(f"  {name:9s}" + "".join(f"{v:>{width}d}" for v in a.quantiles(name).values()))
    lines.append(
        f"tokens {a.tokens}   trained {a.trained} ({a.trained / a.tokens:.1%})   truncated {a.truncated}   "
        f"dropped {dropped}   empty replies {a.empty}   identical pairs {a.identical}"
    )
    end = f"{a.end} trained in {a.ends_trained}/{a.sequences}" if a.end else "none trained"
    lines.append(f"BOS {a.bos} a sequence   end of turn {end}   {a.template}")
    return lines + [f"note: {text}" for text in a.notes] + [f"warning: {text}" for text in a.warnings]


def show(example, kind: str, tokenizer, in_colour: bool) -> list[str]:
    """A row with its trained tokens marked, and the first and last 8 ids."""
    from fastpost.cli.account import names

    left, right = ("\033[1;32m", "\033[0m") if in_colour else ("[[", "]]")
    lines = []
    for name, s in zip(names(example, kind), example.sequences):
        text = ""
        for on, ids in runs(s):
            piece = tokenizer.decode(ids, skip_special_tokens=False)
            text += f"{left}{piece}{right}" if on else piece
        cut = ", cut to length" if s.truncated else ""
        label = f"row {example.row} {name}".rstrip()
        lines.append(f"{label} ({len(s)} tokens, {s.trained.count(1)} trained{cut})")
        lines.append(f"  ids {few(s.ids)}")
        lines += ["  " + line for line in text.split("\n")]
    return lines


def few(ids) -> str:
    """The first and the last 8."""
    ids = list(map(str, ids))
    return " ".join(ids if len(ids) <= 16 else [*ids[:8], "...", *ids[-8:]])


def runs(sequence) -> list[tuple[int, list[int]]]:
    """Neighbouring tokens with the same mask, together."""
    found = []
    for token, on in zip(sequence.ids, sequence.trained):
        if not found or found[-1][0] != on:
            found.append((on, []))
        found[-1][1].append(token)
    return found


def colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")

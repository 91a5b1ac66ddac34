# SPDX-License-Identifier: Apache-2.0
"""`fastpost data score RECIPE OUT.jsonl`: perplexity of each document of data.train."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from fastpost.cli.built_in import resolve
from fastpost.train.config import Config, load_config

USAGE = """usage: fastpost data score RECIPE OUT.jsonl [--ngram REFERENCE [--order N]] [--group.key VALUE ...]

Copies the rows of data.train (a file with a column `text`) to OUT.jsonl with their `perplexity` and their number of
`tokens`. An interrupted call is continued by the same command.

  --ngram REFERENCE   perplexity under an n-gram model (interpolated Kneser-Ney over the tokenizer's tokens) of this
                      file: .txt with a document a line, or .jsonl, .json, .parquet with `text`. Without it: under the
                      recipe's model.path, in windows of data.max_length.
  --order N           the n of n-gram [5]

Then: fastpost data select OUT.jsonl SUBSET.jsonl --tokens BUDGET"""


def main(argv: list[str]) -> int:
    if len(argv) < 2 or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv[:1] in (["-h"], ["--help"]) else 2
    recipe, out, rest = argv[0], argv[1], argv[2:]
    reference, rest = take(rest, "--ngram")
    order, rest = take(rest, "--order")
    if order is not None and not (order.isdigit() and int(order) > 0):
        raise ValueError(f"data score: --order: expected a whole number of at least 1, got {order!r}.")
    cfg = resolve(load_config(recipe, rest))
    if not isinstance(cfg.data.train, str):
        raise ValueError("data score: data.train is a list of sources. Score one file at a time: --data.train FILE.")

    from fastpost.data.cache import tokenizer_hash
    from fastpost.data.columns import read_rows
    from fastpost.data.score import NGramScorer, score
    from fastpost.hf.folder import load_tokenizer
    from fastpost.user_cache import file_hash

    tokenizer = load_tokenizer(cfg.model.path)
    rows = read_rows(cfg.data.train, cfg.data.limit, cfg.data.columns)
    data = Path(cfg.data.train).expanduser()
    parts = [file_hash(data) if data.is_file() else None, cfg.data.columns, cfg.data.limit, tokenizer_hash(tokenizer)]
    if reference is not None:
        order = int(order or 5)
        scorer = NGramScorer(tokenizer, reference, order)
        parts += [file_hash(Path(reference).expanduser()), order]
    elif order is not None:
        raise ValueError("data score: --order belongs to --ngram REFERENCE, which is not given.")
    else:
        from fastpost.train.perplexity import ModelScorer

        scorer = ModelScorer(cfg, tokenizer)
        parts += [weights(cfg), cfg.data.max_length, cfg.optim.precision]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    count, found = score(rows, scorer, out, key)
    print(f"{out}: {count} documents" + (f", {found} of them from an earlier attempt" if found else ""))
    return 0


def weights(cfg: Config) -> list:
    """What tells one model from another without reading all of it: names, sizes and times of its weight files."""
    from fastpost.hf.folder import weight_files

    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in weight_files(Path(cfg.model.path).expanduser())]


def take(argv: list[str], flag: str) -> tuple[str | None, list[str]]:
    """The value of `--flag VALUE` or `--flag=VALUE` and what is left; None when it is not there."""
    for i, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name == flag:
            if not equals and i + 1 == len(argv):
                raise ValueError(f"command line: {flag} has no value. Write {flag} VALUE.")
            return (value, argv[:i] + argv[i + 1 :]) if equals else (argv[i + 1], argv[:i] + argv[i + 2 :])
    return None, argv

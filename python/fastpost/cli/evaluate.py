# SPDX-License-Identifier: Apache-2.0
"""`fastpost eval RECIPE [--group.key VALUE ...]`: held-out loss, margin and accuracy of a model, without training
it. `fastpost eval MODEL ... --perplexity TEXT` is in perplexity.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

USAGE = """usage: fastpost eval RECIPE [--model MODEL] [--json] [--group.key VALUE ...]
       fastpost eval MODEL [MODEL ...] --perplexity TEXT [--window N] [--stride N] [--json]

Loss, margin and accuracy on data.eval (data.train when there is none) with the recipe's objective, of model.path or of
MODEL, a Hugging Face, adapter or run folder; an objective with a reference measures MODEL against the recipe's.

With --perplexity: of a text under each MODEL; `fastpost eval --perplexity --help` says more."""


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if any(word.partition("=")[0] == "--perplexity" for word in argv):
        from fastpost.cli import perplexity

        return perplexity.main(argv)
    argv, model, as_json = list(argv), None, "--json" in argv
    if as_json:
        argv.remove("--json")
    if "--model" in argv:
        at = argv.index("--model")
        if at + 1 == len(argv):
            raise ValueError("eval: --model: expected a folder, got nothing. Write --model FOLDER.")
        model = argv[at + 1]
        del argv[at : at + 2]

    from fastpost.cli.built_in import resolve
    from fastpost.train.config import load_config
    from fastpost.train.evaluate import evaluate_config

    result = evaluate_config(resolve(load_config(argv[0], argv[1:])), Path(model) if model else None)
    if as_json:
        print(json.dumps(result))
        return 0
    for name, value in result.items():
        sys.stdout.write(f"{name:22s} {value:g}\n")
    return 0

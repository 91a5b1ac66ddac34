# SPDX-License-Identifier: Apache-2.0
"""`fastpost data select SCORED.jsonl OUT.jsonl --tokens BUDGET`: the documents of lowest perplexity that fill a
budget."""

from __future__ import annotations

from fastpost.cli.score import take
from fastpost.train.strict import suggest

USAGE = """usage: fastpost data select SCORED.jsonl OUT.jsonl --tokens BUDGET [--by COLUMN] [--sort true]

Writes the rows of SCORED.jsonl (from `fastpost data score`) with the lowest perplexity until BUDGET tokens are there.

  --tokens BUDGET   how many, e.g. 5e9
  --by COLUMN       another column of numbers to select by [perplexity]
  --sort true       write them from the lowest on, for a curriculum (data.shuffle false); else in file order"""


def main(argv: list[str]) -> int:
    if len(argv) < 2 or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv[:1] in (["-h"], ["--help"]) else 2
    path, out, rest = argv[0], argv[1], argv[2:]
    budget, rest = take(rest, "--tokens")
    by, rest = take(rest, "--by")
    sort, rest = take(rest, "--sort")
    if rest:
        raise ValueError(
            f"data select: unknown option {rest[0]}.{suggest(rest[0].lstrip('-'), ['tokens', 'by', 'sort'])}"
        )
    if sort not in (None, "true", "false"):
        raise ValueError(f"data select: --sort: expected true or false, got {sort!r}.")
    try:
        tokens = int(float(budget or ""))
    except (ValueError, OverflowError):
        raise ValueError(f"data select: --tokens: expected a number of tokens, got {budget!r}.") from None

    from fastpost.data.select import select

    found = select(path, out, tokens, by=by or "perplexity", sort=sort == "true")
    print(
        f"{out}: {found.rows} of {found.read} documents, {found.tokens} tokens, "
        f"{by or 'perplexity'} up to {found.worst:.6g}"
    )
    if found.unscored:
        print(f"note: {found.unscored} documents have no score and were left out")
    if not found.full:
        print(f"note: all that is there: {found.tokens} tokens are fewer than the {tokens} asked for")
    return 0

# SPDX-License-Identifier: Apache-2.0
"""The `fastpost` command: a table of verbs. A verb's module is imported when it is called, so `fastpost --help` needs
no torch.

Each module has `main(argv) -> int` (the exit status). ValueError and OSError are the user's to mend and are printed
without a traceback; set FASTPOST_TRACEBACK=1 to see where it came from."""

from __future__ import annotations

import difflib
import importlib
import os
import sys

VERBS = {
    "train": ("fastpost.cli.train", "RECIPE [--group.key VALUE ...]", "train a model as a recipe says"),
    "data": (
        "fastpost.cli.data",
        "RECIPE [--html FILE] [--group.key VALUE ...]",
        "show what the model will see: tokens, mask, lengths, drops",
    ),
    "eval": (
        "fastpost.cli.evaluate",
        "RECIPE | MODEL ... --perplexity TEXT",
        "held-out loss, margin and accuracy; perplexity of a text",
    ),
    "generate": (
        "fastpost.cli.generate",
        "MODEL [PROMPT ...] [--file IN --out OUT]",
        "answer prompts or rows, by a model or a server",
    ),
    "plot": ("fastpost.cli.plot", "RUN [RUN ...]", "draw the curves of one run or several"),
    "export": ("fastpost.cli.export", "RUN OUT", "write a run's model or adapter; --merge for both in one"),
    "recipes": (
        "fastpost.cli.recipes",
        "ls | cp NAME [--gpu]",
        "list the recipes that come with fastpost, or copy one",
    ),
    "env": ("fastpost.cli.env", "[--json]", "versions, what was built, what was found"),
    "quantize": (
        "fastpost.cli.quantize",
        "MODEL --method NAME --out DIR",
        "a model in fewer bits: rtn, gptq, awq, nf4, and more",
    ),
}
"""verb -> (module, arguments, one line of help)"""


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        import fastpost

        print(fastpost.__version__)
        return 0
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"Did you mean '{near[0]}'?" if near else f"Known: {', '.join(VERBS)}."
        return fail(f"there is no verb '{verb}'. {hint}", 2)
    module = VERBS[verb][0]
    try:
        return importlib.import_module(module).main(rest) or 0
    except ModuleNotFoundError as error:
        if error.name == module:
            return fail(f"{verb} is not in this version yet. `fastpost --help` lists the verbs that are.", 2)
        if error.name in EXTRA:
            return fail(f"{verb} needs {error.name}. Install it with: pip install 'fastpost[train]'", 2)
        raise
    except BrokenPipeError:  # `fastpost data recipe.yaml | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:  # a mistake in input, or a file that cannot be read or written
        if os.environ.get("FASTPOST_TRACEBACK"):
            raise
        return fail(str(error), 1)
    except KeyboardInterrupt:
        return 130


EXTRA = ("transformers", "yaml", "safetensors", "matplotlib", "peft", "numpy")
"""What `fastpost[train]` brings; `import fastpost` itself needs torch alone."""


def fail(message: str, status: int) -> int:
    """Print `message` as the command's last word; returns `status`."""
    print(f"fastpost: {message}", file=sys.stderr)
    return status


def usage() -> str:
    width = max(len(f"{verb} {arguments}") for verb, (_, arguments, _) in VERBS.items())
    lines = [f"  {f'{verb} {arguments}':<{width}}  {line}" for verb, (_, arguments, line) in VERBS.items()]
    return "\n".join(
        ["usage: fastpost VERB ...", "", *lines, "",
         "fastpost VERB --help says more. On several GPUs: torchrun --nproc-per-node N -m fastpost train RECIPE"]
    )  # fmt: skip

# SPDX-License-Identifier: Apache-2.0
"""`fastpost generate MODEL [PROMPT ...]`: answer prompts, greedy or sampled, by a model here or a server elsewhere."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ABOUT = """
Answer prompts, greedy unless --temperature is given. Rows of --file have a 'prompt', a string or a list of messages;
their columns temperature, top_p, top_k, min_p, repetition_penalty, max_new_tokens, samples, seed, stop and system
override the options of these names, tools and chat_template_kwargs go to the chat template.

--out FILE gets each row of the input with all its columns, the number of its line, its answers and how each ended. A
row is written when it is finished; at the end they are put in the order of the input. The same command goes on where
an earlier one was stopped or killed: what is there is neither lost nor done again, and with other settings, which are
kept in FILE.settings.json, it is refused. SIGTERM or Ctrl-C: the status is 143 or 130.
"""


def main(argv: list[str]) -> int:
    args = parse(argv)
    say = _say
    added = ("line", "answers", "finish", *_of_tokens(args))
    source = _source(args, added if args.out else ())
    total = sum(1 for _ in source())  # every row is read before anything is loaded, so that a broken one is met now
    if not total:
        raise ValueError(
            "generate: expected a prompt, got no prompt. Give one as an argument, with --file rows.jsonl, or on stdin."
        )
    if args.out:
        return to_file(args, source, total, added, say)
    return to_terminal(args, source, total, say)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fastpost generate",
        usage="fastpost generate MODEL [PROMPT ...] [--file IN.jsonl --out OUT.jsonl] [options]\n"
        "       fastpost generate --endpoint URL [PROMPT ...] [options]",
        description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("words", nargs="*", metavar="MODEL PROMPT", help="Hugging Face, adapter or run folder (not with --endpoint), "
        "then user messages; without any, lines of standard input")  # fmt: skip
    add("--prompt", action="append", default=[], metavar="TEXT", help="a user message; may be repeated")
    add("--file", type=Path, metavar="JSONL", help="rows whose 'prompt' is a string or a list of messages")
    add("--limit", type=int, metavar="N", help="take only the first N prompts")
    add("--plain", action="store_true", help="strings are text to go on with, not user messages")
    add("--system", metavar="TEXT", help="system message of conversations that have none")

    group = parser.add_argument_group("the answers")
    add = group.add_argument
    add("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (256)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 = greedy (default)")
    add("--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest tokens of total mass P")
    add("--top-k", type=int, default=0, metavar="K", help="sample from the K likeliest tokens")
    add("--min-p", type=float, default=0.0, metavar="P", help="sample from tokens at least P times as likely as the "
        "likeliest")  # fmt: skip
    add("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1: repeat less (1; what "
        "generation_config.json says of sampling is not used)")  # fmt: skip
    add("--samples", type=int, default=1, metavar="N", help="answers per prompt, when sampling")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends an answer; may be repeated")
    add("--seed", type=int, default=0, metavar="N", help="an answer's draws depend on the seed and its prompt's number "
        "only (0)")  # fmt: skip

    group = parser.add_argument_group("what is written")
    add = group.add_argument
    add("--json", action="store_true", help="one JSON object per prompt: prompt, answers")
    add("--stream", action="store_true", help="show the answer to a single prompt while it grows")
    add("--logprobs", action="store_true", help="with --out or --json: the log-prob of each token, at the temperature")
    add("--out", type=Path, metavar="JSONL", help="write rows there")
    again = group.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with the rows that --out has (default)")
    again.add_argument("--overwrite", action="store_true", help="start --out afresh")

    group = parser.add_argument_group("the model")
    add = group.add_argument
    add("--batch", "--concurrency", type=int, metavar="N", help="answers (32) or, of a server, requests (16) under way "
        "at once; answers differ by rounding alone")  # fmt: skip
    add("--dtype", choices=("bf16", "fp32"), default="bf16", help="precision of the model (bf16)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--kv", choices=("dense", "shadow"), default="dense", help="shadow: low-rank keys and a budget of positions, "
        "for long prompts, one after the other")  # fmt: skip
    add("--shadow-rank", type=int, metavar="R", help="rank of the keys (160 in 1024 of their width)")
    add("--shadow-budget", type=int, metavar="N", help="positions that a token attends to (2048)")

    group = parser.add_argument_group("a server in its place", "OPENAI_API_KEY of the environment is its key")
    add = group.add_argument
    add("--endpoint", metavar="URL", help="OpenAI-compatible: http://host:8000/v1 of vLLM, SGLang, ...")
    add("--endpoint-model", metavar="NAME", help="its name there (the only one that is)")
    add("--timeout", type=float, default=600.0, metavar="S", help="seconds without a byte of an answer (600)")
    add("--patience", type=float, default=300.0, metavar="S", help="seconds in which a dead server may come back (300)")
    args = parser.parse_intermixed_args(argv)
    check(args)
    return args


def check(args) -> None:
    """Raises ValueError for options that do not go together or are out of range. Sets args.model and args.prompts."""
    from fastpost.cli.generators import sampling

    words = list(args.words)
    if not args.endpoint and not words:
        raise ValueError(
            "generate: MODEL: expected a folder, got nothing. Write fastpost generate MODEL, or --endpoint."
        )
    args.model = None if args.endpoint else words.pop(0)
    args.prompts = words + args.prompt
    if args.model and args.model.startswith("built-in/"):
        from fastpost.cli.built_in import model

        args.model = str(model(args.model, "MODEL"))
    sampling(args)
    for option, least in (("limit", 0), ("batch", 1), ("shadow_rank", 1), ("shadow_budget", 1)):
        value = getattr(args, option)
        if value is not None and value < least:
            raise ValueError(f"generate: --{option.replace('_', '-')}: expected {least} or more, got {value}.")
    for both, why in (
        (args.plain and args.system is not None, "--plain and --system: plain text has no system message"),
        (args.endpoint and args.kv != "dense", "--endpoint and --kv: the server has its own cache"),
        (
            args.kv != "shadow" and (args.shadow_rank is not None or args.shadow_budget is not None),
            "--shadow-rank or --shadow-budget without --kv shadow",
        ),
        (args.endpoint_model and not args.endpoint, "--endpoint-model without --endpoint"),
        (args.logprobs and not (args.out or args.json), "--logprobs without --out or --json"),
        ((args.overwrite or args.resume) and not args.out, "--resume or --overwrite without --out"),
        (args.out and args.json, "--out and --json: --out is JSON already"),
        (args.stream and (args.out or args.json), "--stream with --out or --json"),
        (args.stream and args.samples > 1, "--stream and --samples: one answer can be shown while it grows"),
        (args.out and args.file and args.prompts, "--out with --file and prompts: rows are known by their line"),
    ):
        if both:
            raise ValueError(f"generate: {why}. Leave one of them out.")
    if args.out and args.file and args.out.exists() and args.file.exists() and args.out.samefile(args.file):
        raise ValueError(f"generate: --out: expected another file than --file, got the same, {args.out}. Name another.")


def _source(args, added: tuple[str, ...]) -> Callable[[], Iterator]:
    """A function that gives the rows anew each time."""
    from fastpost.generate import rows

    prompts = args.prompts
    if not prompts and not args.file:
        prompts = [line.rstrip("\n") for line in sys.stdin if line.strip()]
    first = [rows.Row(i, i + 1, f"prompt {i + 1}", {"prompt": p}, p) for i, p in enumerate(prompts)][: args.limit]

    def source() -> Iterator[rows.Row]:
        yield from first
        if args.file:
            left = None if args.limit is None else args.limit - len(first)
            yield from rows.read(args.file, left, added, begin=len(first))

    return source


def to_file(args, source: Callable, total: int, added: tuple[str, ...], say: Callable) -> int:
    from fastpost.cli import generators
    from fastpost.generate import rows
    from fastpost.train.progress import waiting

    failures = Failures(say)
    endpoint = generators.open_endpoint(args, failures, say) if args.endpoint else None
    settings = generators.settings(args, endpoint and endpoint.model)
    with rows.Output(args.out, settings, added=added, overwrite=args.overwrite, say=say) as out:
        whole = args.limit is None
        left = sum(1 for _ in out.missing(source(), whole=whole))
        there, begin, new = len(out.done), time.monotonic(), 0
        if left and there:
            say(f"{args.out}: {total - left} of {total} rows are there already")
        try:
            if left:
                with Stop() as stop, _generator(args, endpoint, failures, say) as (generator, request):
                    begin = time.monotonic()  # without loading

                    def rate(seconds: float) -> str:
                        return f"{generator.stats()['new_tokens'] / seconds:.0f} tokens/s"

                    def done() -> int:
                        return len(out.done) - there

                    with waiting("generate", done, left, "rows", rate):
                        for row, found in rows.answer(generator.run, out.missing(source(), whole=whole), request):
                            failures.answered = True
                            with stop.held():
                                out.write(row, columns(found, added))
                    new = generator.stats()["new_tokens"]
        except Stopped as stopped:
            name = signal.Signals(stopped.number).name
            say(f"{name}: stopped. {_go_on(args, out, total)}")
            return 128 + stopped.number
        except (OSError, ValueError, RuntimeError) as error:
            memory = type(error).__name__ == "OutOfMemoryError"
            if isinstance(error, RuntimeError) and not memory:
                raise
            hint = " Lower --batch." if memory else ""
            raise ValueError(f"{error}{hint}\n{_go_on(args, out, total)}") from error
        out.finish()
        seconds = max(time.monotonic() - begin, 1e-9)
        already = f", {total - left} of them from an earlier attempt" if left < total else ""
        rate = f"; {new} tokens, {new / seconds:.0f} tokens/s" if new else ""
        print(f"{args.out}: {total - left + len(out.done) - there} rows{already}{rate}")
    if failures.count:
        say(f"rows that failed: {failures.count}, see above. They are not in {args.out}. {_same(args)} tries again.")
    return 1 if failures.count else 0


def _go_on(args, out, total: int) -> str:
    return f"{args.out}: {len(out.done)} of {total} rows are there, whole. {_same(args)} goes on from them."


def _same(args) -> str:
    return "The same command" + (" without --overwrite" if args.overwrite else "")


def to_terminal(args, source: Callable, total: int, say: Callable) -> int:
    """Answers in the order of the prompts, or one while it grows."""
    from fastpost.cli import generators
    from fastpost.generate import rows

    if args.stream and total > 1:
        raise ValueError(f"generate: --stream: expected one prompt, got {total}. Leave it out, or take --limit 1.")
    failures = Failures(say)
    endpoint = generators.open_endpoint(args, failures, say) if args.endpoint else None
    with _generator(args, endpoint, failures, say) as (generator, request):
        if args.stream:
            from dataclasses import replace

            made = request(next(source()))
            for _ in generator.run([replace(made, stream=_show)] if made else []):
                print(flush=True)
            return 1 if failures.count else 0
        finished: dict[int, tuple] = {}
        shown = 0
        for row, found in rows.answer(generator.run, source(), request):
            failures.answered = True
            finished[row.index] = (row, found)
            while shown in finished or shown in failures.indices:
                if shown in finished:
                    _print(args, *finished.pop(shown))
                shown += 1
        for index in sorted(finished):
            _print(args, *finished[index])
    return 1 if failures.count else 0


def _show(piece) -> None:
    sys.stdout.write(piece.text)
    sys.stdout.flush()


def _print(args, row, found) -> None:
    if args.json:
        answers = columns(found, ("answers", *_of_tokens(args)))
        print(json.dumps({"prompt": row.prompt, **answers}, ensure_ascii=False), flush=True)
    else:
        prompt = row.prompt if isinstance(row.prompt, str) else row.prompt[-1].get("content")
        print(f"> {prompt}", *(c.text.strip() for c in found), sep="\n", end="\n\n", flush=True)


def _of_tokens(args) -> tuple[str, ...]:
    """Columns that --logprobs adds; a server does not tell the tokens' ids."""
    if not args.logprobs:
        return ()
    return ("logprobs",) if args.endpoint else ("tokens", "logprobs")


def columns(found, added: tuple[str, ...]) -> dict:
    """The columns `added`, one entry an answer."""
    values = {"answers": "text", "finish": "finish_reason", "tokens": "token_ids", "logprobs": "logprobs"}
    return {name: [getattr(c, values[name]) for c in found] for name in added if name in values}


@contextmanager
def _generator(args, endpoint, failures: Failures, say: Callable):
    from fastpost.cli import generators

    if endpoint is not None:
        with endpoint:
            yield endpoint, generators.endpoint_request(args)
    else:
        with generators.open_model(args, failures, say) as pair:
            yield pair


class Failures:
    """Rows that cannot be answered: each is said with its place. Raises ValueError when there is nothing else."""

    def __init__(self, say: Callable):
        self.say, self.count, self.answered, self.indices = say, 0, False, set()

    def __call__(self, row, message: str) -> None:
        from fastpost.cli.generators import HOPELESS

        self.count += 1
        self.indices.add(row.index)
        self.say(message if message.startswith(row.where) else f"{row.where}: {message}")
        if self.count >= HOPELESS and not self.answered:
            raise ValueError(f"generate: the first {self.count} rows failed, as said above: not going on.")


class Stopped(BaseException):
    def __init__(self, number: int):
        super().__init__()
        self.number = number


class Stop:
    """Inside, SIGTERM and SIGINT raise Stopped wherever the main thread is, but not while it writes a row."""

    def __init__(self):
        self._held, self._asked, self._before = False, 0, {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        self._held = True
        yield
        self._held = False
        if self._asked:  # then, or at any time before, when something swallowed it
            raise Stopped(self._asked)

    def _handle(self, number: int, frame) -> None:
        again, self._asked = self._asked, number
        if not self._held or again:
            raise Stopped(number)


def _say(text: str) -> None:
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""  # a progress line may stand there
    print(f"{clear}{text}", file=sys.stderr, flush=True)

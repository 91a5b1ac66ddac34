# SPDX-License-Identifier: Apache-2.0
"""What an OpenAI-compatible server sends, read with suspicion: whole JSON, the number of choices that was asked for,
each of them finished, log-probs where they were wanted."""

from __future__ import annotations

import json
import math

from fastpost.generate.request import Completion, Piece, Request

UNFINISHED = (None, "abort", "error", "cancelled")
"""finish_reason of an answer that the server gave up, as it does when it shuts down."""


class Broken(Exception):
    """What came is not an answer. whole: it is well-formed, so it was meant like that."""

    def __init__(self, message: str, *, whole: bool):
        super().__init__(message)
        self.whole = whole


def completions(data: bytes, request: Request, name) -> tuple[list[Completion], dict]:
    """(the n completions, usage) of the body of an answer. Raises Broken."""
    tree = _json(data)
    choices = tree.get("choices") if isinstance(tree, dict) else None
    if not isinstance(choices, list):
        raise Broken(f"an answer without 'choices' came: {data[:200].decode('utf-8', 'replace')}", whole=True)
    if len(choices) != request.sampling.n:
        raise Broken(f"{request.sampling.n} answers were asked for (n), {len(choices)} came", whole=True)
    usage = _usage(tree)
    found = {}
    for place, choice in enumerate(choices):
        if not isinstance(choice, dict) or not isinstance(index := choice.get("index", place), int):
            raise Broken(f"choices[{place}] is not an object with an index", whole=True)
        text, logprobs, top = _content(choice, place, request)
        reason = choice.get("finish_reason")
        if reason in UNFINISHED:
            raise Broken(f"the server gave the answer up (finish_reason {json.dumps(reason)})", whole=False)
        found[index] = Completion(
            name,
            index,
            usage["prompt_tokens"],
            choice.get("token_ids") or [],
            text,
            reason,
            _stop(choice),
            logprobs,
            top,
        )
    if sorted(found) != list(range(request.sampling.n)):
        raise Broken(f"choices are numbered {', '.join(map(str, found))}", whole=True)
    return [found[i] for i in sorted(found)], usage


def stream(response, request: Request, name, seen: list[bool]) -> tuple[list[Completion], dict]:
    """The same from server-sent events, each handed to request.stream as it comes. seen[0] becomes True when the first
    was."""
    n = request.sampling.n
    texts, reasons, stops = [""] * n, [None] * n, [None] * n
    logprobs, tops = [[] for _ in range(n)], [[] for _ in range(n)]
    usage, wanted = {"prompt_tokens": 0, "new_tokens": 0}, request.sampling.logprobs
    while line := response.readline():
        if not line.startswith(b"data:"):
            continue
        if (data := line[5:].strip()) == b"[DONE]":
            break
        tree = _json(data)
        if not isinstance(tree, dict) or "error" in tree:
            raise Broken(f"the server broke off: {data[:200].decode('utf-8', 'replace')}", whole=False)
        if tree.get("usage"):
            usage = _usage(tree)
        for choice in tree.get("choices") or []:
            if not isinstance(choice, dict) or not isinstance(index := choice.get("index", 0), int):
                raise Broken("a choice is not an object with an index", whole=True)
            if not 0 <= index < n:
                raise Broken(f"{n} answers were asked for, one is numbered {index}", whole=True)
            text = (choice.get("delta") or {}).get("content") if "delta" in choice else choice.get("text")
            if wanted is not None:
                values, top = _logprobs(choice.get("logprobs"), index)
                logprobs[index] += values
                tops[index] += top
            texts[index] += text or ""
            reasons[index] = choice.get("finish_reason") or reasons[index]
            stops[index] = _stop(choice) or stops[index]
            if text or choice.get("finish_reason"):
                seen[0] = True
                request.stream(Piece(name, index, (), text or "", choice.get("finish_reason")))
    response.read()
    if any(reason in UNFINISHED for reason in reasons):
        raise Broken("the answer was cut off in the middle", whole=False)
    found = []
    for i in range(n):
        if wanted is not None:
            _expect_logprobs(texts[i], logprobs[i], i)
        of_tokens = logprobs[i] if wanted is not None else None, tops[i] if wanted else None
        found.append(Completion(name, i, usage["prompt_tokens"], [], texts[i], reasons[i], stops[i], *of_tokens))
    return found, usage


def _content(choice: dict, place: int, request: Request) -> tuple[str, list[float] | None, list | None]:
    """(text, log-probs, those of the alternatives) of a choice of either form."""
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    if text is None and isinstance(message, dict) and choice.get("finish_reason") not in UNFINISHED:
        text = ""  # it only thought, or called a tool
    if not isinstance(text, str):
        raise Broken(f"choices[{place}] has no text", whole=True)
    if request.sampling.logprobs is None:
        return text, None, None
    values, top = _logprobs(choice.get("logprobs"), place)
    _expect_logprobs(text, values, place)
    return text, values, top if request.sampling.logprobs else None


def _expect_logprobs(text: str, values: list[float], place: int) -> None:
    if text and not values:
        raise Broken(f"choices[{place}] has no log-probs, which were asked for", whole=True)


def _logprobs(tree, place: int) -> tuple[list[float], list]:
    try:
        if tree is None:
            return [], []
        if "content" in tree:  # chat
            entries = tree["content"] or []
            values = [entry["logprob"] for entry in entries]
            top = [[(t["token"], t["logprob"]) for t in entry.get("top_logprobs") or []] for entry in entries]
        else:
            values = tree["token_logprobs"] or []
            top = [list((entry or {}).items()) for entry in tree.get("top_logprobs") or []]
        values = [float(value) for value in values]
        if not all(map(math.isfinite, values)):
            raise ValueError
        return values, top
    except (KeyError, TypeError, ValueError, AttributeError):
        raise Broken(f"choices[{place}] has log-probs that are not numbers", whole=True) from None


def _stop(choice: dict) -> str | None:
    """The stop string that ended an answer, which vLLM and SGLang tell."""
    for name in ("stop_reason", "matched_stop"):
        if isinstance(choice.get(name), str):
            return choice[name]
    return None


def _usage(tree: dict) -> dict:
    usage = tree.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    pairs = (("prompt_tokens", "prompt_tokens"), ("new_tokens", "completion_tokens"))
    return {ours: v if isinstance(v := usage.get(theirs), int) else 0 for ours, theirs in pairs}


def _json(data: bytes):
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        end = data[-60:].decode("utf-8", "replace")
        raise Broken(f"broken JSON came ({len(data)} bytes, the last: {end!r})", whole=False) from None

# SPDX-License-Identifier: Apache-2.0
"""Text of a row, cut where training begins and ends.

A conversation is rendered by the model's own template and by nothing else. What the model will write is found by
rendering twice: what it is served before a turn (with the generation prompt), and the conversation with that turn; the
difference is the reply. This needs no {% generation %} marks in the template, and training sees to the byte what
serving will send."""

from __future__ import annotations

from dataclasses import dataclass

from jinja2 import TemplateError

from fastpost.data.columns import Row, is_chat, need, template_arguments, turn

STAND_IN = "\ufdd0\ufdd1"
"""A reply that no text holds (Unicode keeps these characters for private use): it shows what a template writes before
one."""


@dataclass(frozen=True)
class Part:
    """A stretch of text; `reply` = the model is to learn to write it, `open` = the same reply goes on in the next."""

    text: str
    reply: bool
    open: bool = False


class NothingToTrain(ValueError):
    """A row that is well formed but has no reply to learn: it is dropped and counted under this message."""


class Chat:
    """A tokenizer's chat template. render(messages) -> parts; ValueError for a template that cannot mark where a reply
    begins."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self._has_generation_prompt = False  # set when one was seen

    def text(self, messages: list[dict], generate: bool = False, arguments: dict | None = None) -> str:
        """The template's own rendering; `generate` adds the generation prompt, `arguments` (tools, ...) go to the
        template."""
        if not self.tokenizer.chat_template:
            raise ValueError(
                "this tokenizer has no chat template. Give plain strings (data.format: plain) or a chat model."
            )
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generate, **(arguments or {})
            )
        except (TemplateError, TypeError, AttributeError) as error:  # the latter: a template adds null to a string
            raise ValueError(f"the chat template refuses this conversation: {error}") from None

    def render(
        self,
        messages: list[dict],
        first: int = 0,
        mask: str = "reply",
        turn: int | None = None,
        arguments: dict | None = None,
    ) -> list[Part]:
        """Parts of a conversation: assistant turns from message `first` on are replies. mask "last": only the last of
        them; "turn": only assistant turn number `turn`, counted from 0 at the first message (None = the last).

        What follows the last reply is kept only for mask "full": nothing trained can see it.
        """
        parts, done = [], ""
        for k in _trained_turns(messages, first, mask, turn):
            if k == 0:
                raise NothingToTrain("begins with the assistant")
            before = self.text(messages[:k], generate=True, arguments=arguments)
            after = self.text(messages[: k + 1], arguments=arguments)
            if not after.startswith(before):
                raise ValueError(
                    _differs(before, after, "what is served before the reply", "the conversation with the reply")
                )
            if not before.startswith(done):
                raise ValueError(_differs(done, before, "an earlier turn", "its place in the longer conversation"))
            reply = after[len(before) :]
            self._check_generation_prompt(messages[:k], before, arguments)
            parts += [Part(before[len(done) :], False), Part(reply, True)]
            done = after
        whole = self.text(messages, arguments=arguments) if mask == "full" else done
        return parts + ([Part(whole[len(done) :], False)] if len(whole) > len(done) else [])

    def _check_generation_prompt(self, prompt: list[dict], before: str, arguments: dict | None) -> None:
        """Without a generation prompt a turn's header would count as reply. Templates that have no header ([/INST]) are
        fine. The header is read off a reply that cannot be mistaken for it: a real one may well be '<'."""
        if self._has_generation_prompt or before != self.text(prompt, arguments=arguments):
            self._has_generation_prompt = True
            return
        shown = self.text([*prompt, {"role": "assistant", "content": STAND_IN}], arguments=arguments)
        header = shown[len(before) : shown.find(STAND_IN, len(before))] if shown.startswith(before) else ""
        if header.strip():
            raise ValueError(
                f"the chat template has no generation prompt: it writes {header!r} before a reply but ignores "
                "add_generation_prompt, so the header would be trained as part of the reply. Add "
                "{% if add_generation_prompt %}...{% endif %} to the template, or give plain strings."
            )


def _trained_turns(messages: list[dict], first: int, mask: str, turn: int | None) -> list[int]:
    """Positions of the messages to train. Raises NothingToTrain when there are none."""
    every = [k for k, m in enumerate(messages) if m["role"] == "assistant"]
    turns = [k for k in every if k >= first]
    if not turns:
        raise NothingToTrain("no assistant turn")
    if mask == "turn" and turn is not None:
        begin = len(every) - len(turns)
        if not begin <= turn < len(every):
            where = "the replies are" if begin else "the row has"
            raise ValueError(
                f"column 'turn': expected {begin} to {len(every) - 1} ({where} assistant turns {begin} to "
                f"{len(every) - 1}), got {turn}."
            )
        return [every[turn]]
    return turns[-1:] if mask in ("last", "turn") else turns


def parts_of(row: Row, kind: str, chat: Chat, as_chat: bool, mask: str) -> list[list[Part]]:
    """A row's sequences as parts: one, or [chosen, rejected]. Raises ValueError naming file, line and column, and
    NothingToTrain for a row to leave out."""
    try:
        if kind == "preference":
            return _pair(row, chat, as_chat, mask)
        if kind == "messages":
            if not is_chat(row, "messages"):
                raise ValueError("column 'messages': expected a list of messages, got a string.")
            return [chat.render(row.values["messages"], 0, mask, turn(row), template_arguments(row))]
        if kind == "text":
            if is_chat(row, "text"):
                raise ValueError(
                    "column 'text': expected a string, got a list of messages. Name the column 'messages'."
                )
            return [[Part(row.values["text"], True)]]
        if kind == "two_part":
            return [_two_parts(row, chat, as_chat, mask)]
        return [_answer(row, "completion", chat, as_chat, mask)]
    except NothingToTrain:
        raise
    except ValueError as error:
        raise error if str(error).startswith(row.where) else ValueError(f"{row.where}: {error}") from None


def _pair(row: Row, chat: Chat, as_chat: bool, mask: str) -> list[list[Part]]:
    chosen, rejected = is_chat(row, "chosen"), is_chat(row, "rejected")
    if chosen != rejected:
        names = {True: "a list of messages", False: "a string"}
        raise ValueError(
            f"column 'chosen' is {names[chosen]} but 'rejected' is {names[rejected]}. Use the same format in both."
        )
    # Many sets keep the whole conversation in chosen and rejected, and a copy of the question in prompt.
    implicit = row.values.get("prompt") is None or (chosen and row.values["chosen"][0]["role"] != "assistant")
    if implicit:
        if as_chat and not chosen:
            raise ValueError("data.format chat needs a column 'prompt' to be the user's message.")
        prompt = _shared(row.values["chosen"], row.values["rejected"], chosen)
        if chosen and not prompt:
            raise ValueError(
                "no column 'prompt', and chosen and rejected share no first message to be the prompt. Add the column, "
                "or begin both with the user's message."
            )
        cut = len(prompt)
        values = {
            **row.values,
            "prompt": prompt,
            "chosen": row.values["chosen"][cut:],
            "rejected": row.values["rejected"][cut:],
        }
        if not values["chosen"] or not values["rejected"]:
            raise NothingToTrain("chosen or rejected is the beginning of the other")
        row = Row(row.index, row.where, values)
    return [_answer(row, column, chat, as_chat, mask) for column in ("chosen", "rejected")]


def _answer(row: Row, column: str, chat: Chat, as_chat: bool, mask: str) -> list[Part]:
    need(row, ("prompt", column))
    chatty = is_chat(row, "prompt")
    prompt, answer = row.values["prompt"], row.values[column]
    if chatty != is_chat(row, column):
        names = {True: "a list of messages", False: "a string"}
        raise ValueError(
            f"column 'prompt' is {names[chatty]} but '{column}' is {names[not chatty]}. Use the same format in both."
        )
    if not chatty and not as_chat:
        return [Part(prompt, False), Part(answer, True)]
    if not chatty:
        prompt, answer = [{"role": "user", "content": prompt}], [_reply(answer)]
    if answer[0]["role"] != "assistant":
        raise ValueError(
            f"column '{column}' begins with role '{answer[0]['role']}'; expected the assistant's reply to the prompt. "
            "Move what comes before it into 'prompt'."
        )
    which = turn(row)
    if which is None and column != "completion":  # a pair's dialogues part at the turn that was sampled twice
        which = sum(m["role"] == "assistant" for m in prompt)
    return chat.render(prompt + answer, len(prompt), mask, which, template_arguments(row))


def _two_parts(row: Row, chat: Chat, as_chat: bool, mask: str) -> list[Part]:
    """Rationale and answer are one reply, joined as they stand; the cut between them is where the rationale's text
    ends."""
    first, second = row.values["rationale"], row.values["answer"]
    for column in ("rationale", "answer"):
        if not isinstance(row.values[column], str):
            raise ValueError(f"column '{column}': expected a string, got {type(row.values[column]).__name__}.")
        if not row.values[column].strip():
            raise NothingToTrain(f"empty {column}")
    if mask != "reply":
        raise ValueError(f"data.mask: expected reply, got {mask}: rationale and answer are what is trained.")
    prompt = row.values["prompt"]
    if not is_chat(row, "prompt") and not as_chat:
        return [Part(prompt, False), Part(first, True, open=True), Part(second, True)]
    reply = first + second
    values = {**row.values, "completion": reply if isinstance(prompt, str) else [_reply(reply)]}
    before, whole = _answer(Row(row.index, row.where, values), "completion", chat, as_chat, mask)
    at = whole.text.find(reply.strip())  # templates may trim a reply
    if at < 0:
        raise ValueError("the chat template rewrites the reply, so its two parts cannot be told apart.")
    cut = at + len(first.lstrip())
    return [before, Part(whole.text[:cut], True, open=True), Part(whole.text[cut:], True)]


def _reply(text: str) -> dict:
    return {"role": "assistant", "content": text}


def _shared(chosen, rejected, chatty: bool):
    """The shared beginning: whole messages, or text up to the last white space (so that no word is cut)."""
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    if chatty:
        while same and chosen[same - 1]["role"] == "assistant" and same == min(len(chosen), len(rejected)):
            same -= 1  # equal replies stay replies
        return chosen[:same]
    return chosen[: max(0, *(chosen.rfind(space, 0, same) for space in " \n\t"))]


def _differs(a: str, b: str, name_a: str, name_b: str) -> str:
    at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    return (
        f"the chat template rewrites the conversation: {name_a} has {a[at : at + 24]!r} where "
        f"{name_b} has {b[at : at + 24]!r} "
        f"(character {at}), so a mask over all turns would not be exact. Set data.mask: last."
    )

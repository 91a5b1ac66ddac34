# SPDX-License-Identifier: Apache-2.0
"""Text of a row, cut where training begins and ends.

A conversation is rendered by the model's own template and by nothing else. What the model will write is found by
rendering twice: what it is served before a turn (with the generation prompt), and the conversation with that turn; the
difference is the reply. This needs no {% generation %} marks in the template, and training sees to the byte what
serving will send."""

from __future__ import annotations

from dataclasses import dataclass

from jinja2 import TemplateError

from fastpost.data.columns import Row, is_chat, need


@dataclass(frozen=True)
class Part:
    """A stretch of text; `reply` = the model is to learn to write it."""

    text: str
    reply: bool


class Chat:
    """A tokenizer's chat template. render(messages) -> parts; ValueError for a template that cannot mark where a reply
    begins."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self._has_generation_prompt = False  # set when one was seen

    def text(self, messages: list[dict], generate: bool = False) -> str:
        """The template's own rendering; `generate` adds the generation prompt."""
        if not self.tokenizer.chat_template:
            raise ValueError(
                "this tokenizer has no chat template. Give plain strings (data.format: plain) or a chat model."
            )
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        except TemplateError as error:
            raise ValueError(f"the chat template refuses this conversation: {error}") from None

    def render(self, messages: list[dict], first: int = 0, mask: str = "reply") -> list[Part]:
        """Parts of a conversation: assistant turns from message `first` on are replies (mask "last": only the last of
        them).

        What follows the last reply is kept only for mask "full": nothing trained can see it.
        """
        parts, done = [], ""
        if mask == "last":
            first = max((k for k, m in enumerate(messages) if m["role"] == "assistant" and k >= first), default=first)
        for k, message in enumerate(messages):
            if message["role"] != "assistant" or k < first:
                continue
            if k == 0:
                raise ValueError(
                    "the conversation begins with the assistant, so there is no prompt to answer. Add a user turn."
                )
            before, after = self.text(messages[:k], generate=True), self.text(messages[: k + 1])
            if not after.startswith(before):
                raise ValueError(
                    _differs(before, after, "what is served before the reply", "the conversation with the reply")
                )
            if not before.startswith(done):
                raise ValueError(_differs(done, before, "an earlier turn", "its place in the longer conversation"))
            reply = after[len(before) :]
            self._check_generation_prompt(messages[:k], before, message, reply)
            parts += [Part(before[len(done) :], False), Part(reply, True)]
            done = after
        if not parts:
            raise ValueError("the conversation has no assistant turn to train. Drop the row, or add the reply.")
        whole = self.text(messages) if mask == "full" else done
        return parts + ([Part(whole[len(done) :], False)] if len(whole) > len(done) else [])

    def _check_generation_prompt(self, prompt: list[dict], before: str, message: dict, reply: str) -> None:
        """Without a generation prompt a turn's header would count as reply. Templates that have no header ([/INST]) are
        fine."""
        if self._has_generation_prompt or before != self.text(prompt):
            self._has_generation_prompt = True
            return
        content = message["content"].strip() if isinstance(message["content"], str) else ""
        header = reply[: reply.find(content)] if content and content in reply else reply
        if header.strip():
            raise ValueError(
                f"the chat template has no generation prompt: it writes {header!r} before a reply but ignores "
                "add_generation_prompt, so the header would be trained as part of the reply. Add "
                "{% if add_generation_prompt %}...{% endif %} to the template, or give plain strings."
            )


def parts_of(row: Row, kind: str, chat: Chat, as_chat: bool, mask: str) -> list[list[Part]]:
    """A row's sequences as parts: one, or [chosen, rejected]. Raises ValueError naming file, line and column."""
    try:
        if kind == "preference":
            return _pair(row, chat, as_chat, mask)
        if kind == "messages":
            if not is_chat(row, "messages"):
                raise ValueError("column 'messages': expected a list of messages, got a string.")
            return [chat.render(row.values["messages"], mask=mask)]
        if kind == "text":
            if is_chat(row, "text"):
                raise ValueError(
                    "column 'text': expected a string, got a list of messages. Name the column 'messages'."
                )
            return [[Part(row.values["text"], True)]]
        return [_answer(row, "completion", chat, as_chat, mask)]
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
            raise ValueError(
                "chosen and rejected are the same up to the end of one of them: nothing is left to prefer."
            )
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
        prompt, answer = [{"role": "user", "content": prompt}], [{"role": "assistant", "content": answer}]
    if answer[0]["role"] != "assistant":
        raise ValueError(
            f"column '{column}' begins with role '{answer[0]['role']}'; expected the assistant's reply to the prompt. "
            "Move what comes before it into 'prompt'."
        )
    return chat.render(prompt + answer, first=len(prompt), mask=mask)


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

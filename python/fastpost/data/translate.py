# SPDX-License-Identifier: Apache-2.0
"""Rows as other tools write them, in our columns. What was read as what is kept as notes, each said once.

    conversations of {"from", "value"}      ->  messages (sharegpt); with chosen, rejected beside it: prompt and a pair;
                                                with label or kto_tag: prompt, completion, label
    instruction, input, output              ->  prompt, completion (alpaca), as a chat; data.format plain: Alpaca's own
                                                text. output = [chosen, rejected] makes a pair. system and history, too
    chosen, rejected as one {"from", ...}   ->  lists of one message
    chosen / reject, reject_reward          ->  rejected, rejected_reward (REFUEL)
    chosen_logprob, reject_logprob          ->  previous_chosen_logps, previous_rejected_logps (REFUEL: the policy that
                                                wrote the replies)
    logp_ref_*, logp_t_*, last_*_logps      ->  reference_*_logps, previous_*_logps (INPO)
    margin                                  ->  chosen_reward = margin, rejected_reward = 0, where an objective
                                                regresses on rewards (REBEL, REFUEL: only the difference enters) and
                                                the row has none; otherwise it is left alone: no loss here reads it

Columns that the row has under our name are never replaced, and a row that is a type of ours as it stands keeps its
shape."""

from __future__ import annotations

import json

from fastpost.data.columns import Row

ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant",
    "bing": "assistant", "model": "assistant", "assistant": "assistant", "system": "system", "developer": "developer",
    "tool": "tool", "observation": "tool", "function_response": "tool", "function_call": "assistant",
}  # fmt: skip
"""sharegpt's "from" -> role."""

RENAMED = {
    "reject": "rejected",
    "reject_reward": "rejected_reward",
    "kto_tag": "label",
    "chosen_logprob": "previous_chosen_logps",
    "reject_logprob": "previous_rejected_logps",
    "rejected_logprob": "previous_rejected_logps",
    "logp_t_chosen": "previous_chosen_logps",
    "logp_t_rejected": "previous_rejected_logps",
    "last_chosen_logps": "previous_chosen_logps",
    "last_rejected_logps": "previous_rejected_logps",
    "logp_ref_chosen": "reference_chosen_logps",
    "logp_ref_rejected": "reference_rejected_logps",
}
"""theirs -> ours, where only the name differs."""

ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n{}### Response:\n"
)


class Translator:
    """translate(row) -> the row in our columns; `notes` says what was translated, in the order in which it was met.

    plain: strings stay strings (data.format plain): instructions are put into Alpaca's text and not into a chat.
    margin: read `margin` as a difference of rewards.
    """

    def __init__(self, plain: bool = False, margin: bool = False):
        self.plain, self.margin = plain, margin
        self._notes: dict[str, None] = {}

    @property
    def notes(self) -> list[str]:
        return list(self._notes)

    def __call__(self, row: Row) -> Row:
        """Raises ValueError naming file, line and column for a message that cannot be read."""
        values = dict(row.values)
        try:
            self._rename(values)
            for column in ("conversations", "messages", "prompt", "completion", "chosen", "rejected"):
                if column in values:
                    values[column] = self._messages(values[column], column)
            if "conversations" in values and "messages" not in values:
                self._conversations(values)
            typed = any(c in values for c in ("messages", "prompt", "completion", "chosen", "rejected"))
            if "instruction" in values and "output" in values and not typed:
                self._alpaca(values)
            rewarded = any(values.get(c) is not None for c in ("chosen_reward", "rejected_reward"))
            if self.margin and not rewarded and values.get("margin") is not None and "chosen" in values:
                values |= {"chosen_reward": values["margin"], "rejected_reward": 0.0}
                self._say("column margin is read as chosen_reward = margin, rejected_reward = 0")
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}") from None
        return Row(row.index, row.where, values)

    def _say(self, note: str) -> None:
        self._notes.setdefault(note)

    def _rename(self, values: dict) -> None:
        for theirs, ours in RENAMED.items():
            if theirs in values and ours not in values:
                values[ours] = values.pop(theirs)
                self._say(f"column {theirs} is read as {ours}")

    def _messages(self, value, column: str):
        """A list of {"role", "content"} from one of {"from", "value"} or from one message; anything else as it is."""
        if isinstance(value, dict) and ("value" in value or "content" in value):
            value = [value]
        if not isinstance(value, list) or not any(isinstance(m, dict) and "from" in m for m in value):
            return value
        self._say("from / value (sharegpt) is read as role / content")
        return [self._message(m, f"{column}[{i}]") for i, m in enumerate(value)]

    @staticmethod
    def _message(message, where: str) -> dict:
        if not isinstance(message, dict) or "from" not in message or "value" not in message:
            got = f"keys {', '.join(message)}" if isinstance(message, dict) else type(message).__name__
            raise ValueError(f"{where}: expected {{'from', 'value'}} like the others, got {got}.")
        role = ROLES.get(str(message["from"]).lower())
        if role is None:
            raise ValueError(f"{where}: from: expected one of {', '.join(ROLES)}, got {message['from']!r}.")
        rest = {k: v for k, v in message.items() if k not in ("from", "value")}
        if str(message["from"]).lower() == "function_call":
            try:
                calls = json.loads(message["value"])
            except (TypeError, ValueError):
                raise ValueError(
                    f"{where}: function_call: expected JSON, got {str(message['value'])[:40]!r}."
                ) from None
            calls = [{"type": "function", "function": c} for c in (calls if isinstance(calls, list) else [calls])]
            return {"role": role, "content": "", "tool_calls": calls, **rest}
        return {"role": role, "content": message["value"], **rest}

    def _conversations(self, values: dict) -> None:
        messages = values.pop("conversations")
        if isinstance(messages, list) and isinstance(values.get("system"), str) and values["system"]:
            messages = [{"role": "system", "content": values["system"]}, *messages]
            self._say("column system is read as the first message")
        if "chosen" in values and "rejected" in values and "prompt" not in values:
            values["prompt"] = messages
            self._say("columns conversations, chosen, rejected are read as prompt, chosen, rejected")
        elif isinstance(values.get("label"), bool) and isinstance(messages, list) and "prompt" not in values:
            values |= {"prompt": messages[:-1], "completion": messages[-1:]}
            self._say("columns conversations, label are read as prompt, completion (the last message), label")
        else:
            values["messages"] = messages
            self._say("column conversations is read as messages")

    def _alpaca(self, values: dict) -> None:
        instruction, more, output = (values.get(k) for k in ("instruction", "input", "output"))
        pair = isinstance(output, list)
        if pair and len(output) != 2:
            raise ValueError(f"column 'output': expected a string or [chosen, rejected], got a list of {len(output)}.")
        outputs = [("output", text) for text in (output if pair else [output])]
        for column, text in (("instruction", instruction), ("input", more or ""), *outputs):
            if not isinstance(text, str):
                raise ValueError(f"column '{column}': expected a string, got {type(text).__name__}.")
        if self.plain:
            prompt, answer = self._alpaca_text(values, instruction, more), lambda text: text
        else:
            prompt, answer = _alpaca_chat(values, instruction, more), lambda text: [_turn("assistant", text)]
        if pair:
            values |= {"prompt": prompt, "chosen": answer(output[0]), "rejected": answer(output[1])}
        else:
            values |= {"prompt": prompt, "completion": answer(output)}
        ours = "prompt, chosen, rejected" if pair else "prompt, completion"
        how = "in Alpaca's own text" if self.plain else "as a chat"
        aside = "; column text is left aside" if "text" in values else ""
        self._say(f"columns instruction, input, output (alpaca) are read as {ours} {how}{aside}")

    @staticmethod
    def _alpaca_text(values: dict, instruction: str, more: str | None) -> str:
        for column in ("system", "history"):
            if values.get(column):
                raise ValueError(f"column '{column}' needs a chat template. Set data.format to chat, or leave it out.")
        context = ", paired with an input that provides further context" if more else ""
        return ALPACA.format(context, instruction, f"### Input:\n{more}\n\n" if more else "")


def _alpaca_chat(values: dict, instruction: str, more: str | None) -> list[dict]:
    messages = [_turn("system", values["system"])] if values.get("system") else []
    for i, exchange in enumerate(values.get("history") or []):
        if not (isinstance(exchange, list) and len(exchange) == 2 and all(isinstance(t, str) for t in exchange)):
            raise ValueError(f"column 'history'[{i}]: expected [question, answer], got {str(exchange)[:40]!r}.")
        messages += [_turn("user", exchange[0]), _turn("assistant", exchange[1])]
    return [*messages, _turn("user", f"{instruction}\n{more}" if more else instruction)]


def _turn(role: str, text: str) -> dict:
    return {"role": role, "content": text}

# SPDX-License-Identifier: Apache-2.0
"""A shipped recipe, run through the command line as it is, but for a tiny model in place of the real one and three
steps; and what plain transformers says about the same rows."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
import transformers

from fastpost import objectives
from fastpost.data.collate import Example, Sequence
from fastpost.data.loader import load_dataset
from fastpost.hf import folder
from fastpost.train import metrics
from fastpost.train.config import load_config
from fastpost.train.plan import Plan

LONG = ("--data.max_length", "1500", "--data.max_prompt_length", "1000")
"""The tiny tokenizer knows few words, so rows are longer in its tokens."""


@dataclass
class Run:
    """A finished run of a recipe."""

    name: str
    path: Path
    out: str
    objective: objectives.Objective = field(init=False)

    def __post_init__(self):
        self.cfg = load_config(self.path / "config.yaml")
        self.objective = objectives.from_name(self.cfg.objective.name, **self.cfg.objective.fields)
        steps = metrics.read(self.path / "metrics.jsonl")
        self.steps = [row for row in steps if "loss" in row]
        self.first = self.steps[0]

    @cached_property
    def data(self):
        return load_dataset(self.cfg.data, folder.load_tokenizer(self.cfg.model.path), self.objective)

    @cached_property
    def plan(self) -> Plan:
        return Plan(self.cfg, self.data)

    @cached_property
    def examples(self) -> list[Example]:
        """Those of the first step."""
        return [self.data.examples[i] for i in self.plan.rows(0)]

    @cached_property
    def rows(self) -> list[dict]:
        """The same as lines of the data file."""
        lines = Path(self.cfg.data.train).read_text().splitlines()
        return [json.loads(lines[e.row]) for e in self.examples]

    @property
    def sequences(self) -> list[Sequence]:
        return [s for e in self.examples for s in e.sequences]

    @cached_property
    def start(self):
        """The model before training, by transformers and its own attention."""
        return plain_model(folder.locate(self.cfg.model.path).base)


def plain_model(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")


@torch.no_grad()
def token_logprobs(model, ids) -> torch.Tensor:
    """log p of each token but the first, given those before it, float64 [len(ids) - 1]."""
    ids = torch.tensor(list(ids))
    logits = model(ids[None]).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0]


def scored(model, sequence: Sequence) -> torch.Tensor:
    """The log-probs of a sequence's trained tokens."""
    return token_logprobs(model, sequence.ids)[torch.tensor(list(sequence.trained[1:])).bool()]


def logprob(model, sequence: Sequence) -> float:
    return scored(model, sequence).sum().item()

# SPDX-License-Identifier: Apache-2.0
"""One side of bench.train_step in a process of its own: a few steps, and what each took.

    python -m bench.train_sides SIDE FOLDER --objective sft --model DIR --rows 8 --steps 3 --clock cpu

reads FOLDER/fastpost.jsonl or FOLDER/trl.jsonl and writes FOLDER/result.json. Both sides run the whole trainer that a
user runs, and a step lasts from the end of one to the end of the next: collating, logging and all.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import resource
import tempfile
from pathlib import Path

from bench.timing import CLOCKS

BETA, GAMMA_BETA_RATIO, LR, MAX_LENGTH = 2.0, 0.5, 1e-6, 512
DPO_BETA = 0.1

FLOAT32, BF16 = ({"model_init_kwargs": {"dtype": name, "device_map": None}} for name in ("float32", "bfloat16"))
OFF = {"gradient_checkpointing": False}
PADDING_FREE = {"padding_free": True, "max_length": None}
SIDES = {  # what is measured -> what it sets
    "trl": {},
    "trl, checkpointing off": OFF,
    "trl, float32": FLOAT32,
    "trl, float32, checkpointing off": FLOAT32 | OFF,
    "trl, bf16 weights, checkpointing off": BF16 | OFF,
    "trl, padding-free, checkpointing off": PADDING_FREE | OFF,
    "trl, padding-free, bf16 weights, checkpointing off": PADDING_FREE | BF16 | OFF,
    "trl, packing, checkpointing off": OFF | {"packing": True},
    "fastpost": {},
    "fastpost, checkpointing off": {"train": {"gradient_checkpointing": "none"}},
    "fastpost, checkpointing full": {"train": {"gradient_checkpointing": "full"}},
    "fastpost, pure bf16, checkpointing full": {
        "train": {"gradient_checkpointing": "full"},
        "optim": {"precision": "pure-bf16"},
    },
}
SFT_ALONE = [side for side in SIDES if "padding-free" in side or "packing" in side]
"""TRL has these for SFT and no other trainer (DPOTrainer takes padding_free and warns that it is switched off)."""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m bench.train_sides", description=__doc__)
    parser.add_argument("side", choices=SIDES, metavar="SIDE")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--objective", required=True, choices=TRAINERS)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--clock", choices=CLOCKS, required=True)
    args = parser.parse_args(argv)
    run = trl_steps if args.side.startswith("trl") else fastpost_steps
    result = run(args, args.folder, SIDES[args.side])
    result["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    (args.folder / "result.json").write_text(json.dumps(result))


class Steps:
    """Seconds, loss and tokens (real ones, no padding) of each step. `begin` once, then `end` after each step."""

    def __init__(self, clock: str):
        self._clock, self._last = CLOCKS[clock], 0.0
        self.seconds: list[float] = []
        self.loss: list[float] = []
        self.step_tokens: list[int] = []
        self.before_gb = 0.0

    def begin(self) -> None:
        self.before_gb, self._last = resident_gb(), self._clock()

    def end(self) -> None:
        now = self._clock()
        self.seconds.append(now - self._last)
        self._last = now

    def result(self, seen: list[tuple[list[int], list[bool]]]) -> dict:
        names = ("seconds", "loss", "step_tokens", "before_gb")
        return {name: getattr(self, name) for name in names} | digest(seen)


# ---- fastpost --------------------------------------------------------------------------------------------------------

OBJECTIVES = {
    "sft": {"name": "sft"},
    "dpo": {"name": "dpo", "beta": DPO_BETA},
    "simpo": {"name": "simpo", "beta": BETA, "gamma_beta_ratio": GAMMA_BETA_RATIO},
}


def fastpost_steps(args, folder: Path, settings: dict) -> dict:
    from fastpost import objectives
    from fastpost.data.loader import load_dataset
    from fastpost.hf.folder import load_tokenizer
    from fastpost.train import loop
    from fastpost.train.config import from_dict

    steps = Steps(args.clock)

    class Watched(loop.RunLog):
        """The run's own log: it opens right before the first step and hears of the end of each."""

        def __enter__(self):
            steps.begin()
            return super().__enter__()

        def step(self, step, values, timing):
            super().step(step, values, timing)
            steps.end()
            steps.loss.append(values["loss"])
            steps.step_tokens.append(values["num_tokens"] - sum(steps.step_tokens))

    with tempfile.TemporaryDirectory(dir=folder) as run:
        cfg = from_dict({
            "model": {"path": args.model},
            "data": {"train": str(folder / "fastpost.jsonl"), "max_length": MAX_LENGTH, "shuffle": False,
                     "cache": None},
            "objective": OBJECTIVES[args.objective],
            "optim": {"lr": LR, "schedule": "constant", "warmup_ratio": 0.0} | settings.get("optim", {}),
            "train": {"output_dir": f"{run}/run", "batch_size": args.rows, "micro_batch_size": args.rows,
                      "max_steps": args.steps} | settings.get("train", {}),
            "log": {"plot": False},
        })  # fmt: skip
        objective = objectives.from_name(cfg.objective.name, **cfg.objective.fields)
        data = load_dataset(cfg.data, load_tokenizer(args.model), objective)
        seen = [(list(s.ids), list(map(bool, s.trained))) for e in data.examples for s in e.sequences]
        original, loop.RunLog = loop.RunLog, Watched
        try:
            loop.train(cfg)
        finally:
            loop.RunLog = original
    return steps.result(seen)


# ---- TRL -------------------------------------------------------------------------------------------------------------

TRAINERS = {  # objective -> module, prefix of its classes, settings
    "sft": ("trl", "SFT", {"completion_only_loss": True}),
    "dpo": ("trl", "DPO", {"loss_type": "sigmoid", "beta": DPO_BETA, "precompute_ref_log_probs": True}),
    "simpo": ("trl.experimental.cpo", "CPO", {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": BETA,
                                              "simpo_gamma": BETA * GAMMA_BETA_RATIO}),
}  # fmt: skip


def trl_steps(args, folder: Path, settings: dict) -> dict:
    from datasets import load_dataset
    from transformers import AutoTokenizer, TrainerCallback

    name, prefix, own = TRAINERS[args.objective]
    module = importlib.import_module(name)
    Config, Base = getattr(module, f"{prefix}Config"), getattr(module, f"{prefix}Trainer")
    steps = Steps(args.clock)

    class Trainer(Base):
        def compute_loss(self, model, inputs, *more, **how):
            masks = [mask for key, mask in inputs.items() if key.endswith("attention_mask")]
            tokens = sum(int(m.sum()) for m in masks) if masks else inputs["position_ids"].numel()
            loss = super().compute_loss(model, inputs, *more, **how)
            steps.step_tokens.append(tokens)
            steps.loss.append(float(loss.detach()))
            return loss

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            steps.begin()

        def on_step_end(self, *_, **__):
            steps.end()

    packing = settings.get("packing")  # then a row is a pack, of about as many tokens as a step of the others
    given = {"max_length": 256 * args.rows if packing else MAX_LENGTH} | own | settings
    config = Config(
        output_dir=str(folder / "trl"), per_device_train_batch_size=1 if packing else args.rows,
        max_steps=args.steps, learning_rate=LR, lr_scheduler_type="constant", max_grad_norm=1.0,
        train_sampling_strategy="sequential", use_cpu=True, report_to="none", save_strategy="no", logging_steps=1,
        disable_tqdm=True, **given,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = load_dataset("json", data_files=str(folder / "trl.jsonl"), split="train", cache_dir=str(folder))
    trainer = Trainer(args.model, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[Clock()])
    assert config.bf16 and Config.gradient_checkpointing, "TRL's defaults, as bench.train_step says"
    seen = [sequence for row in trainer.train_dataset for sequence in trl_sequences(args.objective, row)]
    weights = sorted({str(p.dtype).removeprefix("torch.") for p in trainer.model.parameters()})
    trainer.train()
    return steps.result(seen) | {"weights": weights}


def trl_sequences(objective: str, row: dict) -> list[tuple[list[int], list[bool]]]:
    """(token ids, which are scored) of the sequences in a row as TRL prepared it."""
    if objective == "simpo":
        return [(row[f"{k}_input_ids"], [x != -100 for x in row[f"{k}_labels"]]) for k in ("chosen", "rejected")]
    if objective == "dpo":
        prompt = row["prompt_ids"]
        return [(prompt + row[f"{k}_ids"], [False] * len(prompt) + [True] * len(row[f"{k}_ids"]))
                for k in ("chosen", "rejected")]  # fmt: skip
    found, begin = [], 0
    for length in row.get("seq_lengths") or [len(row["input_ids"])]:
        part = slice(begin, begin + length)
        found.append((row["input_ids"][part], [x != -100 for x in row["labels"][part]]))
        begin += length
    return found


# ---- both ------------------------------------------------------------------------------------------------------------


def digest(seen: list[tuple[list[int], list[bool]]]) -> dict:
    """Of token ids and which are scored, in any order. What stands behind the last scored token changes nothing and is
    left out."""
    ends = [max(i for i, on in enumerate(trained) if on) + 1 for _, trained in seen]
    text = json.dumps(sorted((list(ids[:end]), trained[:end]) for (ids, trained), end in zip(seen, ends))).encode()
    scored = sum(sum(trained) for _, trained in seen)
    return {"digest": hashlib.sha256(text).hexdigest(), "tokens": sum(len(ids) for ids, _ in seen), "scored": scored}


def resident_gb() -> float:
    """Memory held now; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    line = next((x for x in status.read_text().splitlines() if x.startswith("VmRSS")), "") if status.is_file() else ""
    return int(line.split()[1]) * 1024 / 1e9 if line else 0.0


if __name__ == "__main__":
    main()

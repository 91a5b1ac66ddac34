# SPDX-License-Identifier: Apache-2.0
"""A whole SimPO optimizer step beside TRL's CPOTrainer(loss_type="simpo", cpo_alpha=0): seconds, peak memory, loss.

    python -m bench.train_step --model DIR [--pairs 4] [--steps 4] [--repeat 2] [--threads 1 2] [--json FILE]

Each side runs alone in a process of its own, taking turns, on the same rows in the same order. Equal on both sides and
checked: token ids and which are scored. Equal by construction: AdamW at a constant lr of 1e-6, beta 2, gamma/beta 0.5,
clipping at 1, no dropout. The weights:

    trl             as it comes: those of the files, which for SmolLM2 means bf16 weights and bf16 AdamW moments, whose
                    updates mostly round away at this lr; bf16 autocast; right-padded batches; checkpointing ON
    trl, float32    float32 weights and moments under bf16 autocast, what bf16=True meant before transformers 5
    fastpost        as it comes: float32 master weights and moments, bf16 compute; packed rows; selective recomputation

and each with gradient checkpointing OFF, ours with it in full and in pure bf16 too.

Rows are GSM8K questions with their solution as chosen and the same solution with a slip that runs through to the end as
rejected, from $FASTPOST_GSM8K or --data (a folder with train.jsonl); without it fastpost's own word problems.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.timing import CLOCKS

BETA, GAMMA_BETA_RATIO, LR, MAX_LENGTH = 2.0, 0.5, 1e-6, 512
SIDES = {  # what is measured -> what it sets
    "trl": {},
    "trl, checkpointing off": {"gradient_checkpointing": False},
    "trl, float32": {"model_init_kwargs": {"dtype": "float32", "device_map": None}},
    "trl, float32, checkpointing off": {
        "model_init_kwargs": {"dtype": "float32", "device_map": None},
        "gradient_checkpointing": False,
    },
    "fastpost": {},
    "fastpost, checkpointing off": {"train": {"gradient_checkpointing": "none"}},
    "fastpost, checkpointing full": {"train": {"gradient_checkpointing": "full"}},
    "fastpost, pure bf16, checkpointing full": {
        "train": {"gradient_checkpointing": "full"},
        "optim": {"precision": "pure-bf16"},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.train_step", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--model", required=True, help="Hugging Face folder of a chat model, as SmolLM2-135M-Instruct")
    parser.add_argument("--data", default=os.environ.get("FASTPOST_GSM8K", "gsm8k"), help="GSM8K folder")
    parser.add_argument("--pairs", type=int, default=4, help="pairs in a step (4)")
    parser.add_argument("--steps", type=int, default=4, help="steps of each run; the first is not timed (4)")
    parser.add_argument("--repeat", type=int, default=2, help="runs of each side, in turns (2)")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument(
        "--sides", nargs="+", default=list(SIDES), choices=SIDES, metavar="SIDE", help="any of: " + "; ".join(SIDES)
    )
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: leaves out what others took (one thread)")
    parser.add_argument("--json", metavar="FILE", help="write every time, loss and peak")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        side, folder = args.worker[0], Path(args.worker[1])
        result = (trl_steps if side.startswith("trl") else fastpost_steps)(args, folder, SIDES[side])
        result["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        (folder / "result.json").write_text(json.dumps(result))
        return
    if args.steps < 2:
        parser.error("--steps: expected at least 2, the first is not timed.")
    if args.clock == "cpu" and args.threads != [1]:
        parser.error("--clock cpu: adds up all threads. Use it with --threads 1.")
    compare(args)


def compare(args) -> None:
    from transformers import AutoTokenizer

    source, rows = rows_of(Path(args.data), args.pairs * args.steps, AutoTokenizer.from_pretrained(args.model))
    print(f"{args.pairs} pairs a step from {source}, at most {MAX_LENGTH} tokens; {args.steps - 1} timed steps a run")
    runs = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, each in rows.items():
            (folder / file).write_text("".join(json.dumps(r) + "\n" for r in each))
        for threads in args.threads:
            for _ in range(args.repeat):
                for side in args.sides:
                    runs.append(worker(args, side, folder, threads) | {"side": side, "threads": threads})
    check_rows(runs)
    for threads in args.threads:
        report([r for r in runs if r["threads"] == threads], args.sides, threads)
    if args.json:
        from torch import device

        from bench.machine import describe

        result = describe(device("cpu")) | {"rows": source, "clock": args.clock, "runs": runs}
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


def worker(args, side: str, folder: Path, threads: int) -> dict:
    model = str(Path(args.model).resolve())
    command = [sys.executable, "-m", "bench.train_step", "--worker", side, str(folder), "--model", model,
               "--pairs", str(args.pairs), "--steps", str(args.steps), "--clock", args.clock]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    done = subprocess.run(command, env=env, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"[bench] {side} stopped:\n{done.stderr[-3000:]}")
    return json.loads((folder / "result.json").read_text())


def check_rows(runs: list[dict]) -> None:
    """Same tokens, same mask, on both sides; anything else would compare two different jobs."""
    if len({r["digest"] for r in runs}) > 1:
        counts = {r["side"]: (r["tokens"], r["scored"]) for r in runs}
        sys.exit(f"[bench] the sides do not train on the same tokens. (tokens, scored) of each: {counts}")
    tokens = {r["side"].split(",")[0]: r["tokens"] for r in runs}
    print(f"All score the same {runs[0]['scored']} tokens, with the same tokens before them. In all: {tokens}")


def report(runs: list[dict], sides: list[str], threads: int) -> None:
    title = f"{threads} thread{'s' * (threads > 1)}"
    print(f"\n{title:40} {'s/step':>6} {'peak GB':>8} {'before GB':>10} {'loss at step 0':>15}")
    best = {}
    for side in sides:
        mine = [r for r in runs if r["side"] == side]
        seconds = statistics.median(t for r in mine for t in r["seconds"][1:])
        best[side] = seconds, max(r["peak_gb"] for r in mine)
        before, loss = mine[0]["before_gb"], mine[0]["loss"][0]
        print(f"{side:40} {seconds:>6.2f} {best[side][1]:>8.2f} {before:>10.2f} {loss:>15.5f}")
    for side in sides if "fastpost" in best else ():
        if side.startswith("fastpost"):
            continue
        time_ratio, memory_ratio = (best["fastpost"][i] / best[side][i] for i in (0, 1))
        print(f"fastpost takes {time_ratio:.2f} of the time and {memory_ratio:.2f} of the peak memory of {side}")


# ---- the rows --------------------------------------------------------------------------------------------------------


def rows_of(folder: Path, count: int, tokenizer) -> tuple[str, dict[str, list[dict]]]:
    """(where they come from, the rows as each side wants them).

    Ours are messages. TRL's are text with the template applied to the prompt: given messages it would train on the line
    break that the template puts after the end-of-turn token, and on a second end-of-turn token.
    """
    file, draw = folder / "train.jsonl", random.Random(0)
    if file.is_file():
        lines = file.read_text(encoding="utf-8").splitlines()
        texts = [spoil(row["question"], row["answer"], draw) for row in map(json.loads, draw.sample(lines, count))]
        source = "GSM8K"
    else:
        from fastpost.data.word_problems import problems

        texts = [(r["prompt"][0]["content"], *(r[k][0]["content"] for k in ("chosen", "rejected")))
                 for r in problems("train", count)]  # fmt: skip
        source = "fastpost.data.word_problems (no GSM8K found: shorter rows than a real set's)"
    ours, trl = [], []
    for question, *replies in texts:
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        trl.append({"prompt": prompt, "chosen": replies[0], "rejected": replies[1]})
        chosen, rejected = ([{"role": "assistant", "content": reply}] for reply in replies)
        ours.append({"prompt": messages, "chosen": chosen, "rejected": rejected})
    return source, {"trl.jsonl": trl, "fastpost.jsonl": ours}


def spoil(question: str, answer: str, draw: random.Random) -> tuple[str, str, str]:
    """A GSM8K row -> (question, its solution, the solution with one result wrong and wrong from there on)."""
    results = re.findall(r"=[^<>]*>>([\d.]*\d)", answer)
    right = re.sub(r"<<.*?>>", "", answer).replace("####", "The answer is")
    slips = results or [right.split()[-1]]
    old = draw.choice(slips)
    new = str(int(float(old.replace(",", ""))) + draw.choice([-3, -2, 2, 3, 10]))
    begin = right.find(old)
    head, tail = right[:begin], re.sub(rf"(?<![\d.]){re.escape(old)}(?![\d])", new, right[begin:])
    final = right.split()[-1]
    if tail.endswith(final):  # the slip must reach the answer
        tail = tail[: -len(final)] + str(int(float(final.replace(",", ""))) + draw.choice([-4, -1, 1, 5]))
    return question, right, head + tail


# ---- the sides: each returns seconds and loss of every step, and what it trained on ----------------------------------


def trl_steps(args, folder: Path, settings: dict) -> dict:
    from datasets import load_dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    losses, times, clock = [], [], CLOCKS[args.clock]

    class Trainer(CPOTrainer):
        def compute_loss(self, *inputs, **how):
            loss = super().compute_loss(*inputs, **how)
            losses.append(float(loss.detach()))
            return loss

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            times.append(-clock())

        def on_step_end(self, *_, **__):
            times[-1] += clock()

    config = CPOConfig(
        output_dir=str(folder / "trl"), loss_type="simpo", cpo_alpha=0.0, beta=BETA,
        simpo_gamma=BETA * GAMMA_BETA_RATIO, max_length=MAX_LENGTH, per_device_train_batch_size=args.pairs,
        max_steps=args.steps, learning_rate=LR,
        lr_scheduler_type="constant", max_grad_norm=1.0, train_sampling_strategy="sequential", use_cpu=True,
        report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True, **settings,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = load_dataset("json", data_files=str(folder / "trl.jsonl"), split="train", cache_dir=str(folder))
    trainer = Trainer(args.model, config, train_dataset=data, processing_class=tokenizer, callbacks=[Clock()])
    assert config.bf16 and CPOConfig.gradient_checkpointing, "TRL's defaults, as the text above says"
    seen = [(row[f"{k}_input_ids"], [x != -100 for x in row[f"{k}_labels"]])
            for row in trainer.train_dataset for k in ("chosen", "rejected")]  # fmt: skip
    before = resident_gb()
    trainer.train()
    return {"seconds": times, "loss": losses, "before_gb": before} | digest(seen)


def fastpost_steps(args, folder: Path, settings: dict) -> dict:
    from fastpost import objectives
    from fastpost.data.loader import load_dataset
    from fastpost.hf.folder import load_tokenizer
    from fastpost.train.config import from_dict
    from fastpost.train.device import pick_device
    from fastpost.train.forward import load_policy
    from fastpost.train.optim import AdamW
    from fastpost.train.step import train_step

    rows = str(folder / "fastpost.jsonl")
    cfg = from_dict({"model": {"path": args.model}, "data": {"train": rows, "max_length": MAX_LENGTH},
                     **settings})  # fmt: skip
    objective = objectives.SimPO(beta=BETA, gamma_beta_ratio=GAMMA_BETA_RATIO)
    data = load_dataset(cfg.data, load_tokenizer(args.model), objective)
    model = load_policy(cfg, pick_device("cpu"))
    optimizer = AdamW(model, precision=cfg.optim.precision)
    model.train()
    seen = [(list(s.ids), list(map(bool, s.trained))) for e in data.examples for s in e.sequences]
    before, losses, times, clock = resident_gb(), [], [], CLOCKS[args.clock]
    for step in range(args.steps):
        begin = clock()
        batch = data.batch(range(step * args.pairs, (step + 1) * args.pairs))
        values = train_step(model, objective, optimizer, [batch], step=step, lr=LR, max_grad_norm=1.0)
        times.append(clock() - begin)
        losses.append(values["loss"])
    return {"seconds": times, "loss": losses, "before_gb": before} | digest(seen)


def digest(seen: list[tuple[list[int], list[bool]]]) -> dict:
    """Of token ids and which are scored. What stands behind the last scored token changes nothing and is left out."""
    ends = [max(i for i, on in enumerate(trained) if on) + 1 for _, trained in seen]
    text = json.dumps([(ids[:end], trained[:end]) for (ids, trained), end in zip(seen, ends)]).encode()
    scored = sum(sum(trained) for _, trained in seen)
    return {"digest": hashlib.sha256(text).hexdigest(), "tokens": sum(len(ids) for ids, _ in seen), "scored": scored}


def resident_gb() -> float:
    """Memory held now; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    line = next((x for x in status.read_text().splitlines() if x.startswith("VmRSS")), "") if status.is_file() else ""
    return int(line.split()[1]) * 1024 / 1e9 if line else 0.0


if __name__ == "__main__":
    main()

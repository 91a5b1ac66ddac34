# SPDX-License-Identifier: Apache-2.0
"""What a run reports: sums and counts while it computes, TRL's metric names when it writes.

run/metrics.jsonl   one object per step, only values that the same run would produce again (no clocks)
run/timing.jsonl    one object per step: ms, tokens per second, model FLOPs utilisation, memory, share of time
                    waiting for data
run/samples.jsonl   one object per sampled answer (log.samples)
console             one line per step
trackers            the same numbers, see sinks.py
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

import torch

from .distributed import ALONE, Ranks
from .jsonl import read as read  # metrics.read(run / "metrics.jsonl")
from .jsonl import truncate
from .progress import duration
from .samples import brief
from .sinks import Sinks


class Sums:
    """Named (sum, count) pairs. Means are taken once, at the end, so micro-batches of unequal size weigh what they
    should."""

    def __init__(self):
        self._sums: dict[str, list[torch.Tensor]] = {}
        self._counts: dict[str, float] = {}
        self._chosen: torch.Tensor | None = None

    def add(self, name: str, values: torch.Tensor, count: float | None = None) -> None:
        """Add `values` (any shape); `count` is their number unless the mean is over something else (tokens)."""
        self._sums.setdefault(name, []).append(values.detach().double().sum())
        self._counts[name] = self._counts.get(name, 0) + (values.numel() if count is None else count)

    def add_chosen(self, chosen: torch.Tensor) -> None:
        """Tokens of each router's experts (routers.Losses.chosen)."""
        self._chosen = chosen.long() if self._chosen is None else self._chosen + chosen

    def means(self, ranks: Ranks = ALONE) -> dict[str, float]:
        """Sums and counts of all ranks, then one division each; a rank may have none of a name. Waits for the device
        once."""
        totals = torch.stack([torch.stack(parts).sum() for parts in self._sums.values()]).tolist() if self._sums else []
        own = {name: (total, self._counts[name]) for name, total in zip(self._sums, totals, strict=True)}
        both: dict[str, tuple[float, float]] = {}
        gathered = ranks.gather({"sums": own, "chosen": None if self._chosen is None else self._chosen.tolist()})
        for of_rank in gathered:
            for name, (total, count) in of_rank["sums"].items():
                before = both.get(name, (0.0, 0))
                both[name] = (before[0] + total, before[1] + count)
        values = {name: total / count for name, (total, count) in both.items()}
        if chosen := [torch.tensor(r["chosen"]) for r in gathered if r["chosen"] is not None]:
            total = torch.stack(chosen).sum(0).double()
            loads = total * total.shape[1] / total.sum(1, keepdim=True)  # 1 = an even share
            values |= {"router/load_max": float(loads.max()), "router/load_min": float(loads.min())}
        return values


def add_output(sums: Sums, objective, batch, output, count: float) -> None:
    """Add the numbers of forward's Output under TRL's names. `count` is what the loss of this micro-batch is divided
    by; aux_loss and z_loss are weighted by tokens.

    rewards/*: implicit rewards as the objective defines them; logps/*: summed log-probs per sequence; pairs: chosen =
    2i, rejected = 2i+1. Unpaired rows with a reward: above 0 is chosen.
    """
    sums.add("loss", output.losses, count)
    if output.aux_loss is not None:
        sums.add("aux_loss", output.aux_loss * batch.tokens, batch.tokens)
        sums.add("z_loss", output.z_loss * batch.tokens, batch.tokens)
        sums.add_chosen(output.chosen)
    rewards, logprob = output.rewards.detach(), output.logprob.detach()
    if objective.paired:
        chosen, rejected = rewards[0::2], rewards[1::2]
        sums.add("rewards/chosen", chosen)
        sums.add("rewards/rejected", rejected)
        sums.add("rewards/margins", chosen - rejected)
        sums.add("rewards/accuracies", ((chosen > rejected).float() + (chosen >= rejected).float()) / 2)
        sums.add("logps/chosen", logprob[0::2])
        sums.add("logps/rejected", logprob[1::2])
    elif batch.reward is not None:
        for name, rows in (("chosen", batch.reward > 0), ("rejected", batch.reward <= 0)):
            if bool(rows.any()):
                sums.add(f"rewards/{name}", rewards[rows])
                sums.add(f"logps/{name}", logprob[rows])


class RunLog:
    """Appends to metrics.jsonl and timing.jsonl of a run folder and prints the line of a step.

    `finished` steps are kept, what an interrupted run wrote after them is cut off: the resumed run writes it again.
    """

    def __init__(
        self, folder: Path, *, finished: int, total: int, every: int = 1, stream=None, sinks: Sinks | None = None
    ):
        self.total, self.every, self._sinks = total, every, sinks
        self.stream = sys.stdout if stream is None else stream
        self._files, cut = {}, {}
        for name in ("metrics", "timing", "samples"):
            path = folder / f"{name}.jsonl"
            cut[name] = truncate(path, finished)
            if name != "samples" or path.exists():
                self._files[name] = open(path, "a", encoding="utf-8")  # noqa: SIM115, closed in __exit__
        self._folder, self._begin, self._first, self._redrawn = folder, time.perf_counter(), finished, False
        if sinks is not None:
            sinks.open(finished, cut["metrics"])

    def step(self, step: int, values: dict, timing: dict) -> None:
        """`step` is the number of finished steps."""
        self._append("metrics", {"step": step, **values})
        self._append("timing", {"step": step, **timing})
        self._send(step, "train", values | timing)
        shown = step % self.every == 0 or step in (self._first + 1, self.total)
        if shown or self.stream.isatty():
            left = (time.perf_counter() - self._begin) / (step - self._first) * (self.total - step)
            self._show(line(step, self.total, values, timing, left), final=shown)

    def evaluation(self, step: int, values: dict) -> None:
        self._append("metrics", {"step": step, **{f"eval_{k}": v for k, v in values.items()}})
        self._send(step, "eval", values)
        self.say(f"eval   step {step} | " + " | ".join(_brief(values)) + f" | rows {values['rows']}")

    def samples(self, step: int, answers: list[dict]) -> None:
        for answer in answers:
            self._append("samples", {"step": step, **answer})
            self.say(f"sample step {step} | {brief(answer)}")

    def say(self, text: str) -> None:
        self._show(text, final=True)

    def sync(self) -> None:
        """Put the lines on the disk, before a checkpoint that relies on them."""
        for file in self._files.values():
            os.fsync(file.fileno())
        if self._sinks is not None:
            self._sinks.sync()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind, *_) -> None:
        for file in self._files.values():
            file.close()
        if self._sinks is not None:
            self._sinks.close(failed=kind is not None)

    def _send(self, step: int, prefix: str, values: dict) -> None:
        if self._sinks is not None:
            self._sinks.log(step, {f"{prefix}/{name}": value for name, value in values.items()})

    def _append(self, name: str, values: dict) -> None:
        if name not in self._files:
            self._files[name] = open(self._folder / f"{name}.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        # repr of a float reads back to the same bits; one write per line, so that a kill tears at most the last one.
        self._files[name].write(json.dumps(values) + "\n")
        self._files[name].flush()

    def _show(self, text: str, final: bool) -> None:
        erase = "\r\x1b[K" if self._redrawn else ""
        self.stream.write(erase + text + ("\n" if final else ""))
        self.stream.flush()
        self._redrawn = not final


class NoLog:
    """What ranks other than the first have in place of a RunLog: whatever is called on it does nothing."""

    def __getattr__(self, name: str):
        return lambda *args, **kwargs: None

    def __enter__(self) -> NoLog:
        return self

    def __exit__(self, *_) -> None:
        pass


def line(step: int, total: int, values: dict, timing: dict, seconds_left: float) -> str:
    """One step for people: `step  120/900 | loss 0.6412 | margin 0.211 | acc 0.63 | gnorm 4.12 | lr 9.1e-07 | 312 ms
    | …`"""
    parts = [f"step {step:{len(str(total)) + 1}d}/{total}", *_brief(values)]
    parts += [f"gnorm {values['grad_norm']:.2f}", f"lr {values['learning_rate']:.1e}", f"{timing['ms']:.0f} ms"]
    parts += [f"{timing['tps'] / 1000:.2f}k tok/s" if timing["tps"] >= 1000 else f"{timing['tps']:.0f} tok/s"]
    if timing.get("mfu") is not None:
        parts.append(f"{100 * timing['mfu']:.1f}% mfu")
    parts += [f"{timing['memory/peak_gb']:.1f} GB", f"eta {duration(seconds_left)}"]
    return " | ".join(parts)


def _brief(values: dict) -> list[str]:
    parts = [f"loss {values['loss']:.4f}"]
    if "rewards/margins" in values:
        parts += [f"margin {values['rewards/margins']:.3f}", f"acc {values['rewards/accuracies']:.2f}"]
    if "aux_loss" in values:
        parts.append(f"aux {values['aux_loss']:.3f}")
        parts.append(f"load {values['router/load_min']:.2f}-{values['router/load_max']:.2f}")
    return parts


def peak_memory_gb(device: torch.device) -> float:
    """Highest memory so far in GB (1e9 bytes): of the allocator on CUDA, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9

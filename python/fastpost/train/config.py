# SPDX-License-Identifier: Apache-2.0
"""The configuration: six small dataclasses, one strict YAML file, dotted command-line overrides.

    cfg = load_config("recipe.yaml", ["--optim.lr", "5e-7", "--objective.beta", "2.5"])

A key that does not exist is an error that names the file, the key and the nearest right one; values are checked against
the declared types (`1e-6` is a float although YAML 1.1 calls it a string). Nothing here imports torch, so `--help` is
quick."""

from __future__ import annotations

import ast
import dataclasses
import textwrap
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from fastpost.train.strict import Dumper, Loader, build, convert, names, plain, read_yaml, suggest


@dataclass
class ModelConfig:
    path: str = ""
    """Hugging Face folder of the model to train (config.json, safetensors weights, tokenizer). Required."""
    reference: str = "auto"
    """Where reference log-probs come from: none | start (the model as loaded) | columns (reference_* columns of the
    data) | the path of a second folder. auto = start when the objective needs a reference, none when it does not."""
    attention: str = "packed"
    """packed = fastpost's attention over packed rows. Any other name is handed to transformers (sdpa,
    flash_attention_2) and needs data.share_prompt false."""


@dataclass
class DataConfig:
    train: str = ""
    """Training rows: a .jsonl, .json or .parquet file. Required."""
    eval: str | None = None
    """Held-out rows in the same format; None = no evaluation."""
    columns: dict[str, str] = field(default_factory=dict)
    """Rename columns, ours: theirs, e.g. {prompt: question, completion: answer}."""
    format: Literal["auto", "plain", "chat"] = "auto"
    """How rows of plain strings become text. plain = prompt + completion + EOS as they stand; chat = prompt is a user
    message and completion an assistant message. auto = plain for strings; message lists always use the model's own chat
    template."""
    mask: Literal["reply", "last", "full"] = "reply"
    """Which tokens are trained. reply = every assistant turn (or the completion); last = the last assistant turn only;
    full = every token. The end-of-turn token that closes a trained turn is always trained."""
    max_length: int = 1024
    """Longest sequence (prompt + completion) in tokens."""
    max_prompt_length: int | None = None
    """Longest prompt in tokens; a longer one loses its beginning (BOS is kept). None = no limit of its own."""
    truncation: Literal["completion", "drop"] = "completion"
    """What happens to a row that is too long: completion = the end is cut off; drop = the row is left out. Either way
    it is counted."""
    limit: int | None = None
    """Use only the first so many training rows."""
    eval_limit: int | None = None
    """Use only the first so many held-out rows."""
    shuffle: bool = True
    """Draw a new order each epoch, a pure function of (train.seed, epoch); False = file order."""
    share_prompt: bool = True
    """Compute the prompt of a row with several replies (a pair) once instead of once a reply: the same numbers up to
    rounding, for a quarter to a third fewer tokens on rows like GSM8K's. Only with model.attention packed."""


@dataclass
class ObjectiveConfig:
    name: str = "sft"
    """An objective of fastpost.objectives by its lower-case name: sft, dpo, ipo, simpo, cpo, orpo, kto, ..."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Its hyperparameters. In YAML they stand next to the name; on the command line: --objective.beta 0.1."""


@dataclass
class OptimConfig:
    lr: float = 1e-6
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up: cosine or linear down to min_lr_ratio * lr, or constant."""
    warmup_ratio: float = 0.1
    """Share of all steps over which lr rises linearly from 0."""
    warmup_steps: int | None = None
    """The same as a number of steps; overrides warmup_ratio."""
    min_lr_ratio: float = 0.0
    """Final lr as a share of the peak."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay; biases and norms are left out."""
    max_grad_norm: float | None = 1.0
    """Clip the global gradient norm to this; None = never."""
    precision: Literal["bf16", "fp32", "pure-bf16"] = "bf16"
    """bf16 = float32 master weights, bf16 compute; fp32 = float32 all through; pure-bf16 = bf16 weights with stochastic
    rounding."""


@dataclass
class TrainConfig:
    output_dir: str = ""
    """Run folder. Empty = runs/<name of the YAML file>."""
    seed: int = 0
    """Seeds data order, dropout and sampling."""
    epochs: int = 1
    """Passes over the data."""
    max_steps: int | None = None
    """Stop after so many optimizer steps, whatever epochs says."""
    batch_size: int = 32
    """Rows (pairs, for pair objectives) per optimizer step."""
    max_tokens_per_micro_batch: int = 8192
    """Whole rows are packed into micro-batches up to this many tokens; a longer row stands alone."""
    micro_batch_size: int | None = None
    """Pack exactly this many rows instead of counting tokens."""
    save_every: int = 0
    """Checkpoint each so many steps; 0 = only the final model."""
    keep_latest: int = 2
    """Checkpoints to keep; older ones are deleted after a newer one is complete."""
    eval_every: int = 0
    """Evaluate on data.eval each so many steps; 0 = only before the first and after the last step."""
    resume: Literal["auto", "never"] = "auto"
    """auto = go on from the newest checkpoint of the same run folder; never = a used folder is an error."""
    gradient_checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    """What the backward pass recomputes to save memory. selective = all but matrix products and attention: half the
    activations for about 5 % more time; full = each layer from its input: a tenth of them for 15 to 30 %. auto =
    selective on a CPU, none on a GPU."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """How several ranks (torchrun) hold the model. ddp = a copy each; fsdp = a part each, gathered layer by layer. auto
    = ddp where a copy takes up to 16 GB (1e9 trained weights), else fsdp."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = cuda when torch finds one."""
    threads: int | None = None
    """CPU threads for torch and the core; None = torch's choice."""


@dataclass
class LogConfig:
    every: int = 1
    """Print a line each so many steps (metrics.jsonl gets every step)."""
    plot: bool = True
    """Draw loss.png at the end."""


@dataclass
class Config:
    """Everything a run depends on. `run/config.yaml` is this, fully resolved; training on it repeats the run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    log: LogConfig = field(default_factory=LogConfig)


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a recipe and apply overrides (`["--optim.lr", "5e-7"]`). Raises ValueError that names file, key and
    remedy."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such recipe. `fastpost recipes ls` lists those that come with fastpost.")
    cfg = from_dict(read_yaml(path, names(Config)), where=str(path))
    _apply(cfg, list(overrides))
    cfg.train.output_dir = cfg.train.output_dir or f"runs/{path.stem}"
    _check(cfg, str(path))
    return cfg


def from_dict(tree: dict, where: str = "config") -> Config:
    """Build a Config from nested dicts, strictly. `where` is named in errors."""
    tree = dict(tree)
    objective = tree.get("objective")
    if isinstance(objective, dict) and "fields" not in objective:
        # In a file the hyperparameters stand beside the name; fastpost.objectives checks them against the objective's
        # own fields.
        tree["objective"] = {"fields": {k: v for k, v in objective.items() if k != "name"}}
        if "name" in objective:
            tree["objective"]["name"] = objective["name"]
    return build(Config, tree, "", where)


def to_dict(cfg: Config) -> dict:
    """Plain nested dict, the inverse of `from_dict`."""
    tree = dataclasses.asdict(cfg)
    tree["objective"] = {"name": cfg.objective.name, **cfg.objective.fields}
    tree["optim"]["betas"] = list(cfg.optim.betas)
    return tree


def dump(cfg: Config) -> str:
    """The resolved configuration as YAML; `load_config` reads it back to an equal Config."""
    return yaml.dump(to_dict(cfg), Dumper=Dumper, sort_keys=False, width=120)


# ---- command line ----------------------------------------------------------------------------------------------------


def _apply(cfg: Config, args: list[str]) -> None:
    """Apply `--group.key value` (or `--group.key=value`) in place; values are read as YAML, then typed like the
    file's."""
    position = 0
    while position < len(args):
        flag, equals, text = args[position].partition("=")
        if not flag.startswith("--"):
            raise ValueError(f"command line: expected --group.key, got {flag!r}.")
        if not equals:
            position += 1
            if position == len(args):
                raise ValueError(f"command line: {flag} has no value. Write {flag} VALUE.")
            text = args[position]
        position += 1
        _set(cfg, flag[2:].replace("-", "_"), text, flag)


def _set(cfg: Config, name: str, text: str, flag: str) -> None:
    group, _, key = name.partition(".")
    if group not in names(Config) or not key:
        near = next((n for n in field_names() if n.endswith(f".{group}")), None)  # --lr
        hint = f" Did you mean '--{near}'?" if near and not key else suggest(name, field_names())
        raise ValueError(f"command line: unknown option {flag}.{hint}")
    section = getattr(cfg, group)
    if group == "objective" and key != "name":
        cfg.objective.fields[key] = plain(yaml.load(text, Loader=Loader))
        return
    hints = typing.get_type_hints(type(section))
    if key not in hints:
        raise ValueError(f"command line: unknown option {flag}.{suggest(name, field_names())}")
    # A plain string is taken as typed: `--model.path 007` or `--train.output_dir yes` need no quotes inside quotes.
    value = text if hints[key] is str else yaml.load(text, Loader=Loader)
    setattr(section, key, convert(value, hints[key], f"--{name}", "command line"))


def help_text() -> str:
    """Every field with its default and its docstring, for `--help`. Read from this file, so it cannot go stale."""
    defaults, lines = to_dict(Config()), []
    groups = {cls.__name__: group for group, cls in typing.get_type_hints(Config).items()}
    for cls in ast.parse(Path(__file__).read_text(encoding="utf-8")).body:
        group = groups.get(getattr(cls, "name", ""))
        for entry, doc in zip(cls.body, cls.body[1:]) if group else ():
            if isinstance(entry, ast.AnnAssign) and isinstance(doc, ast.Expr):
                key = entry.target.id
                text = textwrap.fill(" ".join(doc.value.value.split()), 100).replace("\n", "\n      ")
                if (group, key) == ("objective", "fields"):
                    lines.append(f"  --objective.FIELD\n      {text}")
                else:
                    lines.append(f"  --{group}.{key} [{_spell(defaults[group][key])}]\n      {text}")
    return "\n".join(lines)


def _spell(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value) or "''"


def field_names() -> list[str]:
    """Every dotted field name, in order."""
    groups = typing.get_type_hints(Config)
    return [f"{g}.{n}" for g, cls in groups.items() for n in names(cls) if (g, n) != ("objective", "fields")]


# ---- checks that need more than one field ----------------------------------------------------------------------------


def _check(cfg: Config, where: str) -> None:
    for name in ("model.path", "data.train"):
        group, key = name.split(".")
        if not getattr(getattr(cfg, group), key):
            raise ValueError(f"{where}: {name}: expected a path, got nothing. Set it there or pass --{name} PATH.")
    at_least = {
        "data.max_length": 2, "data.max_prompt_length": 1, "data.limit": 1, "data.eval_limit": 1, "train.epochs": 1,
        "train.max_steps": 1, "train.batch_size": 1, "train.max_tokens_per_micro_batch": 1, "train.micro_batch_size": 1,
        "train.save_every": 0, "train.keep_latest": 1, "train.eval_every": 0, "train.threads": 1, "log.every": 1,
        "optim.lr": 0, "optim.warmup_ratio": 0, "optim.warmup_steps": 0, "optim.min_lr_ratio": 0, "optim.eps": 0,
        "optim.weight_decay": 0, "optim.max_grad_norm": 0,
    }  # fmt: skip
    for name, least in at_least.items():
        group, key = name.split(".")
        value = getattr(getattr(cfg, group), key)
        if value is not None and not value >= least:  # written so that NaN fails too
            raise ValueError(f"{where}: {name}: expected at least {least}, got {value}.")
    if cfg.optim.warmup_ratio > 1:
        raise ValueError(f"{where}: optim.warmup_ratio: expected a share from 0 to 1, got {cfg.optim.warmup_ratio}.")
    if cfg.data.max_prompt_length is not None and cfg.data.max_prompt_length >= cfg.data.max_length:
        raise ValueError(
            f"{where}: data.max_prompt_length: expected less than data.max_length ({cfg.data.max_length}), "
            f"got {cfg.data.max_prompt_length}. A prompt that fills the row leaves nothing to train."
        )
    if cfg.data.share_prompt and cfg.model.attention != "packed":
        raise ValueError(
            f"{where}: data.share_prompt: attention '{cfg.model.attention}' cannot share the prompt of a pair. Set "
            "data.share_prompt to false, or model.attention to packed."
        )

# SPDX-License-Identifier: Apache-2.0
"""The configuration: six small dataclasses, one strict YAML file, dotted command-line overrides.

    cfg = load_config("recipe.yaml", ["--optim.lr", "5e-7", "--objective.beta", "2.5"])

A key that does not exist is an error that names the file, the key and the nearest right one; values are checked against the
declared types (`1e-6` is a float although YAML 1.1 calls it a string). Nothing here imports torch, so `--help` is quick.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union

import yaml


@dataclass
class ModelConfig:
    path: str = ""
    """Hugging Face folder of the model to train (config.json, safetensors weights, tokenizer). Required."""
    reference: str = "auto"
    """Where reference log-probs come from: none | start (the model as loaded) | columns (reference_* columns of the data) |
    the path of a second folder. auto = start when the objective needs a reference, none when it does not."""
    attention: str = "packed"
    """packed = fastpost's attention over packed rows. Any other name is handed to transformers (sdpa, flash_attention_2)."""


@dataclass
class DataConfig:
    train: str = ""
    """Training rows: a .jsonl, .json or .parquet file. Required."""
    eval: str | None = None
    """Held-out rows in the same format; None = no evaluation."""
    columns: dict[str, str] = field(default_factory=dict)
    """Rename columns, ours: theirs, e.g. {prompt: question, completion: answer}."""
    format: Literal["auto", "plain", "chat"] = "auto"
    """How rows of plain strings become text. plain = prompt + completion + EOS as they stand; chat = prompt is a user message
    and completion an assistant message. auto = plain for strings; message lists always use the model's own chat template."""
    mask: Literal["reply", "last", "full"] = "reply"
    """Which tokens are trained. reply = every assistant turn (or the completion); last = the last assistant turn only; full =
    every token. The end-of-turn token that closes a trained turn is always trained."""
    max_length: int = 1024
    """Longest sequence (prompt + completion) in tokens."""
    max_prompt_length: int | None = None
    """Longest prompt in tokens; a longer one loses its beginning (BOS is kept). None = no limit of its own."""
    truncation: Literal["completion", "drop"] = "completion"
    """What happens to a row that is too long: completion = the end is cut off; drop = the row is left out. Either way it is counted."""
    limit: int | None = None
    """Use only the first so many training rows."""
    eval_limit: int | None = None
    """Use only the first so many held-out rows."""
    shuffle: bool = True
    """Draw a new order each epoch, a pure function of (train.seed, epoch); False = file order."""


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
    """bf16 = float32 master weights, bf16 compute; fp32 = float32 all through; pure-bf16 = bf16 weights with stochastic rounding."""


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
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
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
    """Read a recipe and apply overrides (`["--optim.lr", "5e-7"]`). Raises ValueError that names file, key and remedy."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such recipe. `fastpost recipes ls` lists those that come with fastpost.")
    cfg = from_dict(_read_yaml(path), where=str(path))
    _apply(cfg, list(overrides))
    cfg.train.output_dir = cfg.train.output_dir or f"runs/{path.stem}"
    _check(cfg, str(path))
    return cfg


def from_dict(tree: dict, where: str = "config") -> Config:
    """Build a Config from nested dicts, strictly. `where` is named in errors."""
    tree = dict(tree)
    objective = tree.get("objective")
    if isinstance(objective, dict) and "fields" not in objective:
        # In a file the hyperparameters stand beside the name; fastpost.objectives checks them against the objective's own fields.
        tree["objective"] = {"fields": {k: v for k, v in objective.items() if k != "name"}}
        if "name" in objective:
            tree["objective"]["name"] = objective["name"]
    return _build(Config, tree, "", where)


def to_dict(cfg: Config) -> dict:
    """Plain nested dict, the inverse of `from_dict`."""
    tree = dataclasses.asdict(cfg)
    tree["objective"] = {"name": cfg.objective.name, **cfg.objective.fields}
    tree["optim"]["betas"] = list(cfg.optim.betas)
    return tree


def dump(cfg: Config) -> str:
    """The resolved configuration as YAML; `load_config` reads it back to an equal Config."""
    return yaml.dump(to_dict(cfg), Dumper=_Dumper, sort_keys=False, width=120)


# ---- reading -------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice: plain YAML would keep the last one without a word."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ValueError(f"line {key_node.start_mark.line + 1}: key '{key}' is written twice. Keep one.")
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that writes 1e-06 as 1.0e-06, which every YAML reader takes for a float."""


def _represent_float(dumper: yaml.SafeDumper, value: float):
    text = repr(value)
    if "e" in text and "." not in text:
        text = text.replace("e", ".0e")
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_Dumper.add_representer(float, _represent_float)


def _read_yaml(path: Path) -> dict:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: expected groups ({', '.join(_names(Config))}), got {_kind(tree)}.")
    return tree


def _build(cls: type, tree: dict, prefix: str, where: str):
    """An instance of dataclass `cls` from `tree`, with every key and type checked."""
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if key not in hints:
            raise ValueError(f"{where}: unknown key '{name}'.{suggest(str(key), _names(cls))}")
        if dataclasses.is_dataclass(hints[key]):
            if value is None:  # "optim:" with every line below it commented out
                value = {}
            if not isinstance(value, dict):
                raise ValueError(f"{where}: {name}: expected a group of keys, got {_kind(value)}.")
            values[key] = _build(hints[key], value, f"{name}.", where)
        else:
            values[key] = _convert(value, hints[key], name, where)
    return cls(**values)


def _convert(value: Any, kind: Any, name: str, where: str) -> Any:
    """`value` as the declared type `kind`; a number may be written as a string (PyYAML reads 1e-6 as one)."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None or value in ("none", "None"):  # YAML's own word is null, but Python's is what people type
            return None
        return _convert(value, next(a for a in args if a is not type(None)), name, where)
    if kind is Any:
        return plain(value)
    if origin is Literal:
        if value in args:
            return value
        raise ValueError(f"{where}: {name}: expected one of {', '.join(args)}; got {value!r}.{suggest(str(value), args)}")
    if origin is dict:
        if isinstance(value, dict):
            return {_convert(k, args[0], name, where): _convert(v, args[1], f"{name}.{k}", where) for k, v in value.items()}
    elif origin is tuple:
        if isinstance(value, (list, tuple)) and len(value) == len(args):
            return tuple(_convert(v, a, f"{name}[{i}]", where) for i, (v, a) in enumerate(zip(value, args, strict=True)))
    elif kind is float:
        value = plain(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif kind is int:
        value = plain(value)
        if isinstance(value, float) and value.is_integer():  # 1e4 steps
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif isinstance(value, kind):  # str and bool as they are
        return value
    raise ValueError(f"{where}: {name}: expected {_type_name(kind)}, got {_kind(value)} {value!r}.")


def plain(value: Any) -> Any:
    """A string that spells a number becomes that number; everything else stays."""
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                pass
    return value


def suggest(word: str, choices) -> str:
    """' Did you mean ...?' for the nearest choice, or ' Known: ...' when none is near."""
    choices = sorted(choices)
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else f" Known: {', '.join(choices)}."


# ---- command line --------------------------------------------------------------------------------------------------------


def _apply(cfg: Config, args: list[str]) -> None:
    """Apply `--group.key value` (or `--group.key=value`) in place; values are read as YAML, then typed like the file's."""
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
    if group not in _names(Config) or not key:
        known = [f"--{n}" for n in field_names()]
        raise ValueError(f"command line: unknown option {flag}.{suggest(flag, known) if key else ' Write --group.key VALUE.'}")
    section = getattr(cfg, group)
    if group == "objective" and key != "name":
        cfg.objective.fields[key] = plain(yaml.load(text, Loader=_Loader))
        return
    hints = typing.get_type_hints(type(section))
    if key not in hints:
        raise ValueError(f"command line: unknown option {flag}.{suggest(name, field_names())}")
    # A plain string is taken as typed: `--model.path 007` or `--train.output_dir yes` need no quotes inside quotes.
    value = text if hints[key] is str else yaml.load(text, Loader=_Loader)
    setattr(section, key, _convert(value, hints[key], f"--{name}", "command line"))


def field_names() -> list[str]:
    """Every dotted field name, in order."""
    groups = typing.get_type_hints(Config)
    return [f"{g}.{n}" for g, cls in groups.items() for n in _names(cls) if (g, n) != ("objective", "fields")]


# ---- checks that need more than one field --------------------------------------------------------------------------------


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


def _names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _kind(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", str: "a string", bool: "a truth value", type(None): "nothing (null)"}
    return names.get(type(value), f"a number ({type(value).__name__})")


def _type_name(kind: Any) -> str:
    names = {float: "a number", int: "a whole number", str: "a string", bool: "true or false", dict: "a mapping"}
    if typing.get_origin(kind) is tuple:
        return f"a list of {len(typing.get_args(kind))} numbers"
    return names.get(typing.get_origin(kind) or kind, str(kind))

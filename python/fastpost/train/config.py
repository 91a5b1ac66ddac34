# SPDX-License-Identifier: Apache-2.0
"""The configuration: six small dataclasses, one strict YAML file, dotted command-line overrides.

    cfg = load_config("recipe.yaml", ["--optim.lr", "5e-7", "--objective.beta", "2.5"])

A key that does not exist is an error that names the file, the key and the nearest right one; values are checked against
the declared types (`1e-6` is a float although YAML 1.1 calls it a string). Nothing here imports torch, so `--help` is
quick."""

from __future__ import annotations

import ast
import dataclasses
import functools
import textwrap
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from fastpost.train import schedule
from fastpost.train.sources import Source, check_sources
from fastpost.train.strict import Dumper, Loader, build, convert, names, plain, read_yaml, suggest


@dataclass
class LoraConfig:
    rank: int = 0
    """Train a new LoRA adapter of this rank instead of the weights themselves; 0 = no new adapter."""
    alpha: float = 16.0
    """The adapter's output is scaled by alpha / rank."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead, which keeps large ranks learning (rsLoRA)."""
    dropout: float = 0.0
    """Dropout on the adapter's input while training."""
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    """Linear layers that get an adapter, by the end of their names, e.g. [q_proj, v_proj]; all-linear = all but the
    head."""
    train_embeddings: bool = False
    """Also train the input embeddings whole; they are saved with the adapter."""
    train_head: bool = False
    """Also train the output head whole; it is saved with the adapter."""
    connections: bool = False
    """IR-QLoRA's connections around A and B: means of neighbouring inputs are added to A's output, and this, repeated,
    to B's, each times a trained number that begins at 0. peft alone does not load such an adapter: merge it."""


@dataclass
class QuantizeConfig:
    scheme: Literal["none", "nf4", "symmetric", "asymmetric"] = "none"
    """Hold the base model's linear layers but the head in four bits while an adapter is trained upon them: nf4 =
    QLoRA's quantiles; symmetric and asymmetric = equal steps. A folder that is in four bits already needs none."""
    group_size: int = 64
    """Columns that share a scale: 32, 64, 128, or -1 for a scale a row."""
    double_quant: bool = False
    """nf4: the scales in eight bits, which saves 0.37 bits a weight in groups of 64."""
    shift: bool = False
    """nf4: shift each group so that its codes carry most information (IR-QLoRA)."""


@dataclass
class ModelConfig:
    path: str = ""
    """The model to train: a Hugging Face folder (config.json, safetensors weights, tokenizer), an adapter folder of
    peft (its base model with the adapter, which goes on training) or the folder of an earlier run. Required."""
    from_scratch: bool = False
    """Start from random weights, by transformers' own initialisation with train.seed, instead of trained ones;
    model.path is then a folder with config.json and tokenizer but no weights. The result is float32 (bf16 with
    precision pure-bf16)."""
    adapter: str = ""
    """An adapter folder to go on training upon model.path, when its adapter_config.json does not name the base model's
    folder."""
    reference: str = "auto"
    """Where reference log-probs come from: none | start (the model as loaded, its adapter included) | base (model.path
    without any adapter) | columns (reference_* columns of the data) | previous (the same as model.previous) | the path
    of another model, adapter or run. auto = start when the objective needs a reference, none when it does not."""
    previous: str = "columns"
    """Where log-probs of the policy that wrote the replies come from, for objectives that need them (inpo, rebel,
    refuel): columns (previous_* columns of the data) | start | base | the path of another model, adapter or run."""
    temperature: float = 1.0
    """Logits are divided by this before every log-prob, those of references too. REBEL and REFUEL use the temperature
    at which the replies were sampled; stored columns must have been made with it."""
    attention: str = "packed"
    """packed = fastpost's attention over packed rows. Any other name is handed to transformers (sdpa,
    flash_attention_2) and needs data.share_prompt false."""
    router_aux_loss: float | None = None
    """Weight of the load-balancing loss of a mixture of experts, which is part of `loss` and logged as aux_loss. None =
    the model's own (router_aux_loss_coef in its config.json); 0 = off."""
    router_z_loss: float = 0.0
    """Weight of the routers' z loss, the mean of logsumexp(logits)^2, which keeps their logits small; logged as z_loss.
    JetMoE trains with 0.001."""
    router_loss: Literal["transformers", "jetmoe"] = "transformers"
    """Over what the two are taken. transformers = means over all layers together; a balanced top k router has k. jetmoe
    = summed over the routers of attention and MLPs in all layers; each has 1 when balanced."""
    train: list[str] = field(default_factory=list)
    """Train only what one of these matches; [] = everything. last:4 and first:5 are so many of the layers; anything
    else is a regular expression over parameter names, e.g. [last:4, lm_head]."""
    freeze: list[str] = field(default_factory=list)
    """Leave out of training what one of these matches, in the same words."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters by peft; the run's result is then adapter/, a peft folder."""
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    """The base model in four bits under an adapter (QLoRA)."""


@dataclass
class DataConfig:
    train: str | list[Source] = ""
    """Training rows: a .jsonl, .json or .parquet file, or a list of sources with their shares of the tokens: [{path:
    a.jsonl, ratio: 4}, {path: b.jsonl, ratio: 1, repeat: true}]. A source may also set shuffle, columns, format, mask,
    pack and limit for itself. Required."""
    eval: str | None = None
    """Held-out rows in the same format; None = no evaluation."""
    columns: dict[str, str] = field(default_factory=dict)
    """Rename columns, ours: theirs, e.g. {prompt: question, completion: answer}."""
    format: Literal["auto", "plain", "chat"] = "auto"
    """How rows of plain strings become text. plain = prompt + completion + EOS as they stand; chat = prompt is a user
    message and completion an assistant message. auto = plain for strings; message lists always use the model's own chat
    template."""
    mask: Literal["reply", "last", "turn", "full"] = "reply"
    """Which tokens are trained. reply = every assistant turn (or the completion); last = the last assistant turn only;
    turn = the one that the column `turn` names, counted from 0 (without it: where chosen and rejected part, or the
    last), as REFUEL wants it; full = every token. The end-of-turn token of a trained turn is always trained."""
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
    pack: Literal["rows", "blocks", "unmasked-blocks"] = "rows"
    """How raw text (column text) fills a sequence. rows = a document is a row, cut at max_length; blocks = documents,
    each closed by EOS, are joined and cut into blocks of exactly max_length, and do not see each other within one;
    unmasked-blocks = they do, as in much pre-training. Batch sizes then count blocks."""
    min_length: int = 0
    """Rows (documents) of fewer tokens are left out and counted."""
    epoch_tokens: int | list[int] | None = None
    """Tokens of one epoch, shared out by the sources' ratios. None = as many as there are before a source that may not
    repeat runs out (all, when there is one source). A list has a number for each epoch, the last of which holds from
    there on: with ratios in lists, too, an epoch is a stage of the training."""
    draw: Literal["dynamic", "fixed"] = "dynamic"
    """Which rows an epoch takes of a source that has more than its share. dynamic = drawn anew each epoch; fixed = the
    same ones every epoch."""
    mismatched: bool = True
    """KTO: also score each prompt with another row's reply, without a gradient; the mean of log p - reference over a
    step is the divergence that the loss subtracts. False = 0, for two thirds of the time (TRL's apo_zero_unpaired)."""
    cache: str | None = "auto"
    """Folder for tokenised data and for log-probs of references, each found again by a hash of all it depends on.
    auto = fastpost in $XDG_CACHE_HOME or ~/.cache; None = make them each time."""
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
class GroupConfig:
    """What differs for the parameters of one entry of optim.groups."""

    lr_ratio: float = 1.0
    """Their lr as a share of the schedule's."""
    weight_decay: float | None = None
    """Their weight decay; None = optim.weight_decay. Norms and biases get none either way."""


@dataclass
class OptimConfig:
    name: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit keeps the moments of all but embeddings in 8 bits: 6 bytes a trained weight less. Needs bitsandbytes:
    pip install 'fastpost[adamw8bit]'."""
    lr: float = 1e-6
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant", "wsd", "step"] = "cosine"
    """Shape after the warm-up: cosine or linear down to min_lr_ratio * lr; constant; wsd = constant until stable_ratio
    of all steps, then `decay`; step = times step_decay's gamma each so many steps."""
    warmup_ratio: float = 0.1
    """Share of all steps over which lr rises linearly from 0."""
    warmup_steps: int | None = None
    """The same as a number of steps; overrides warmup_ratio."""
    warmup_from: float = 0.0
    """Where the warm-up begins, as a share of the peak."""
    min_lr_ratio: float = 0.0
    """Final lr as a share of the peak; with wsd and step it goes no lower."""
    stable_ratio: float = 0.9
    """wsd: share of all steps, warm-up included, before the decay begins; 1 = it never does."""
    decay: Literal["linear", "cosine", "sqrt", "exponential"] = "linear"
    """wsd: shape of the decay. sqrt = 1 - sqrt(progress); exponential = min_lr_ratio ** progress."""
    step_decay: tuple[int, float] | None = None
    """step: [every, gamma], e.g. [6212, 0.85]."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay; biases and norms are left out."""
    groups: dict[str, GroupConfig] = field(default_factory=dict)
    """Other rates for some parameters, {pattern: {lr_ratio, weight_decay}} with patterns as in model.train and the
    first match counting, e.g. {embed_tokens|lm_head: {lr_ratio: 0.1, weight_decay: 0}}."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights (e.g. 0.999), evaluated as eval_ema/* and written to
    model-ema; None = none."""
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
    selective on a CPU, none on a GPU and for models that transformers cannot recompute."""
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
    to: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    """Log to these, too, each a package of its own: tensorboard (into the run folder), wandb (offline unless you are
    logged in), trackio."""
    project: str = "fastpost"
    """Project of the run in wandb and trackio."""
    samples: int | list[str] = 0
    """Answers to watch while training, into samples.jsonl: to so many held-out prompts, or to these user messages."""
    sample_every: int = 0
    """Sample each so many steps; 0 = whenever data.eval is evaluated. Always before the first and after the last
    step."""
    sample_tokens: int = 64
    """Longest sampled answer in tokens."""


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
    if str(path).startswith("--"):
        raise ValueError(f"command line: expected a recipe first, got {path}. Write RECIPE {path} ...")
    if path.is_dir():
        raise ValueError(f"{path}: expected a recipe, got a folder. Give a YAML file; a run's is {path}/config.yaml.")
    if not path.is_file():
        raise ValueError(
            f"{path}: no such recipe. Expected a YAML file, got no file of that name. `fastpost recipes ls` lists "
            "those that come with fastpost."
        )
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
    for key in ("betas", "step_decay"):
        value = getattr(cfg.optim, key)
        tree["optim"][key] = None if value is None else list(value)
    if isinstance(cfg.data.train, list):
        tree["data"]["train"] = [{k: v for k, v in s.items() if v is not None} for s in tree["data"]["train"]]
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
            raise ValueError(
                f"command line: expected --group.key, got {flag!r}. Write --{flag} VALUE, or --help for the names."
            )
        if not equals:
            position += 1
            if position == len(args):
                raise ValueError(f"command line: {flag}: expected a value, got nothing. Write {flag} VALUE.")
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
        cfg.objective.fields[key] = plain(_yaml(text, flag))
        return
    hints = typing.get_type_hints(type(section))
    inner, _, rest = key.partition(".")
    if rest and dataclasses.is_dataclass(hints.get(inner)):  # a group inside a group: --model.lora.rank
        section, key = getattr(section, inner), rest
        hints = typing.get_type_hints(type(section))
    if key not in hints or dataclasses.is_dataclass(hints[key]):
        raise ValueError(f"command line: unknown option {flag}.{suggest(name, field_names())}")
    # A plain string is taken as typed: `--model.path 007` or `--train.output_dir yes` need no quotes inside quotes.
    literal = hints[key] is str or (name == "data.train" and not text.lstrip().startswith("["))
    value = text if literal else _yaml(text, flag)
    setattr(section, key, convert(value, hints[key], f"--{name}", "command line"))


def _yaml(text: str, flag: str) -> Any:
    try:
        return yaml.load(text, Loader=Loader)
    except (yaml.YAMLError, ValueError):
        if not text.lstrip().startswith(("[", "{")):  # a sentence with a colon, say: it is what it looks like
            return text
        raise ValueError(
            f"command line: {flag}: expected a YAML list or mapping, got {text!r}. Put quotes around its strings, "
            """as in '["What is 2 + 2?"]'."""
        ) from None


def help_text() -> str:
    """Every field with its default and its docstring, for `--help`. Read from this file, so it cannot go stale."""
    defaults, lines = to_dict(Config()), []
    groups = {cls.__name__: group for group, cls in _groups()}
    for cls in ast.parse(Path(__file__).read_text(encoding="utf-8")).body:
        group = groups.get(getattr(cls, "name", ""))
        for entry, doc in zip(cls.body, cls.body[1:]) if group else ():
            if isinstance(entry, ast.AnnAssign) and isinstance(doc, ast.Expr):
                key = entry.target.id
                if f"{group}.{key}" in groups.values():
                    continue
                text = textwrap.fill(" ".join(doc.value.value.split()), 100).replace("\n", "\n      ")
                if (group, key) == ("objective", "fields"):
                    lines.append(f"  --objective.FIELD\n      {text}")
                else:
                    value = functools.reduce(dict.get, [*group.split("."), key], defaults)
                    lines.append(f"  --{group}.{key} [{_spell(value)}]\n      {text}")
    return "\n".join(lines)


def _spell(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value) or "''"


def field_names() -> list[str]:
    """Every dotted field name, in order."""
    groups = _groups()
    left_out = {"objective.fields", *(group for group, _ in groups)}
    return [name for group, cls in groups for n in names(cls) if (name := f"{group}.{n}") not in left_out]


def _groups() -> list[tuple[str, type]]:
    """("model", ModelConfig), ("model.lora", LoraConfig), ("data", DataConfig), ..."""
    found = []
    for group, cls in typing.get_type_hints(Config).items():
        inner = [(f"{group}.{n}", c) for n, c in typing.get_type_hints(cls).items() if dataclasses.is_dataclass(c)]
        found += [(group, cls), *inner]
    return found


# ---- checks that need more than one field ----------------------------------------------------------------------------


def _check(cfg: Config, where: str) -> None:
    for name in ("model.path", "data.train"):
        group, key = name.split(".")
        if not getattr(getattr(cfg, group), key):
            raise ValueError(f"{where}: {name}: expected a path, got nothing. Set it there or pass --{name} PATH.")
    if isinstance(cfg.data.train, list):
        check_sources(cfg.data, where)
    at_least = {
        "model.router_aux_loss": 0, "model.router_z_loss": 0, "data.min_length": 0, "data.epoch_tokens": 1,
        "data.max_length": 2, "data.max_prompt_length": 1, "data.limit": 1, "data.eval_limit": 1, "train.epochs": 1,
        "train.max_steps": 1, "train.batch_size": 1, "train.max_tokens_per_micro_batch": 1, "train.micro_batch_size": 1,
        "train.save_every": 0, "train.keep_latest": 1, "train.eval_every": 0, "train.threads": 1, "log.every": 1,
        "log.sample_every": 0, "log.sample_tokens": 1,
        "optim.lr": 0, "optim.warmup_ratio": 0, "optim.warmup_steps": 0, "optim.warmup_from": 0,
        "optim.min_lr_ratio": 0, "optim.stable_ratio": 0, "optim.eps": 0, "optim.weight_decay": 0,
        "optim.max_grad_norm": 0,
    }  # fmt: skip
    for name, least in at_least.items():
        group, key = name.split(".")
        value = getattr(getattr(cfg, group), key)
        values = value if isinstance(value, list) else [value]
        if value is not None and (not values or not all(v >= least for v in values)):  # written so that NaN fails too
            raise ValueError(f"{where}: {name}: expected at least {least}, got {value}. Set it to that or more.")
    for key in ("warmup_ratio", "warmup_from", "min_lr_ratio", "stable_ratio"):
        value = getattr(cfg.optim, key)
        if value > 1:
            hint = (
                "For a number of steps there is optim.warmup_steps." if key == "warmup_ratio" else "Write 0.1 for 10 %."
            )
            raise ValueError(f"{where}: optim.{key}: expected a share from 0 to 1, got {value}. {hint}")
    schedule.check(cfg.optim, where)
    for pattern, group in cfg.optim.groups.items():
        for key in ("lr_ratio", "weight_decay"):
            value = getattr(group, key)
            if value is not None and not value >= 0:
                raise ValueError(
                    f"{where}: optim.groups.{pattern}.{key}: expected at least 0, got {value}. Set it to that or more."
                )
    if cfg.optim.ema is not None and not 0 < cfg.optim.ema < 1:
        raise ValueError(
            f"{where}: optim.ema: expected a decay between 0 and 1, got {cfg.optim.ema}. Write e.g. 0.999, or none."
        )
    if cfg.data.max_prompt_length is not None and cfg.data.max_prompt_length >= cfg.data.max_length:
        raise ValueError(
            f"{where}: data.max_prompt_length: expected less than data.max_length ({cfg.data.max_length}), "
            f"got {cfg.data.max_prompt_length}. A prompt that fills the row leaves nothing to train. Lower "
            "it, or raise data.max_length."
        )
    if not cfg.model.temperature > 0:
        raise ValueError(f"{where}: model.temperature: expected a number above 0, got {cfg.model.temperature}.")
    if cfg.model.lora.rank < 0:
        raise ValueError(f"{where}: model.lora.rank: expected at least 0, got {cfg.model.lora.rank}.")
    if not 0 <= cfg.model.lora.dropout < 1:
        raise ValueError(f"{where}: model.lora.dropout: expected at least 0 and below 1, got {cfg.model.lora.dropout}.")
    for name in ("train_embeddings", "train_head"):
        if getattr(cfg.model.lora, name) and cfg.model.lora.rank == 0:
            raise ValueError(
                f"{where}: model.lora.{name}: expected false without a new adapter, got true. Set model.lora.rank; "
                "without LoRA all weights are trained anyway."
            )
    if cfg.model.lora.connections and cfg.model.lora.rank == 0:
        raise ValueError(f"{where}: model.lora.connections: expected false without a new adapter, got true. Set "
                         "model.lora.rank.")  # fmt: skip
    _check_quantize(cfg.model.quantize, where)
    if cfg.model.from_scratch:
        m = cfg.model
        parts = {"adapter": m.adapter, "lora.rank": m.lora.rank, "train": m.train, "freeze": m.freeze}
        for name, value in {**parts, "quantize.scheme": m.quantize.scheme}.items():
            if value and value != "none":
                raise ValueError(
                    f"{where}: model.{name}: expected nothing with model.from_scratch, which trains every weight of a "
                    f"new model, got {value}. Leave one of them out."
                )
    if cfg.data.share_prompt and cfg.model.attention != "packed":
        raise ValueError(
            f"{where}: data.share_prompt: expected false with attention '{cfg.model.attention}', which cannot share "
            "the prompt of a pair, got true. Set data.share_prompt to false, or model.attention to packed."
        )
    if isinstance(cfg.log.samples, int) and (cfg.log.samples < 0 or (cfg.log.samples and not cfg.data.eval)):
        what = "a number of prompts from data.eval, which is not set" if cfg.log.samples > 0 else "at least 0"
        raise ValueError(f"{where}: log.samples: expected {what}, got {cfg.log.samples}. Set data.eval, or give a list "
                         "of user messages to answer.")  # fmt: skip


def _check_quantize(quantize: QuantizeConfig, where: str) -> None:
    size = quantize.group_size
    if size != -1 and (size < 1 or size % 32):
        raise ValueError(
            f"{where}: model.quantize.group_size: expected 32, 64, 128 or -1 (one scale a row), got {size}."
        )
    for name in ("double_quant", "shift"):
        if getattr(quantize, name) and quantize.scheme != "nf4":
            raise ValueError(
                f"{where}: model.quantize.{name}: expected false with the scheme {quantize.scheme}, got true. Set "
                "model.quantize.scheme to nf4, or leave it out."
            )

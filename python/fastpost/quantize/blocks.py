# SPDX-License-Identifier: Apache-2.0
"""A model whose decoder blocks are in memory one at a time, and what goes into the linear layers of a block."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fastpost.hf import folder
from fastpost.hf.model import head
from fastpost.ops.linear_logprob import linear_logprob

from .moments import Moments

Hidden = list[torch.Tensor]
"""The hidden states [1, L, D] float32 of each row of a calibration or evaluation set, on the CPU."""


class Stored:
    """The tensors of a Hugging Face folder by name, read when asked for."""

    def __init__(self, path: Path):
        self.path, self._file, self.entries = path, {}, {}
        for file in folder.weight_files(path):
            for key, entry in folder.header(file).items():
                self._file[key], self.entries[key] = file, entry

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    def get(self, key: str) -> torch.Tensor:
        with safe_open(self._file[key], "pt") as opened:
            return opened.get_tensor(key)


class Blocks:
    """A causal LM of transformers: embedding, decoder blocks and head, each made when it is asked for.

    Everything is computed in float32, whatever the folder holds. Rows are sent through one at a time, so a result does
    not depend on how rows are put together.

    Raises:
        ValueError: no such folder, already quantised, an adapter, blocks that are not found or not made of nn.Linear.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu"):
        place = folder.locate(path)
        if place.adapter is not None:
            raise ValueError(
                f"{path}: expected a model, got an adapter. Merge it first: fastpost export RUN OUT --merge."
            )
        self.path, self.device, self.stored = place.base, torch.device(device), Stored(place.base)
        self.config = AutoConfig.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)
        self.model = _skeleton(self.config)
        self.model.requires_grad_(False)
        self.inner = self.model.base_model
        self.kind = type(self.model).__name__
        layers = getattr(self.inner, "layers", None)
        if not isinstance(layers, nn.ModuleList) or not len(layers) or not hasattr(self.inner, "norm"):
            raise ValueError(f"{path}: {self.kind}: expected decoder blocks in model.layers and a norm after them.")
        self.layers = list(layers)
        self.prefix = next(name for name, m in self.model.named_modules() if m is layers) + "."
        self._calls: list[tuple[tuple, dict]] = []
        for i, layer in enumerate(self.layers):
            for name, tensor in layer.state_dict().items():
                entry = self.stored.entries.get(f"{self.prefix}{i}.{name}")
                if entry is None or entry["shape"] != list(tensor.shape):
                    got = "none" if entry is None else entry["shape"]
                    raise ValueError(
                        f"{path}: {self.kind}: expected a tensor {self.prefix}{i}.{name} of shape "
                        f"{list(tensor.shape)}, got {got}. Models whose layers are fused or stacked on loading "
                        "(experts) are not quantised here."
                    )
            if not self.linears(layer):
                raise ValueError(f"{path}: {self.kind}: expected linear layers in block {i}, found none.")

    def __len__(self) -> int:
        return len(self.layers)

    @staticmethod
    def linears(block: nn.Module) -> dict[str, nn.Linear]:
        return {name: m for name, m in block.named_modules() if type(m) is nn.Linear}

    def names(self, i: int) -> list[str]:
        """Full names of the linear layers of block i."""
        return [f"{self.prefix}{i}.{name}" for name in self.linears(self.layers[i])]

    def block(self, i: int, tensors: dict[str, torch.Tensor] | None = None) -> nn.Module:
        """Block i in float32, of `tensors` (by their names in the block) or, without them, of the folder's."""
        made = copy.deepcopy(self.layers[i])
        if any(True for _ in made.buffers()):
            raise ValueError(f"{self.path}: {self.kind}: its blocks hold buffers, which is not understood here.")
        made.to_empty(device=self.device)
        if tensors is None:
            tensors = {name: self.stored.get(f"{self.prefix}{i}.{name}") for name in made.state_dict()}
        made.load_state_dict({name: t.float() for name, t in tensors.items()}, strict=True)
        return made

    @torch.no_grad()
    def start(self, rows: torch.Tensor) -> Hidden:
        """Embed rows [R, L] int64. Also notes the arguments that each block gets besides its hidden states, so all rows
        that are sent through blocks afterwards must have this length."""
        inner, found = copy.copy(self.inner), []
        inner._modules = dict(self.inner._modules)
        for name, child in list(inner._modules.items()):
            if name == "layers":
                inner.layers = nn.ModuleList(_Recorder(layer) for layer in self.layers)
            elif name == "norm":
                inner.norm = nn.Identity()
            elif "rotary" in name:  # its frequencies are not stored, they follow from the config
                setattr(inner, name, type(child)(config=inner.config).to(self.device))
            elif child is not None:
                setattr(inner, name, self._real(child, f"{self.model.base_model_prefix}.{name}"))
        calls = []
        for row in rows:
            for recorder in inner.layers:
                recorder.call = None
            out = inner(input_ids=row[None].to(self.device), use_cache=False).last_hidden_state
            found.append(out.float().cpu())
            calls = calls or [recorder.call for recorder in inner.layers]
        self._calls = calls
        return found

    @torch.no_grad()
    def run(self, i: int, block: nn.Module, hidden: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Each row's hidden states after block i.

        Raises:
            ValueError: NaN or infinity among them.
        """
        args, kwargs = self._calls[i]
        for row in hidden:
            out = block(row.to(self.device), *args, **kwargs)
            out = (out[0] if isinstance(out, tuple) else out).cpu()
            if not torch.isfinite(out).all():
                raise ValueError(f"{self.path}: block {i} gives NaN or infinity on this text; is the model whole?")
            yield out

    @torch.no_grad()
    def losses(self, hidden: Hidden, rows: torch.Tensor) -> tuple[float, int]:
        """(sum of negative log-probs, tokens): each row's tokens but its first, given all before it."""
        norm = self._real(self.inner.norm, f"{self.model.base_model_prefix}.norm")
        output = self.model.get_output_embeddings()
        name = next(n for n, m in self.model.named_modules() if m is output)
        tied = f"{name}.weight" not in self.stored
        source = self.model.get_input_embeddings() if tied else output
        real = copy.copy(self.model)
        real._modules = dict(self.model._modules)
        layer = self._real(
            output, name, next(n for n, m in self.model.named_modules() if m is source) if tied else None
        )
        parts = head(_WithHead(self.model, layer))
        total = 0.0
        for row, ids in zip(hidden, rows, strict=True):
            states = norm(row.to(self.device))[0, :-1]
            logprob = linear_logprob(
                states, parts.weight, ids[1:].to(self.device), bias=parts.bias, softcap=parts.softcap,
                temperature=parts.temperature,
            )  # fmt: skip
            total -= float(logprob.double().sum())
        return total, len(rows) * (rows.shape[1] - 1)

    def _real(self, module: nn.Module, name: str, weight_from: str | None = None) -> nn.Module:
        """A copy of a module outside the blocks, with its tensors in float32."""
        made = copy.deepcopy(module).to_empty(device=self.device)
        state = made.state_dict()
        for key, buffer in made.named_buffers():
            if key not in state:
                number = getattr(made, f"scalar_{key}", None)  # as Gemma's embedding notes its scale
                if not isinstance(number, (int, float)):
                    raise ValueError(f"{self.path}: {self.kind}: {name}.{key} is not stored, so it is not known here.")
                buffer.fill_(number)
        keys = {key: f"{weight_from or name}.{key}" for key in state}
        for key in keys.values():
            if key not in self.stored:
                raise ValueError(f"{self.path}: expected a tensor {key}, found none.{folder.FETCH}")
        made.load_state_dict({key: self.stored.get(full).float() for key, full in keys.items()})
        return made


def _skeleton(config) -> nn.Module:
    """The model without memory for weights; attention by torch's fused operator, where transformers lets it."""
    for name in ("sdpa", "eager"):
        try:
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(
                    config, dtype=torch.float32, attn_implementation=name, trust_remote_code=False
                ).eval()
        except ValueError:
            if name == "eager":
                raise


class _WithHead:
    """As much of a model as fastpost.hf.model.head looks at."""

    def __init__(self, model: nn.Module, layer: nn.Module):
        self.config, self._layer = model.config, layer

    def get_output_embeddings(self) -> nn.Module:
        return self._layer


class _Recorder(nn.Module):
    """Stands where a block was, notes how it is called, and passes the hidden states on."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.call = None
        # Models choose masks by what a block says of itself.
        for name in ("attention_type", "layer_type", "is_sliding", "layer_idx", "sliding_window"):
            if hasattr(block, name):
                setattr(self, name, getattr(block, name))

    def forward(self, hidden: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        kwargs.pop("past_key_values", None)
        self.call = (args, kwargs | {"use_cache": False} if "use_cache" in kwargs else kwargs)
        return hidden


# ---- what goes into the linear layers --------------------------------------------------------------------------------


class Inputs:
    """Moments of what the linear layers of a block are given, shared by those that are given the same tensor.

    Fields:
        leader: name of each linear layer -> name of the first that has the same input.
        moments: leader -> Moments.
        sample: leader -> [T, K] float32, every so many rows of the inputs, for methods that try things out.
    """

    def __init__(self, block: nn.Module, *, hessian: bool = True, every: int = 0):
        self.block, self.hessian, self.every = block, hessian, every
        self.leader: dict[str, str] = {}
        self.moments: dict[str, Moments] = {}
        self.sample: dict[str, torch.Tensor] = {}
        self._last: tuple[torch.Tensor, str] | None = None

    @contextmanager
    def gathered(self) -> Iterator[None]:
        handles = [m.register_forward_pre_hook(self._see(name)) for name, m in Blocks.linears(self.block).items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._last = None

    def _see(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            x = args[0]
            if name not in self.leader:
                same = self._last is not None and self._last[0] is x
                self.leader[name] = self._last[1] if same else name
                self._last = (x, self.leader[name])
                if not same:
                    self.moments[name] = Moments(x.shape[-1], x.device, hessian=self.hessian)
            if self.leader[name] != name:
                return
            self.moments[name].add(x)
            if self.every:
                rows = x.reshape(-1, x.shape[-1])[:: self.every]
                before = self.sample.get(name)
                self.sample[name] = rows.clone() if before is None else torch.cat([before, rows])

        return hook

    def of(self, name: str) -> Moments:
        """The moments of one linear layer's inputs. ValueError for a layer that was never called."""
        if name not in self.leader:
            raise ValueError(f"[calibration] {name}: this layer was given nothing, so there is nothing to learn from.")
        return self.moments[self.leader[name]]

# SPDX-License-Identifier: Apache-2.0
"""How much memory a run will need, before any weight is read.

The step is gone through once on the meta device, where tensors have shapes but no memory, while every storage that
comes and goes is added up: what autograd keeps, what a backward pass needs on its way and what recomputation saves come
out of the model's own code, for any architecture. What is not in that code is added: weights, optimizer, the output
matrix's workspace (bounded by its byte budget), and what the process held already.
"""

from __future__ import annotations

import os
import re
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.models.jetmoe.modeling_jetmoe import JetMoeTopKGating

from fastpost.data.collate import Batch
from fastpost.hf import adapter, folder, lora
from fastpost.nn import quantize_linears
from fastpost.ops.linear_logprob import DEFAULT_MEMORY_BUDGET

from .config import Config
from .forward import base_format, start_of
from .freezing import freeze
from .gradients import Gradients
from .optim import AdamW
from .recompute import recompute

NAME = "fastpost_shapes"


@dataclass
class Estimate:
    """Bytes. `activations` is what the worst moment of forward and backward holds beside the gradients that are there
    at the end."""

    weights: float = 0
    gradients: float = 0
    optimizer: float = 0
    activations: float = 0
    head: float = 0
    process: float = 0

    @property
    def total(self) -> float:
        return sum(vars(self).values())

    @property
    def step(self) -> float:
        """What a step adds to the model that lies there: all but weights, optimizer and process."""
        return self.gradients + self.activations + self.head

    def line(self) -> str:
        parts = " + ".join(f"{name} {value / 1e9:.2f}" for name, value in vars(self).items() if value)
        return f"{parts} = {self.total / 1e9:.2f} GB"


def shape_model(path: str | Path, dtype: torch.dtype) -> torch.nn.Module:
    """The model of a Hugging Face folder's config.json on the meta device: shapes without memory, no weights needed."""
    AttentionInterface.register(NAME, _attention)  # and no mask function: packing needs no mask
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    four_bit = folder.is_quantized(path)
    if four_bit:
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=NAME)
    for module in model.modules():
        if isinstance(getattr(module, "router", None), JetMoeTopKGating):
            module.router = _EvenRouter(module.router)
    if four_bit:  # groups of 128 stand for whatever they are
        quantize_linears(model, group_size=128)
    return model


def shape_policy(cfg: Config, dtype: torch.dtype) -> torch.nn.Module:
    """The model that a run would train, adapter and frozen parts included, as a `shape_model`."""
    start = start_of(cfg.model)
    model = shape_model(start.base, dtype)
    base_format(cfg.model).apply(model)
    with torch.device("meta"):
        if start.adapter:
            model = adapter.shaped(model, start.adapter)
        elif cfg.model.lora.rank:
            model = adapter.fresh(model, **vars(cfg.model.lora))
    freeze(model, cfg.model.train, cfg.model.freeze)
    return model


def estimate(model: torch.nn.Module, cfg: Config, batch: Batch, micro_batches: int, device: torch.device) -> Estimate:
    """Memory of a step of `micro_batches` like `batch`, the longest one, for a `shape_model` in the compute dtype."""
    out = Estimate(process=memory_now() if device.type == "cpu" else 0)
    recompute(lora.inner(model), cfg.train.gradient_checkpointing, device)
    optimizer = AdamW.from_config(model, cfg)
    out.weights = sum(t.nbytes for t in {**dict(model.named_parameters()), **dict(model.named_buffers())}.values())
    out.optimizer = sum(t.nbytes for _, t in optimizer.tensors())
    model.train()
    with Live() as live, Gradients(optimizer.parameters, micro_batches) as gradients:
        shape_step(model, batch)
        if micro_batches > 1:  # the sums of the first lie there while the second is computed
            shape_step(model, batch)
        held = [gradients.get(p) for p in optimizer.parameters]
        out.gradients = sum(g.nbytes for g in held if g is not None)
        del held
    out.activations = live.peak - out.gradients
    head = model.get_output_embeddings()
    vocabulary, width = head.weight.shape
    # In tiles: log-probs and coefficients of a panel, at most the budget; and float32 sums of the matrix's gradient.
    sums = 4.0 * vocabulary * width * head.weight.requires_grad
    out.head = min(DEFAULT_MEMORY_BUDGET[device.type], 8.0 * batch.scored * vocabulary) + sums
    return out


def shape_step(model: torch.nn.Module, batch: Batch) -> None:
    """Forward and backward of `batch` on a shape_model."""
    ids, positions = (torch.empty((1, batch.tokens), dtype=torch.int64, device="meta") for _ in range(2))
    hidden = lora.inner(model).base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[0]
    _Head.apply(hidden, model.get_output_embeddings().weight).backward()


class _EvenRouter(torch.nn.Module):
    """A JetMoE router that gives every expert as many tokens: the loop of transformers' experts asks for numbers."""

    def __init__(self, router: JetMoeTopKGating):
        super().__init__()
        self.layer, self.top_k = router.layer, router.top_k

    def forward(self, hidden: torch.Tensor):
        logits = self.layer(hidden).float()
        best, index = logits.topk(self.top_k, dim=1)
        order, experts = index.flatten().sort(0)[1], logits.shape[1]
        gates = best.softmax(1).type_as(hidden).flatten()[order]
        sizes = [(i + 1) * len(order) // experts - i * len(order) // experts for i in range(experts)]
        return order, order.div(self.top_k, rounding_mode="trunc"), gates, sizes, logits


def _grouped_shape(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor, *_, **__) -> torch.Tensor:
    """torch._grouped_mm on the meta device, where torch 2.13 has it for bfloat16 alone: [M, K] x [E, K, N] forward,
    [K, M] x [M, N] -> [E, K, N] for the weight's gradient."""
    return a.new_empty(len(a), b.shape[-1]) if b.ndim == 3 else a.new_empty(len(offs), len(a), b.shape[-1])


class Live(TorchDispatchMode):
    """Bytes of the meta tensors alive: `now`, and `peak`, the most there ever were at once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        if function is torch.ops.aten._grouped_mm.default and args[0].dtype == torch.float32:
            out = _grouped_shape(*args, **(kwargs or {}))
        else:
            out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "meta":
                storage = leaf.untyped_storage()
                if storage not in self._known:
                    self._known.add(storage)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._freed, storage.nbytes())
        return out

    def _freed(self, size: int) -> None:
        self.now -= size


class _Head(torch.autograd.Function):
    """The output layer to autograd: one gradient of each operand's shape, nothing kept but these."""

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.save_for_backward(hidden, weight)
        return hidden.new_empty(())

    @staticmethod
    def backward(ctx, _):
        hidden, weight = ctx.saved_tensors
        return torch.empty_like(hidden), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


def _attention(module, query, key, value, mask, scaling=None, **kwargs):
    """Attention by its shapes: the fused kernel's output and log-sum-exp, whatever the device will be."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, _ = kernel(query, key, value, 0.0, True, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


# ---- what a process really uses --------------------------------------------------------------------------------------


def memory_now() -> float:
    """Bytes this process holds now."""
    return _status("VmRSS")


def reset_peak(device: torch.device) -> float | None:
    """Forget the highest memory so far; returns what is held now, or None where the system does not let us."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return float(torch.cuda.memory_allocated(device))
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return memory_now()


def peak(device: torch.device) -> float:
    """Highest bytes since `reset_peak`."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return _status("VmHWM")


def available(device: torch.device) -> float:
    """Bytes there are for this process: of the GPU, or of the machine and its container."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return float(whole if text == "max" else min(whole, int(text)))


def _status(name: str) -> float:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0.0
    return 1024.0 * int(re.search(rf"^{name}:\s+(\d+)", text, re.M)[1])

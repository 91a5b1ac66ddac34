# SPDX-License-Identifier: Apache-2.0
"""The gradients of one optimizer step, and no copy of them that is not needed.

One micro-batch: they are the `.grad` that autograd left. Several: each parameter's gradient is added to a float32 sum
the moment autograd has it and freed at once, so besides the sums only one gradient at a time is alive.

Several ranks with a copy of the model each (ddp): always float32 sums, added up over ranks by `reduce`. Ranks with a
part each (fsdp): FSDP has added up over ranks before a gradient gets here, and all of this is about the own part.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist

from .distributed import ALONE, Ranks

CPU_PIECE = (
    1 << 18
)  # 1 MiB of float32: elementwise chains over a piece stay in the core's cache (4 x faster than whole tensors)
CUDA_PIECE = 1 << 26


def pieces(tensor: torch.Tensor) -> list[torch.Tensor]:
    """A tensor (of a DTensor: this rank's part) as flat slices, small enough that float32 temporaries of one slice cost
    no memory worth naming."""
    flat = local(tensor.detach()).reshape(-1)
    return list(flat.split(CPU_PIECE if flat.device.type == "cpu" else CUDA_PIECE))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class Gradients:
    """Context manager around the backward passes of one step. Leaves no `.grad` behind, whatever happens inside.

    with Gradients(parameters, len(micro_batches)) as gradients:
        for batch in micro_batches: loss(batch).backward()
        gradients.reduce()
        norm = gradients.norm()
        for p in parameters: use(gradients.take(p))
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], micro_batches: int = 1, ranks: Ranks = ALONE):
        self.parameters, self.ranks = list(parameters), ranks
        sums = micro_batches > 1 or ranks.replicated
        self._sums: dict[torch.nn.Parameter, torch.Tensor] | None = {} if sums else None
        self._hooks = []

    def __enter__(self) -> Gradients:
        self._clear()
        if self._sums is not None:
            self._hooks = [p.register_post_accumulate_grad_hook(self._add) for p in self.parameters]
        return self

    def __exit__(self, *_) -> None:
        for hook in self._hooks:
            hook.remove()
        self._clear()

    def get(self, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        """The summed gradient, in the parameter's dtype (one micro-batch) or float32 (several); None if it got none.
        Of a DTensor: this rank's shard."""
        gradient = parameter.grad if self._sums is None else self._sums.get(parameter)
        return None if gradient is None else local(gradient)

    def take(self, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        """`get`, and let go of it: the memory is free once the caller drops it."""
        gradient = self.get(parameter)
        parameter.grad = None
        if self._sums is not None:
            self._sums.pop(parameter, None)
        return gradient

    @torch.no_grad()
    def reduce(self) -> None:
        """Add up over ranks, where each has a copy of the model. A rank without a micro-batch adds nothing."""
        if not self.ranks.replicated:
            return
        # One gradient that no rank has stays None, as in one process.
        have = torch.tensor([p in self._sums for p in self.parameters], dtype=torch.int32)
        dist.all_reduce(have, dist.ReduceOp.MAX)
        work = []
        for p, anywhere in zip(self.parameters, have.tolist(), strict=True):
            if anywhere:
                if p not in self._sums:
                    self._sums[p] = torch.zeros_like(p, dtype=torch.float32)
                work.append(dist.all_reduce(self._sums[p], async_op=True))
        for one in work:
            one.wait()

    @torch.no_grad()
    def norm(self) -> float:
        """Global L2 norm: float32 inside a piece, float64 across pieces and ranks. Waits for the device once."""
        present = [g for p in self.parameters if (g := self.get(p)) is not None]
        norms = [torch.linalg.vector_norm(piece, dtype=torch.float32) for g in present for piece in pieces(g)]
        norm = float(torch.linalg.vector_norm(torch.stack(norms).double())) if norms else 0.0
        return self.ranks.sum(norm * norm) ** 0.5 if self.ranks.sharded else norm

    def _add(self, parameter: torch.nn.Parameter) -> None:
        gradient, parameter.grad = local(parameter.grad), None
        if parameter in self._sums:
            self._sums[parameter] += gradient
        else:
            self._sums[parameter] = gradient.float()  # a float32 gradient is taken over, not copied

    def _clear(self) -> None:
        for p in self.parameters:
            p.grad = None
        if self._sums is not None:
            self._sums.clear()

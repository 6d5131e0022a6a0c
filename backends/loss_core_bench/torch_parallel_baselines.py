"""Baselines for a vocabulary that is sharded over ranks: gathered logits, and torch's loss_parallel."""

# T = tokens, V = vocabulary, W = classes of this rank, H = hidden

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import loss_parallel

from loss_core.bench.measure.job import Job

Loss = Callable[..., Tensor]


def on_gathered_logits(job: Job, loss: Loss) -> Loss:
    """A loss of this rank's shards that gathers the logits and computes the unsharded loss.

    Args:
        loss: takes the forward arguments of a loss over logits, or of distillation.
    """
    sizes = job.sizes
    if job.definition.name == "cross_entropy":
        return lambda logits, labels: loss(gather_logits(logits, sizes), labels)
    if job.definition.name == "distillation":
        return lambda student_logits, teacher_logits, labels: loss(
            gather_logits(student_logits, sizes), gather_logits(teacher_logits, sizes), labels
        )

    def fused(hidden_states: Tensor, lm_weight: Tensor, labels: Tensor) -> Tensor:
        return loss(gather_logits(F.linear(sum_grad(hidden_states), lm_weight), sizes), labels)

    return fused


def gather_logits(logits_TW: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """[T, V] from the [T, W] of all ranks; backward returns this rank's slice of the gradient."""
    logits_TV: Tensor = _GatherLogits.apply(logits_TW, sizes)
    return logits_TV


class _GatherLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TW: Tensor, sizes: tuple[int, ...]) -> Tensor:
        start = sum(sizes[: dist.get_rank()])
        ctx.shard = slice(start, start + logits_TW.shape[1])
        # all_gather needs equal shapes. Only the last shards can be smaller, so all padding is at the end.
        padded_TW = F.pad(logits_TW, (0, sizes[0] - logits_TW.shape[1])).contiguous()
        parts = [torch.empty_like(padded_TW) for _ in sizes]
        dist.all_gather(parts, padded_TW)
        return torch.cat(parts, -1)[:, : sum(sizes)]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # Every rank computes the unsharded loss, so its gradient is complete without a sum over the ranks.
        return grads[0][:, ctx.shard].contiguous(), None


def sum_grad(hidden_TH: Tensor) -> Tensor:
    """A replicated input, unchanged; backward sums its gradient over the ranks."""
    same_TH: Tensor = _SumGrad.apply(hidden_TH)
    return same_TH


class _SumGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total


def on_dtensors(config: Any, job: Job) -> Loss:
    """F.cross_entropy of DTensors under loss_parallel."""
    # Backward has to run in the context as well. It is never left: this process serves this baseline alone.
    loss_parallel().__enter__()
    mesh = DeviceMesh.from_group(dist.group.WORLD, "cpu" if job.device == "cpu" else "cuda")  # type: ignore[arg-type]
    vocab = job.shape[1]

    def logits_loss(logits: DTensor, labels: Tensor) -> Tensor:
        if cap := config.logit_softcapping:
            logits = cap * torch.tanh(logits / cap)
        loss = F.cross_entropy(logits, labels, ignore_index=config.ignore_index, reduction=config.reduction)
        return loss.to_local() if isinstance(loss, DTensor) else loss

    def over_logits(logits: Tensor, labels: Tensor) -> Tensor:
        return logits_loss(_sharded(logits, mesh, -1, vocab), labels)

    def fused(hidden_states: Tensor, lm_weight: Tensor, labels: Tensor) -> Tensor:
        hidden = DTensor.from_local(hidden_states, mesh, [Replicate()], run_check=False)
        return logits_loss(F.linear(hidden, _sharded(lm_weight, mesh, 0, vocab)), labels)  # type: ignore[arg-type]

    return fused if job.definition.products else over_logits


def _sharded(local: Tensor, mesh: DeviceMesh, dim: int, size: int) -> DTensor:
    """DTensor of this rank's shard; the global shape is passed, so that no collective computes it."""
    shape = list(local.shape)
    shape[dim] = size
    return DTensor.from_local(
        local, mesh, [Shard(dim)], run_check=False, shape=torch.Size(shape), stride=(shape[1], 1)
    )  # fmt: skip

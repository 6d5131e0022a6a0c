"""What else there is for a vocabulary that is sharded over ranks: gathering the logits, and torch's loss_parallel."""

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


def over_gathered(job: Job, whole: Loss) -> Loss:
    """A loss over all logits, as a loss over this rank's: they are gathered first.

    Args:
        whole: takes the forward arguments of a loss over logits, or of distillation.
    """
    sizes = job.sizes
    if job.definition.name == "cross_entropy":
        return lambda logits, labels: whole(gathered(logits, sizes), labels)
    if job.definition.name == "distillation":
        return lambda student_logits, teacher_logits, labels: whole(
            gathered(student_logits, sizes), gathered(teacher_logits, sizes), labels
        )

    def fused(hidden_states: Tensor, lm_weight: Tensor, labels: Tensor) -> Tensor:
        return whole(gathered(F.linear(shared(hidden_states), lm_weight), sizes), labels)

    return fused


def gathered(part_TW: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """[T, V] from every rank's [T, W]; the gradient is this rank's part of that of the whole."""
    whole_TV: Tensor = _Gathered.apply(part_TW, sizes)
    return whole_TV


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part_TW: Tensor, sizes: tuple[int, ...]) -> Tensor:
        start = sum(sizes[: dist.get_rank()])
        ctx.part = slice(start, start + part_TW.shape[1])
        # A collective takes equal parts. Only the last ones can be short, so that what pads them comes at the end.
        padded_TW = F.pad(part_TW, (0, sizes[0] - part_TW.shape[1])).contiguous()
        parts = [torch.empty_like(padded_TW) for _ in sizes]
        dist.all_gather(parts, padded_TW)
        return torch.cat(parts, -1)[:, : sum(sizes)]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # Every rank computes the loss of the whole, so that nothing has to be summed.
        return grads[0][:, ctx.part].contiguous(), None


def shared(hidden_TH: Tensor) -> Tensor:
    """What every rank holds whole and uses for its own classes: its gradient is the sum over the ranks."""
    same_TH: Tensor = _Shared.apply(hidden_TH)
    return same_TH


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total


def over_dtensors(config: Any, job: Job) -> Loss:
    """F.cross_entropy over DTensors under loss_parallel."""
    # Its backward has to run in the context, too; this process is of this baseline alone, so that it never leaves it.
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


def _sharded(part: Tensor, mesh: DeviceMesh, dim: int, size: int) -> DTensor:
    """This rank's part, as a DTensor of the whole, whose shape no collective has to find out."""
    shape = list(part.shape)
    shape[dim] = size
    return DTensor.from_local(
        part, mesh, [Shard(dim)], run_check=False, shape=torch.Size(shape), stride=(shape[1], 1)
    )  # fmt: skip

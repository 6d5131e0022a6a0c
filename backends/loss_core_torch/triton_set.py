"""The kernels of `torch:triton`: the same functions as those of `eager`, on NVIDIA and AMD GPUs.

With TRITON_INTERPRET=1 in the environment before the first import, they run on the CPU, slowly.
"""

import torch

from loss_core_torch.triton_launch import (
    cross_entropy_grad,
    cross_entropy_overwrite,
    cross_entropy_rows,
    cross_entropy_scale_grad,
    cross_entropy_stats,
    cross_entropy_with_grad,
    distillation_grad,
    distillation_stats,
)
from loss_core_torch.triton_linear import linear_cross_entropy, operand_dtype
from loss_core_torch.triton_linear_parallel import linear_cross_entropy_grads, linear_cross_entropy_stats

__all__ = [
    "cross_entropy_grad",
    "cross_entropy_overwrite",
    "cross_entropy_rows",
    "cross_entropy_scale_grad",
    "cross_entropy_stats",
    "cross_entropy_with_grad",
    "distillation_grad",
    "distillation_stats",
    "linear_cross_entropy",
    "linear_cross_entropy_grads",
    "linear_cross_entropy_stats",
    "one_pass",
    "operand_dtype",
]


def one_pass(device: torch.device) -> bool:
    """Whether cross entropy and its gradient are made together, where both are wanted: always."""
    return True

"""The kernels of `torch:eager`: plain PyTorch operations, on any torch device.

A set of kernels is a module with these functions; `kernels.find` gives it by name. A set may have three more, for
loss and gradient in one pass over memory: see `kernels.has_one_pass`. A head's bias [V] would be one more
argument of `linear_cross_entropy`, and one more gradient of it.
"""

import torch

from loss_core_torch.eager_distillation import (
    distillation_grad,
    distillation_scale_grad,
    distillation_stats,
    distillation_with_grad,
)
from loss_core_torch.eager_linear import linear_cross_entropy, operand_dtype
from loss_core_torch.eager_linear_parallel import linear_cross_entropy_grads, linear_cross_entropy_stats
from loss_core_torch.eager_logits import (
    cross_entropy_grad,
    cross_entropy_overwrite,
    cross_entropy_rows,
    cross_entropy_scale_grad,
    cross_entropy_stats,
    cross_entropy_with_grad,
)

# `cross_entropy_rows` does not look at rows that don't count, so that it serves evaluation better than the statistics.
ROWS_LEAVE_OTHERS = True

__all__ = [
    "ROWS_LEAVE_OTHERS",
    "cross_entropy_grad",
    "cross_entropy_overwrite",
    "cross_entropy_rows",
    "cross_entropy_scale_grad",
    "cross_entropy_stats",
    "cross_entropy_with_grad",
    "distillation_grad",
    "distillation_scale_grad",
    "distillation_stats",
    "distillation_with_grad",
    "linear_cross_entropy",
    "linear_cross_entropy_grads",
    "linear_cross_entropy_stats",
    "one_pass",
    "operand_dtype",
]


def one_pass(device: torch.device) -> bool:
    """Whether loss and gradient of logits are made together, where both are wanted.

    On a CPU alone: there the upstream gradient can be looked at, and one of 1 costs nothing. Elsewhere scaling the
    gradient afterwards would cost as much as making it then.
    """
    return device.type == "cpu"

"""The kernels of `torch:eager`: plain PyTorch operations, on any torch device.

A set of kernels is a module with these functions; `kernels.find` gives it by name. A set may have three more, for
loss and gradient in one pass over memory: see `kernels.has_one_pass`. A head's bias [V] would be one more
argument of `linear_cross_entropy`, and one more gradient of it.
"""

from loss_core_torch.eager_linear import linear_cross_entropy, operand_dtype
from loss_core_torch.eager_linear_parallel import linear_cross_entropy_grads, linear_cross_entropy_stats
from loss_core_torch.eager_logits import (
    cross_entropy_grad,
    cross_entropy_overwrite,
    cross_entropy_stats,
    distillation_grad,
    distillation_stats,
)

__all__ = [
    "cross_entropy_grad",
    "cross_entropy_overwrite",
    "cross_entropy_stats",
    "distillation_grad",
    "distillation_stats",
    "linear_cross_entropy",
    "linear_cross_entropy_grads",
    "linear_cross_entropy_stats",
    "operand_dtype",
]

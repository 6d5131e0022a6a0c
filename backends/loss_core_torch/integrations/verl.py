"""The log-probabilities and entropies of verl's policies, in place of its two fused functions.

Tried with verl 0.9.1: with `use_fused_kernels` its Hugging Face models call `FusedLinearForPPO`, its Megatron models
`linear_cross_entropy`. verl shifts the labels: it rolls input_ids by one. Unshifted labels give wrong values. verl
passes only the weight of the head, without a bias.
"""

# T = tokens, V = vocabulary, H = hidden

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from loss_core import FusedLinearLogProbsConfig, TokenLogProbs

# Modules of verl and the names that are replaced in them; with Megatron the last two import theirs by name.
_REPLACED = (
    ("verl.utils.experimental.torch_functional", "FusedLinearForPPO"),
    ("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy"),
    ("verl.models.mcore.model_forward_fused", "linear_cross_entropy"),
    ("verl.models.mcore.model_forward_1f1b_overlap", "linear_cross_entropy"),
)


def use_fused_log_probs(*, backend: str = "torch") -> Callable[[], None]:
    """Patch verl in this process to compute log-probabilities and entropies with `FusedLinearLogProbs`.

    verl's workers are separate processes: call this in a module of yours that the environment variable
    VERL_USE_EXTERNAL_MODULES names, which each of them imports. It needs `use_fused_kernels: True` in the recipe.

    Args:
        backend: flag of the loss, such as "torch:triton".
    Returns:
        A function that undoes this.
    Raises:
        ImportError: verl is missing.
        BackendUnavailable, ValueError: as `build`.
    """
    _built(backend, None)  # An unusable flag raises here.
    try:
        for module, _ in _REPLACED[:2]:
            importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"loss_core_torch.integrations.verl needs verl ({error}): pip install 'verl>=0.9'") from error

    def module_for_ppo(chunk_size: int = 512, impl_backend: str = "torch") -> FusedLinearForPPO:
        # Both arguments choose among verl's own kernels.
        return FusedLinearForPPO(backend=backend)

    ours = {
        "FusedLinearForPPO": module_for_ppo,
        "linear_cross_entropy": functools.partial(linear_cross_entropy, backend=backend),
    }
    modules = [(sys.modules[module], name) for module, name in _REPLACED if module in sys.modules]
    before = [(module, name, getattr(module, name)) for module, name in modules]
    for owner, name in modules:
        setattr(owner, name, ours[name])

    def undo() -> None:
        if any(getattr(owner, name) is not ours[name] for owner, name in modules):
            raise RuntimeError("verl's functions are not these any more; undo what replaced them first.")
        for owner, name, theirs in before:
            setattr(owner, name, theirs)

    return undo


class FusedLinearForPPO(nn.Module):
    """As `verl.utils.experimental.torch_functional.FusedLinearForPPO`; entropies are float32, as log-probabilities.

    Args:
        backend: flag of the loss, such as "torch:triton".
    """

    def __init__(self, *, backend: str = "torch") -> None:
        super().__init__()
        self.loss = _built(backend, None)

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of labels under softmax(hidden_states @ vocab_weights.T / temperature), and entropies.

        Args:
            hidden_states: [..., H] float. vocab_weights: [V, H].
            input_ids: [...] integers, shifted: hidden_states[..., t, :] predicts input_ids[..., t].
            temperature: > 0, a number or [...].
        Returns:
            Two tensors of the shape of input_ids, both differentiable.
        Raises:
            ValueError, TypeError: as FusedLinearLogProbs.
        """
        found: TokenLogProbs = self.loss(hidden_states, input_ids, vocab_weights, temperature)
        return found.logprobs, found.entropy


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
    *,
    backend: str = "torch",
) -> tuple[Tensor, Tensor]:
    """As `verl.utils.kernel.linear_cross_entropy.linear_cross_entropy`.

    Args:
        hidden: [..., H] float, the same on each rank of the group. Over a group its gradient is this rank's share, to
            be summed over the ranks, as Megatron's gather from the sequence-parallel region does.
        weight: [V, H], this rank's rows. labels: integers, as many as tokens, classes of the full vocabulary, shifted.
        temperature: > 0.
        reduction: of the log-probabilities: "none", "sum" or "mean".
        dist_process_group: over which the vocabulary is sharded, in rank order, in shards of any size; or None.
        backend: flag of the loss, such as "torch:triton".
    Returns:
        Log-probabilities [T], or their sum or mean; entropies [T]. Both are differentiable.
    Raises:
        ValueError: another reduction. ValueError, TypeError: as FusedLinearLogProbs.
    """
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction must be 'none', 'sum' or 'mean', got {reduction!r}.")
    ranks = 1 if dist_process_group is None else dist.get_world_size(dist_process_group)
    hidden_TH = hidden.reshape(-1, hidden.shape[-1])
    if ranks > 1 and hidden_TH.requires_grad:
        # Our gradient is the full one on each rank. The hook is on a view, for other uses of the caller's tensor.
        hidden_TH = hidden_TH.view_as(hidden_TH)
        hidden_TH.register_hook(lambda gradient: gradient / ranks)
    loss = _built(backend, dist_process_group)
    found: TokenLogProbs = loss(hidden_TH, labels.reshape(-1), weight, temperature)
    logprobs = found.logprobs if reduction == "none" else getattr(found.logprobs, reduction)()
    return logprobs, found.entropy


@functools.cache
def _built(backend: str, group: Any) -> Any:
    return FusedLinearLogProbsConfig(entropy=True, tp_group=group).build(backend=backend)

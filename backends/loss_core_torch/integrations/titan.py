"""Losses for torchtitan: over the logits, or fused with the head in place of its ChunkedLossWrapper.

For `--override.imports`; see `cross_entropy` and `linear_cross_entropy`. Tried with torchtitan 0.3. torchtitan shifts
the labels: labels[b, s] is the token after position s. Unshifted labels give a wrong loss.
"""

# B = batch, S = sequence, V = vocabulary, H = hidden

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from loss_core import FusedLinearCEConfig, MaskedCrossEntropyConfig
from loss_core_torch.integrations.heads import call_in_head, check_head

# Unlike the other adapters this one imports its library at once: torchtitan imports this file in order to use it, and
# the import registers the overrides.
try:
    import spmd_types as spmd
    from torchtitan.components.loss import IGNORE_INDEX, BaseLoss, ChunkedLossWrapper, CrossEntropyLoss
    from torchtitan.config import CompileConfig
    from torchtitan.config.override import override
    from torchtitan.distributed.spmd_types import current_spmd_mesh, spmd_mesh_size
    from torchtitan.distributed.utils import get_spmd_backend
except ImportError as error:
    raise ImportError(
        f"loss_core_torch.integrations.titan needs torchtitan 0.3 or newer ({error}): pip install 'torchtitan>=0.3'"
    ) from error


class CrossEntropy(BaseLoss):
    """`MaskedCrossEntropy` with torchtitan's arguments, logits [B, S, V] and labels [B, S]; returns (loss, metrics)."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        """Fields of MaskedCrossEntropyConfig, and the flag."""

        label_smoothing: float = 0.0
        backend: str = "torch"

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None) -> None:
        self.config, self.compile_config = config, compile_config
        self.group: Any = None
        self._build()

    def _build(self) -> None:
        config = MaskedCrossEntropyConfig(
            ignore_index=IGNORE_INDEX, tp_group=self.group, label_smoothing=self.config.label_smoothing
        )
        self.fn = config.build(backend=self.config.backend)
        self._maybe_compile(self.compile_config)

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **loss_inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        _check_inputs(loss_inputs)
        logits, group = _local(pred, labels)
        if group is not self.group:
            self.group = group
            self._build()
        with spmd.no_typecheck():
            loss = self.fn(logits, labels, num_label_tokens=global_valid_tokens)
        return _typed(loss), {}


class LinearCrossEntropy(ChunkedLossWrapper):
    """`FusedLinearCrossEntropy` in place of torchtitan's ChunkedLossWrapper: hidden states [B, S, H] before the head.

    The trainer passes it the head, and skips the head in the model's forward. Unlike ChunkedLossWrapper it computes no
    gradients of the head before `backward`, so a factor on the loss scales all of them; the sequence may have any
    length.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        """Fields of FusedLinearCEConfig, and the flag."""

        logit_softcapping: float = 0.0
        skip_ignored: bool | None = None
        label_smoothing: float = 0.0
        backend: str = "torch"

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None) -> None:
        fused = FusedLinearCEConfig(
            ignore_index=IGNORE_INDEX,
            logit_softcapping=config.logit_softcapping,
            skip_ignored=config.skip_ignored,
            label_smoothing=config.label_smoothing,
        )
        self.fn = fused.build(backend=config.backend)
        self._maybe_compile(compile_config)
        self.lm_head: nn.Module | None = None

    def set_lm_head(self, lm_head: nn.Module) -> None:
        """Set the head; the trainer calls this. Errors as `heads.call_in_head`; ValueError if it is tensor parallel."""
        check_head(lm_head, "lm_head")
        axes = getattr(getattr(lm_head.weight, "device_mesh", None), "mesh_dim_names", None) or ()
        if "tp" in axes:
            raise ValueError(
                f"The weight of lm_head is sharded over the mesh axes {axes}: the fused loss takes no head over tensor "
                f"parallel here. {_OVER_LOGITS}"
            )
        self.lm_head = lm_head

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **loss_inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        _check_inputs(loss_inputs)
        if self.lm_head is None:
            raise RuntimeError("LinearCrossEntropy has no head: call set_lm_head(model.lm_head) first.")
        if isinstance(pred, DTensor) or _tensor_parallel():
            raise ValueError(f"The fused loss takes plain hidden states without tensor parallel. {_OVER_LOGITS}")
        with spmd.no_typecheck():
            loss = call_in_head(self.lm_head, pred, labels, self.fn, num_label_tokens=global_valid_tokens)
        return _typed(loss), {}


@override(target=BaseLoss.Config, fqns=["loss"], description="Cross entropy of loss_core, over the logits.")
def cross_entropy(config: Any, **fields: Any) -> CrossEntropy.Config:
    """Use cross entropy over the logits from this library.

        --override.imports loss_core_torch.integrations.titan.cross_entropy
        --override.imports 'loss_core_torch.integrations.titan.cross_entropy={"backend": "torch:triton"}'

    Args:
        config: the recipe's loss, a CrossEntropyLoss or a ChunkedLossWrapper around one.
        fields: of `CrossEntropy.Config`.
    Raises:
        TypeError: the recipe has another loss, or a field is unknown.
    """
    _check_replaced(config)
    return CrossEntropy.Config(**fields)


@override(target=BaseLoss.Config, fqns=["loss"], description="Cross entropy of loss_core, fused with the head.")
def linear_cross_entropy(config: Any, **fields: Any) -> LinearCrossEntropy.Config:
    """Use the loss fused with the head from this library; as `cross_entropy`, with `LinearCrossEntropy.Config`."""
    _check_replaced(config)
    return LinearCrossEntropy.Config(**fields)


_OVER_LOGITS = "Take loss_core_torch.integrations.titan.cross_entropy, over the logits."


def _check_replaced(config: Any) -> None:
    inner = config.loss_fn if isinstance(config, ChunkedLossWrapper.Config) else config
    if not isinstance(inner, CrossEntropyLoss.Config):
        raise TypeError(
            f"The loss of this recipe is {type(inner).__qualname__}, not CrossEntropyLoss.Config: cross entropy would "
            "be another loss. Leave the override out."
        )


def _check_inputs(loss_inputs: dict[str, Any]) -> None:
    # The trainer passes positions to every loss.
    unknown = sorted(loss_inputs.keys() - {"positions"})
    if unknown:
        raise TypeError(f"Cross entropy takes pred, labels and global_valid_tokens, got {', '.join(unknown)}, too.")


def _tensor_parallel() -> bool:
    return get_spmd_backend() == "spmd_types" and spmd_mesh_size("tp") > 1


def _local(pred: Tensor, labels: Tensor) -> tuple[Tensor, Any]:
    """This rank's logits, and the group over which their vocabulary is sharded, or None."""
    if not isinstance(pred, DTensor):
        return pred, current_spmd_mesh().get_group("tp") if _tensor_parallel() else None
    if isinstance(labels, DTensor) or pred.placements != (Shard(pred.ndim - 1),):
        raise ValueError(
            f"pred is a DTensor with placements {pred.placements} over {pred.device_mesh.mesh_dim_names}; taken are "
            "plain logits, or a vocabulary sharded over tensor parallel alone: --parallelism.spmd_backend spmd_types."
        )
    return pred.to_local(), pred.device_mesh.get_group()


def _typed(loss: Tensor) -> Tensor:
    """The loss with the SPMD types of torchtitan's own loss, where its type checker is on."""
    if spmd.is_type_checking():
        spmd.assert_type(loss, {"dp": spmd.P, "cp": spmd.P, "tp": spmd.I})
    return loss

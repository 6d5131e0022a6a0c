"""Baselines, the implementations of other projects that `bench` times and `check` can test: requirements and features.

None is a dependency. Their adapters are in loss_core_baselines, one file per project.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass, fields

from loss_core.dispatch.protocol import BackendUnavailable
from loss_core.loss_config import LossConfig
from loss_core.row_terms import OPTIONS


@dataclass(frozen=True)
class Baseline:
    """One implementation of another project, or one built from a framework's own functions.

    Attributes:
        name: on the command line.
        title: shown in tables.
        framework: "torch" or "jax".
        losses: definition names of the losses that it computes in a benchmark; () if only check supports it.
        needs: required packages, by import name.
        install: command that installs them.
        options: config fields of cross entropy that it supports, among those that are off at 0.
        adapter: its module in loss_core_baselines, for check; "" if only bench supports it.
        ranks: "one": needs the full vocabulary in one process; "many": tensor parallel only; "any".
    """

    name: str
    title: str
    framework: str
    losses: tuple[str, ...]
    needs: tuple[str, ...]
    install: str
    options: tuple[str, ...] = ()
    ranks: str = "one"
    adapter: str = ""

    def fits_ranks(self, tp: int) -> bool:
        """Whether it runs with the vocabulary sharded over `tp` ranks."""
        return self.ranks in ("any", "one" if tp == 1 else "many")

    def fits(self, loss: str, tp: int) -> bool:
        """Whether it computes a loss, by the name of its definition, over `tp` ranks."""
        return loss in self.losses and self.fits_ranks(tp)

    def check(self, config: LossConfig) -> None:
        """Check that it supports the options that a config turns on.

        Raises:
            BackendUnavailable: names an option that it does not support.
        """
        for option in fields(config):
            is_on = type(option.default) is float and option.default == 0 != getattr(config, option.name)
            if is_on and option.name not in self.options:
                raise BackendUnavailable(f"{self.name} has no {option.name}.")

    def missing(self) -> tuple[str, ...]:
        """Required packages that are not installed, found without importing them."""
        return tuple(name for name in self.needs if importlib.util.find_spec(name) is None)

    def version(self) -> str:
        """Version of its package (the last of `needs`); "" if it is not installed."""
        distributions = importlib.metadata.packages_distributions().get(self.needs[-1])
        return importlib.metadata.version(distributions[0]) if distributions else ""


_TORCH, _JAX = "pip install 'loss-core[torch]'", "pip install 'loss-core[jax]'"
_LOGITS, _FUSED = ("cross_entropy",), ("linear_cross_entropy",)
_BOTH = _LOGITS + _FUSED
_ALL = (*_BOTH, "distillation")
_SOFTCAP = ("logit_softcapping",)
_OURS = (*_SOFTCAP, *OPTIONS)

BASELINES = {
    b.name: b
    for b in (
        Baseline("plain-torch", "torch:plain on logits that every rank gathers", "torch", _ALL, ("torch",), _TORCH,
                 _SOFTCAP, "many"),
        Baseline("torch-loss-parallel",
                 "torch.distributed.tensor.parallel.loss_parallel, F.cross_entropy over DTensors", "torch", _BOTH,
                 ("torch",), _TORCH, _SOFTCAP, "many"),
        Baseline("compiled-torch", "torch.compile of torch:plain", "torch", _ALL, ("torch",), _TORCH, _OURS),
        Baseline("torch-linear-ce", "F.linear_cross_entropy (torch >= 2.13), its fastest chunk", "torch", _FUSED,
                 ("torch",), _TORCH),
        Baseline("cce", "cut-cross-entropy, its Triton kernels", "torch", _FUSED, ("torch", "cut_cross_entropy"),
                 "pip install cut-cross-entropy", _SOFTCAP, adapter="cut_cross_entropy"),
        Baseline("cce-compile", "cut-cross-entropy, its torch_compile implementation", "torch", _FUSED,
                 ("torch", "cut_cross_entropy"), "pip install cut-cross-entropy", _SOFTCAP,
                 adapter="cut_cross_entropy_compile"),
        Baseline("liger", "Liger kernel", "torch", _BOTH, ("torch", "liger_kernel"), "pip install liger-kernel",
                 _SOFTCAP, adapter="liger"),
        Baseline("te", "Transformer Engine, parallel_cross_entropy", "torch", _LOGITS,
                 ("torch", "transformer_engine"), "pip install 'transformer-engine[pytorch]'", ranks="any",
                 adapter="te"),
        Baseline("nemo", "NeMo AutoModel: MaskedCrossEntropy, FusedLinearCrossEntropy, KDLoss", "torch", _ALL,
                 ("torch", "nemo_automodel"), "pip install nemo-automodel", _SOFTCAP, adapter="nemo"),
        Baseline("quack", "QuACK: cross_entropy, chunked_linear_cross_entropy", "torch", _BOTH, ("torch", "quack"),
                 "pip install quack-kernels", adapter="quack"),
        Baseline("plain-jax", "jax.nn.log_softmax, under jit", "jax", _ALL, ("jax",), _JAX, _SOFTCAP, "any"),
        Baseline("optax", "optax.losses, under jit", "jax", _ALL, ("jax", "optax"), "pip install optax", _SOFTCAP,
                 adapter="optax"),
        Baseline("jax-cce", "jax-cce, linear_cross_entropy, under jit", "jax", _FUSED, ("jax", "jax_cce"),
                 "pip install jax-cce", adapter="jax_cce"),
        Baseline("tokamax", "tokamax, linear_softmax_cross_entropy_loss, under jit", "jax", _FUSED,
                 ("jax", "tokamax"), "pip install tokamax", adapter="tokamax"),
        Baseline("torch-own", "F.cross_entropy and F.linear_cross_entropy (torch >= 2.13)", "torch", (), ("torch",),
                 _TORCH, adapter="torch_own"),
        Baseline("titan", "torchtitan, cross_entropy_loss", "torch", (), ("torch", "torchtitan"),
                 "pip install torchtitan", adapter="titan"),
        Baseline("torchtune", "torchtune: chunked cross entropy, forward and reverse KL", "torch", (),
                 ("torch", "torchtune"), "pip install torchtune torchao", adapter="torchtune"),
        Baseline("megatron", "Megatron-core, vocab_parallel_cross_entropy on one rank", "torch", (),
                 ("torch", "megatron"), "pip install megatron-core", adapter="megatron"),
        Baseline("trl", "TRL: selective_log_softmax, generalized_jsd_loss", "torch", (), ("torch", "trl"),
                 "pip install trl", adapter="trl"),
    )
}  # fmt: skip

# The baselines of bench, and those of check.
TIMED = {name: baseline for name, baseline in BASELINES.items() if baseline.losses}
JUDGED = {name: baseline for name, baseline in BASELINES.items() if baseline.adapter}

"""The other implementations that a benchmark sets beside ours: what they need and how they are installed.

None is a dependency. Their adapters are in loss_core_bench, which only worker processes load.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, fields

from loss_core.bench.job import Job
from loss_core.dispatch.protocol import BackendUnavailable
from loss_core.loss_config import LossConfig
from loss_core.row_terms import OPTIONS


@dataclass(frozen=True)
class Baseline:
    """One implementation of another project, or what can be made of a framework's own functions.

    Attributes:
        name: on the command line.
        title: what it is.
        framework: "torch" or "jax".
        losses: that it computes, by the name of their definition.
        needs: packages to import, by import name.
        install: command that installs them.
        options: of cross entropy that it has: fields that are off at 0.
        ranks: "one": needs the whole vocabulary in one process; "many": exists over tensor parallel only; "any".
    """

    name: str
    title: str
    framework: str
    losses: tuple[str, ...]
    needs: tuple[str, ...]
    install: str
    options: tuple[str, ...] = ()
    ranks: str = "one"

    def fits_ranks(self, tp: int) -> bool:
        """Whether it can share the vocabulary over so many ranks."""
        return self.ranks in ("any", "one" if tp == 1 else "many")

    def fits(self, job: Job) -> bool:
        """Whether it takes the inputs of a call, over its ranks."""
        return job.definition.name in self.losses and self.fits_ranks(job.tp)

    def check(self, config: LossConfig) -> None:
        """Refuse an option that it does not have.

        Raises:
            BackendUnavailable: names it.
        """
        for option in fields(config):
            is_on = type(option.default) is float and option.default == 0 != getattr(config, option.name)
            if is_on and option.name not in self.options:
                raise BackendUnavailable(f"{self.name} has no {option.name}.")

    def missing(self) -> tuple[str, ...]:
        """Packages that are not installed; looked up without importing them."""
        return tuple(name for name in self.needs if importlib.util.find_spec(name) is None)


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
                 "pip install cut-cross-entropy", _SOFTCAP),
        Baseline("cce-compile", "cut-cross-entropy, its torch_compile implementation", "torch", _FUSED,
                 ("torch", "cut_cross_entropy"), "pip install cut-cross-entropy", _SOFTCAP),
        Baseline("liger", "Liger kernel", "torch", _BOTH, ("torch", "liger_kernel"), "pip install liger-kernel",
                 _SOFTCAP),
        Baseline("te", "Transformer Engine, parallel_cross_entropy", "torch", _LOGITS,
                 ("torch", "transformer_engine"), "pip install 'transformer-engine[pytorch]'", ranks="any"),
        Baseline("nemo", "NeMo AutoModel: MaskedCrossEntropy, FusedLinearCrossEntropy, KDLoss", "torch", _ALL,
                 ("torch", "nemo_automodel"), "pip install nemo-automodel", _SOFTCAP),
        Baseline("plain-jax", "jax.nn.log_softmax, under jit", "jax", _ALL, ("jax",), _JAX, _SOFTCAP, "any"),
        Baseline("optax", "optax.losses, under jit", "jax", _ALL, ("jax", "optax"), "pip install optax", _SOFTCAP),
        Baseline("jax-cce", "jax-cce, linear_cross_entropy, under jit", "jax", _FUSED, ("jax", "jax_cce"),
                 "pip install jax-cce"),
        Baseline("tokamax", "tokamax, linear_softmax_cross_entropy_loss, under jit", "jax", _FUSED,
                 ("jax", "tokamax"), "pip install tokamax"),
    )
}  # fmt: skip

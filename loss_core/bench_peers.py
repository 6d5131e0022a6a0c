"""The other implementations that a benchmark sets beside ours: what they need and how they are installed.

None is a dependency. Their adapters are in loss_core_bench, which only worker processes load.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True)
class Peer:
    """One implementation of another project, or the plain one that everybody writes.

    Attributes:
        name: on the command line.
        title: what it is.
        framework: "torch" or "jax".
        kinds: inputs that it takes, of "logits", "fused", "kd".
        needs: packages to import, by import name.
        install: command that installs them.
        narrow_only: only told apart from another peer in 16-bit dtypes.
        ranks: "one": needs the whole vocabulary in one process; "many": exists over tensor parallel only; "any".
    """

    name: str
    title: str
    framework: str
    kinds: tuple[str, ...]
    needs: tuple[str, ...]
    install: str
    narrow_only: bool = False
    ranks: str = "one"

    def fits_ranks(self, tp: int) -> bool:
        """Whether it can share the vocabulary over so many ranks."""
        return self.ranks in ("any", "one" if tp == 1 else "many")

    def missing(self) -> tuple[str, ...]:
        """Packages that are not installed; looked up without importing them."""
        return tuple(name for name in self.needs if importlib.util.find_spec(name) is None)


_TORCH, _JAX = "pip install 'loss-core[torch]'", "pip install 'loss-core[jax]'"
_ALL = ("logits", "fused", "kd")

PEERS = {
    p.name: p
    for p in (
        Peer("plain-torch", "F.linear, F.cross_entropy, F.kl_div, in the dtype of the inputs", "torch", _ALL,
             ("torch",), _TORCH, ranks="any"),
        Peer("plain-torch-upcast", "the same on float32 logits", "torch", _ALL, ("torch",), _TORCH, narrow_only=True,
             ranks="any"),
        Peer("torch-loss-parallel", "torch.distributed.tensor.parallel.loss_parallel, F.cross_entropy over DTensors",
             "torch", ("logits", "fused"), ("torch",), _TORCH, ranks="many"),
        Peer("compiled-torch", "torch.compile of plain-torch", "torch", _ALL, ("torch",), _TORCH),
        Peer("compiled-torch-upcast", "torch.compile of plain-torch-upcast", "torch", _ALL, ("torch",), _TORCH,
             narrow_only=True),
        Peer("torch-linear-ce", "F.linear_cross_entropy (torch >= 2.13), its fastest chunk", "torch", ("fused",),
             ("torch",), _TORCH),
        Peer("cce", "cut-cross-entropy, its Triton kernels", "torch", ("fused",), ("torch", "cut_cross_entropy"),
             "pip install cut-cross-entropy"),
        Peer("cce-compile", "cut-cross-entropy, its torch_compile implementation", "torch", ("fused",),
             ("torch", "cut_cross_entropy"), "pip install cut-cross-entropy"),
        Peer("liger", "Liger kernel", "torch", ("logits", "fused"), ("torch", "liger_kernel"),
             "pip install liger-kernel"),
        Peer("te", "Transformer Engine, parallel_cross_entropy", "torch", ("logits",),
             ("torch", "transformer_engine"), "pip install 'transformer-engine[pytorch]'", ranks="any"),
        Peer("nemo", "NeMo AutoModel: MaskedCrossEntropy, FusedLinearCrossEntropy, KDLoss", "torch", _ALL,
             ("torch", "nemo_automodel"), "pip install nemo-automodel"),
        Peer("plain-jax", "jax.nn.log_softmax, under jit", "jax", _ALL, ("jax",), _JAX, ranks="any"),
        Peer("optax", "optax.losses, under jit", "jax", _ALL, ("jax", "optax"), "pip install optax"),
        Peer("jax-cce", "jax-cce, linear_cross_entropy, under jit", "jax", ("fused",), ("jax", "jax_cce"),
             "pip install jax-cce"),
        Peer("tokamax", "tokamax, linear_softmax_cross_entropy_loss, under jit", "jax", ("fused",),
             ("jax", "tokamax"), "pip install tokamax"),
    )
}  # fmt: skip


def peers_for(kind: str, dtype: str, tp: int = 1) -> list[Peer]:
    """The peers that take these inputs, over so many ranks."""
    narrow = dtype in ("bfloat16", "float16")
    return [
        peer
        for peer in PEERS.values()
        if kind in peer.kinds and (narrow or not peer.narrow_only) and peer.fits_ranks(tp)
    ]

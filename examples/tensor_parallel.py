"""Losses whose vocabulary is sharded over processes or devices, with the tokens sharded over others.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py --backend torch   # all over tp
    torchrun --nproc-per-node 4 examples/tensor_parallel.py --backend torch   # a 2 x 2 mesh, dp x tp
    python examples/tensor_parallel.py --backend jax                          # 4 forced CPU devices

Every run prints the same values: the loss of all tokens, and the norm of each gradient over all ranks. The unsharded
problem is created here in NumPy; tensor_parallel_torch.py and tensor_parallel_jax.py shard and compute it, and say what
to change on GPUs and on several hosts.
"""

# B = sequences, S = positions of a sequence, V = vocabulary, H = hidden

from __future__ import annotations

import argparse
import importlib
import os
import sys
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loss_core import BackendUnavailable

# V is a multiple of no count of ranks: the last rank has fewer classes.
BATCH, SEQUENCE, VOCAB, HIDDEN = 4, 64, 1003, 32
IGNORE_INDEX = -100

# By name of the loss: the norm of each gradient by name of the argument, and the loss under "loss".
Results = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Problem:
    """The unsharded problem.

    Attributes:
        backend: the flag.
        hidden_BSH, weight_VH: float32; the logits are their product.
        teacher_BSV: float32 logits to distil from.
        labels_BS: int64, half of them IGNORE_INDEX; num_label_tokens: count of the others.
    """

    backend: str
    hidden_BSH: NDArray[np.float32]
    weight_VH: NDArray[np.float32]
    teacher_BSV: NDArray[np.float32]
    labels_BS: NDArray[np.int64]
    num_label_tokens: int


def make_problem(backend: str, seed: int) -> Problem:
    rng = np.random.default_rng(seed)
    hidden_BSH = rng.standard_normal((BATCH, SEQUENCE, HIDDEN)).astype(np.float32)
    weight_VH = (rng.standard_normal((VOCAB, HIDDEN)) / np.sqrt(HIDDEN)).astype(np.float32)
    teacher_BSV = rng.standard_normal((BATCH, SEQUENCE, VOCAB)).astype(np.float32)
    labels_BS = rng.integers(0, VOCAB, (BATCH, SEQUENCE))
    labels_BS[rng.random(labels_BS.shape) < 0.5] = IGNORE_INDEX
    return Problem(backend, hidden_BSH, weight_VH, teacher_BSV, labels_BS, int((labels_BS != IGNORE_INDEX).sum()))


def table(results: Results) -> str:
    """One line for each loss: its value, and the norms of its gradients."""
    lines = []
    for loss, numbers in results.items():
        grads = "  ".join(f"|d {name}| {norm:.5f}" for name, norm in numbers.items() if name != "loss")
        lines.append(f"{loss:23} {numbers['loss']:.5f}  {grads}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="torch", help="torch, torch:triton, jax, jax:xla, ... (default: torch)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    framework = args.backend.partition(":")[0]
    if framework not in ("torch", "jax"):
        parser.error(f"--backend must be torch or jax, or one of their kernels, got {args.backend!r}")
    try:
        run = importlib.import_module(f"tensor_parallel_{framework}").run
        results = run(make_problem(args.backend, args.seed))
    except (BackendUnavailable, ImportError, ValueError) as error:
        parser.exit(2, f"{error}\n")
    # With several processes, only rank 0 has the results.
    if results is not None:
        print(table(results), flush=True)
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    # Not sys.exit: a thread of gloo may still hold a tensor, and freeing it while the interpreter shuts down
    # sometimes aborts the process (torch 2.13).
    os._exit(status)

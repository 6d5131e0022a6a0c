"""The torch half of tensor_parallel.py: one process per rank, started by torchrun.

The tensors are DTensors on a mesh dp x tp. Their placements are all that the losses need: tokens over dp, classes over
tp. With plain local tensors, set `tp_group=mesh["tp"]` in the config; the loss is then that of the local tokens.

On GPUs, three things change: the backend of the process group ("nccl"), the device of the mesh ("cuda"), and
`torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))` before the first tensor. On several hosts torchrun is started on
each of them, with --nnodes and --rdzv-endpoint; nothing changes here. Let tp be the ranks of one host, which is what
the innermost dimension of the mesh does.
"""

# B = sequences, S = positions of a sequence, V = vocabulary, H = hidden

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from loss_core import FusedLinearCEConfig, KDLossConfig, MaskedCrossEntropyConfig

if TYPE_CHECKING:
    from tensor_parallel import Problem, Results

TENSOR_PARALLEL = 2


def run(problem: Problem) -> Results | None:
    """The results on rank 0, None elsewhere."""
    if "RANK" not in os.environ:
        raise ValueError(
            "Start this with torchrun, which starts the processes: "
            "torchrun --nproc-per-node 2 examples/tensor_parallel.py --backend torch"
        )
    # Limit on the time that a rank waits for another.
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    try:
        ranks = dist.get_world_size()
        tensor_parallel = TENSOR_PARALLEL if ranks % TENSOR_PARALLEL == 0 else ranks
        mesh = init_device_mesh("cpu", (ranks // tensor_parallel, tensor_parallel), mesh_dim_names=("dp", "tp"))
        results = _results(problem, mesh)
        return results if dist.get_rank() == 0 else None
    finally:
        dist.destroy_process_group()


def _results(problem: Problem, mesh: DeviceMesh) -> Results:
    def place(value: np.ndarray[Any, Any], *placements: Placement) -> Any:
        return distribute_tensor(torch.from_numpy(value), mesh, placements)

    tokens = (Shard(0), Replicate())
    labels = place(problem.labels_BS, *tokens)
    hidden_states = place(problem.hidden_BSH, *tokens).requires_grad_()
    # V is not a multiple of the ranks: the last shard has fewer rows, as local tensors may have.
    lm_weight = place(problem.weight_VH, Replicate(), Shard(0)).requires_grad_()
    logits = place(problem.hidden_BSH @ problem.weight_VH.T, Shard(0), Shard(2)).requires_grad_()
    teacher_logits = place(problem.teacher_BSV, Shard(0), Shard(2))

    results: Results = {}

    def record(name: str, loss: torch.Tensor, **inputs: Any) -> None:
        loss.backward()
        norms = {key: float(value.grad.full_tensor().norm()) for key, value in inputs.items()}
        results[name] = {"loss": float(loss.detach()), **norms}
        for value in inputs.values():
            value.grad = None

    # The count over all ranks, on every rank.
    count = problem.num_label_tokens
    fused = FusedLinearCEConfig().build(backend=problem.backend)
    loss = fused(hidden_states, labels, lm_weight, num_label_tokens=count)
    record("FusedLinearCrossEntropy", loss, hidden_states=hidden_states, lm_weight=lm_weight)

    masked = MaskedCrossEntropyConfig().build(backend=problem.backend)
    record("MaskedCrossEntropy", masked(logits, labels, num_label_tokens=count), logits=logits)

    distil = KDLossConfig(temperature=2.0).build(backend=problem.backend)
    loss = distil(logits, teacher_logits, labels, num_batch_labels=count)
    record("KDLoss", loss, student_logits=logits)
    return results

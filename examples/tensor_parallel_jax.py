"""The JAX half of tensor_parallel.py: one process with four forced CPU devices.

The mesh is dp x tp: tokens over dp, classes over tp. `tp_group="tp"` is all that the losses need; under `jax.set_mesh`
they wrap themselves in `jax.shard_map` over that axis, and pad the vocabulary, which is not a multiple of its size. In
your own `jax.shard_map` the same losses take this device's shard of the classes.

On GPUs or TPUs omit `jax_num_cpu_devices`. On several hosts, call `jax.distributed.initialize()` first, in one process
per host (under SLURM, MPI or on TPUs it finds the others by itself; elsewhere pass it `coordinator_address`,
`num_processes` and `process_id`); `jax.devices()` then lists those of all hosts. Create each array from the data of its
host with `jax.make_array_from_process_local_data` instead of `jax.device_put`. Nothing else changes. Let tp be the
devices of one host, the innermost dimension of the mesh.
"""

# B = sequences, S = positions of a sequence, V = vocabulary, H = hidden

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from loss_core import FusedLinearCEConfig, KDLossConfig, MaskedCrossEntropyConfig

if TYPE_CHECKING:
    from tensor_parallel import Problem, Results

DATA_PARALLEL, TENSOR_PARALLEL = 2, 2


def run(problem: Problem) -> Results:
    # Before JAX initializes its devices. A count in XLA_FLAGS takes precedence.
    if jax.config.jax_num_cpu_devices < 0:
        jax.config.update("jax_num_cpu_devices", DATA_PARALLEL * TENSOR_PARALLEL)
    jax.config.update("jax_platforms", "cpu")
    mesh = jax.make_mesh((DATA_PARALLEL, TENSOR_PARALLEL), ("dp", "tp"), axis_types=(AxisType.Auto, AxisType.Auto))
    with jax.set_mesh(mesh):
        return _results(problem, mesh)


def _results(problem: Problem, mesh: jax.sharding.Mesh) -> Results:
    def place(value: Any, *axes: str | None) -> jax.Array:
        return jax.device_put(value, NamedSharding(mesh, P(*axes)))

    labels = place(problem.labels_BS, "dp")
    hidden_states = place(problem.hidden_BSH, "dp")
    # With V a multiple of the axis, P("tp"): then no device ever holds the full head.
    lm_weight = place(problem.weight_VH)
    logits = place(problem.hidden_BSH @ problem.weight_VH.T, "dp")
    teacher_logits = place(problem.teacher_BSV, "dp")

    results: Results = {}

    def record(name: str, loss_fn: Callable[..., jax.Array], **inputs: jax.Array) -> None:
        loss, grads = jax.jit(jax.value_and_grad(lambda arguments: loss_fn(**arguments)))(inputs)
        norms = {key: float(jnp.linalg.norm(grad)) for key, grad in grads.items()}
        results[name] = {"loss": float(loss), **norms}

    count = problem.num_label_tokens
    fused = FusedLinearCEConfig(tp_group="tp").build(backend=problem.backend)
    record(
        "FusedLinearCrossEntropy",
        lambda **args: fused(labels=labels, num_label_tokens=count, **args),
        hidden_states=hidden_states,
        lm_weight=lm_weight,
    )

    masked = MaskedCrossEntropyConfig(tp_group="tp").build(backend=problem.backend)
    record("MaskedCrossEntropy", lambda **args: masked(labels=labels, num_label_tokens=count, **args), logits=logits)

    distil = KDLossConfig(temperature=2.0, tp_group="tp").build(backend=problem.backend)
    record(
        "KDLoss",
        lambda **args: distil(teacher_logits=teacher_logits, labels=labels, num_batch_labels=count, **args),
        student_logits=logits,
    )
    return results

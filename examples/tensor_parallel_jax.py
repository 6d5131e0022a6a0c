"""The JAX half of tensor_parallel.py: one process, with four CPU devices that are forced to be there.

The mesh is dp x tp: tokens over dp, classes over tp. `tp_group="tp"` is all that the losses need; under `jax.set_mesh`
they wrap themselves in `jax.shard_map` over that axis, and pad the vocabulary, which does not divide by it. Inside a
`jax.shard_map` of your own the same losses take this device's share of the classes.

On GPUs or TPUs the devices are there: leave `jax_num_cpu_devices` out. On several hosts, call
`jax.distributed.initialize()` first, in one process per host (under SLURM, MPI or on TPUs it finds the others by
itself; elsewhere pass it `coordinator_address`, `num_processes` and `process_id`); `jax.devices()` then holds those of
all hosts. Make each array from what its host has read, with `jax.make_array_from_process_local_data`, in place of
`jax.device_put`. Nothing else changes. Let tp be the devices of one host, the innermost dimension of the mesh.
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
    # Before JAX looks for its devices. Where XLA_FLAGS says how many there are, it is to be believed.
    if jax.config.jax_num_cpu_devices < 0:
        jax.config.update("jax_num_cpu_devices", DATA_PARALLEL * TENSOR_PARALLEL)
    jax.config.update("jax_platforms", "cpu")
    mesh = jax.make_mesh((DATA_PARALLEL, TENSOR_PARALLEL), ("dp", "tp"), axis_types=(AxisType.Auto, AxisType.Auto))
    with jax.set_mesh(mesh):
        return _results(problem, mesh)


def _results(problem: Problem, mesh: jax.sharding.Mesh) -> Results:
    def placed(value: Any, *axes: str | None) -> jax.Array:
        return jax.device_put(value, NamedSharding(mesh, P(*axes)))

    labels = placed(problem.labels_BS, "dp")
    hidden_states = placed(problem.hidden_BSH, "dp")
    # P("tp") where V divides by the axis: then no device ever holds the whole head.
    lm_weight = placed(problem.weight_VH)
    logits = placed(problem.hidden_BSH @ problem.weight_VH.T, "dp")
    teacher_logits = placed(problem.teacher_BSV, "dp")

    found: Results = {}

    def record(name: str, loss_fn: Callable[..., jax.Array], **inputs: jax.Array) -> None:
        loss, grads = jax.jit(jax.value_and_grad(lambda given: loss_fn(**given)))(inputs)
        norms = {key: float(jnp.linalg.norm(grad)) for key, grad in grads.items()}
        found[name] = {"loss": float(loss), **norms}

    count = problem.num_label_tokens
    fused = FusedLinearCEConfig(tp_group="tp").build(backend=problem.backend)
    record(
        "FusedLinearCrossEntropy",
        lambda **given: fused(labels=labels, num_label_tokens=count, **given),
        hidden_states=hidden_states,
        lm_weight=lm_weight,
    )

    masked = MaskedCrossEntropyConfig(tp_group="tp").build(backend=problem.backend)
    record("MaskedCrossEntropy", lambda **given: masked(labels=labels, num_label_tokens=count, **given), logits=logits)

    distil = KDLossConfig(temperature=2.0, tp_group="tp").build(backend=problem.backend)
    record(
        "KDLoss",
        lambda **given: distil(teacher_logits=teacher_logits, labels=labels, num_batch_labels=count, **given),
        student_logits=logits,
    )
    return found

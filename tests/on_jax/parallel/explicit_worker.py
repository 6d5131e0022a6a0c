"""Scenarios of test_sharded.py: arguments of one call with different shardings on a mesh of explicit axes.

For JAX, an array on no mesh is replicated.
"""

import sys

from sharded_worker import (
    AxisType,
    NamedSharding,
    P,
    assert_agrees,
    built,
    cases_of,
    jax,
    mesh_of,
    objective,
    on_device,
    upstream_of,
)

HEADS = ("FusedLinearCrossEntropy", "FusedLinearKDLoss", "FusedLinearTopKDistillation")
LOGITS = ("MaskedCrossEntropy", "KDLoss", "TopKDistillation")


def call(name, spec_of):
    """Check that a call is within the allowance of the oracle.

    Args:
        spec_of: PartitionSpec of an argument, by name, on the mesh (dp=2, tp=2); None for an array on no mesh.
    """
    (case,) = cases_of(name, 60, ("basic",))
    exact, given = on_device(case, "float32")
    mesh = mesh_of(dp=2, tp=2, kind=AxisType.Explicit)
    specs = {k: spec_of(k) for k in given}
    given = {k: x if specs[k] is None else jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in given.items()}
    varied = {k: given.pop(k) for k in case.grad_of}
    with jax.set_mesh(mesh):
        (_, value), grads = jax.jit(objective(built(case.config)))(varied, given, upstream_of(case, "float32"))
    assert_agrees(case, "float32", exact, value, grads)


def on_no_mesh():
    """All arguments on no mesh; or all but a sharded weight, or sharded rows."""
    for name in HEADS + LOGITS[:1]:
        call(name, lambda k: None)
    for name in HEADS[:2]:
        call(name, lambda k: P("tp") if "weight" in k else None)
        call(name, lambda k: P("dp") if "hidden" in k else None)


def replicated_beside_sharded_rows():
    """Rows sharded over one axis, and one of their other arrays replicated."""
    for name in LOGITS + HEADS[2:]:
        call(name, lambda k: P() if k in ("labels", "lm_weight", "teacher_indices") else P("dp"))
    call("TopKDistillation", lambda k: P() if k in ("teacher_logprobs", "teacher_indices") else P("dp"))
    call("TopKDistillation", lambda k: P() if k == "teacher_logprobs" else P("dp"))


SCENARIOS = {f.__name__: f for f in (on_no_mesh, replicated_beside_sharded_rows)}


def main():
    for name in sys.argv[1:]:
        SCENARIOS[name]()
        print("passed:", name, flush=True)


if __name__ == "__main__":
    main()

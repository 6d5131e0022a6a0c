"""Scenarios of test_sharded.py, in a separate process with four CPU devices.

Usage: sharded_worker.py SCENARIO...    prints "passed: SCENARIO" for each
"""

# T = tokens, V = vocabulary, H = hidden, R = shards

import dataclasses
import functools
import os
import sys

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from loss_core import BackendUnavailable
from loss_core.dtypes import round_to
from loss_core.losses import allowances, error_ratio, named_cases, oracle
from loss_core_jax.kernels.xla import CPU, XlaKernels

# Chunks of 4 or 16 tokens and tiles of 8 classes, so that small inputs go through every loop.
SIZES = CPU._replace(logits_bytes=0, row_bytes=0, pair_bytes=0, chunk=(4, 4), tile=8)
SMALL = XlaKernels(cpu=SIZES, accelerator=SIZES)

WITH_VOCAB_LAST = ("logits", "student_logits", "teacher_logits")


def mesh_of(**sizes):
    kind = sizes.pop("kind", AxisType.Auto)
    shape = tuple(sizes.values())
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return jax.sharding.Mesh(devices, tuple(sizes), axis_types=(kind,) * len(sizes))


def built(config, **changes):
    loss = type(config)(**{**vars(config), **changes}).build(backend="jax")
    return dataclasses.replace(loss, kernels=SMALL)


def on_device(case, dtype):
    """The arrays of a case as the tested dtype holds them, for the oracle and for JAX."""
    exact = {k: round_to(v, dtype) if v.dtype.kind == "f" else v for k, v in case.arrays.items()}
    given = {k: jnp.asarray(v, dtype if v.dtype.kind == "f" else None) for k, v in exact.items()}
    return exact, given


def objective(loss):
    """(varied, fixed, upstream) -> ((total, value), gradients of the varied arguments)."""

    def total(varied, fixed, upstream):
        value = loss(**varied, **fixed)
        return jnp.sum(value * upstream), value

    return jax.value_and_grad(total, has_aux=True)


def assert_agrees(case, dtype, exact, value, grads):
    """Check that loss and gradients are within the allowance of the oracle on the full problem."""
    expected = oracle.evaluate(case.config, exact, case.upstream)
    allowed = allowances(case.config, exact, expected, dtype, upstream=case.upstream)
    got = {"loss": (value, expected.loss), **{name: (grads[name], expected.grads[name]) for name in grads}}
    for name, (actual, want) in got.items():
        actual = np.asarray(actual)
        share = error_ratio(actual.astype(np.float64), want, allowed[name], str(actual.dtype))
        assert share.max(initial=0) <= 1, (type(case.config).__name__, case.name, dtype, name, share.max())


def specs_of(names, axis, rows=None):
    """PartitionSpecs that shard the vocabulary over one axis, and the rows over another."""
    found = {}
    for name in names:
        match name:
            case _ if name.endswith("lm_weight"):
                found[name] = P(axis, None)
            case _ if name.endswith("hidden_states"):
                found[name] = P(rows, None)
            case _ if name in WITH_VOCAB_LAST:
                found[name] = P(rows, axis)
            case _:
                found[name] = P(rows) if name in ("labels", "mask", "loss_weights") else P()
    return found


def upstream_of(case, dtype):
    return jnp.asarray(1.0 if case.upstream is None else case.upstream, "float64" if dtype == "float64" else "float32")


@functools.cache
def inside_function(loss, mesh, in_specs, rows, grad_outside, check_vma):
    """The call within jax.shard_map with its gradients, compiled once for cases that differ only in their values."""
    specs = tuple(map(dict, in_specs))
    whole = functools.partial(jax.shard_map, mesh=mesh, check_vma=check_vma)
    if not grad_outside:
        out_specs = ((P(), rows), specs[0])
        return jax.jit(whole(objective(loss), in_specs=(*specs, P()), out_specs=out_specs))
    sharded = whole(lambda v, f: loss(**v, **f), in_specs=specs, out_specs=rows)

    def call(**arrays):
        return sharded({k: arrays[k] for k in specs[0]}, {k: arrays[k] for k in specs[1]})

    return jax.jit(objective(call))


def inside(case, dtype, mesh, axis="tp", *, grad_outside=True, check_vma=True, factor=1, specs=None, **changes):
    """Check the call within jax.shard_map, differentiated outside or inside, and that devices agree bitwise.

    Args:
        factor: divides gradients of sharded arrays before the check.
        specs: PartitionSpecs that differ from `specs_of`, by name.
    """
    exact, given = on_device(case, dtype)
    varied = {name: given.pop(name) for name in case.grad_of}
    varied_specs = {**specs_of(varied, axis), **(specs or {})}
    in_specs = (tuple(varied_specs.items()), tuple(specs_of(given, axis).items()))
    rows = P(None) if getattr(case.config, "reduction", "") == "none" else P()
    loss = built(case.config, tp_group=axis, **changes)
    fn = inside_function(loss, mesh, in_specs, rows, grad_outside, check_vma)
    (_, value), grads = fn(varied, given, upstream_of(case, dtype))
    grads = {name: grad / factor if axis in varied_specs[name] else grad for name, grad in grads.items()}
    assert_agrees(case, dtype, exact, value, grads)
    copies = [np.asarray(shard.data) for shard in value.addressable_shards]
    assert len(copies) == mesh.size
    assert all((copy == copies[0]).all() for copy in copies), "devices disagree bitwise"


def outside(case, dtype, mesh, *, rows=None, axis="tp", place=False, **changes):
    """Check the call outside of jax.shard_map, with the mesh set, and with `place` the arrays sharded over it."""
    exact, given = on_device(case, dtype)
    if place:
        specs = specs_of(given, axis, rows)
        given = {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in given.items()}
    varied = {name: given.pop(name) for name in case.grad_of}
    fn = objective(built(case.config, **changes))
    with jax.set_mesh(mesh):
        (_, value), grads = jax.jit(fn)(varied, given, upstream_of(case, dtype))
    assert_agrees(case, dtype, exact, value, grads)
    if place and mesh.explicit_axes:
        assert all(jax.typeof(grads[k]).sharding.spec == specs[k] for k in varied), "a gradient lies elsewhere"


def cases_of(name, vocab, only, tokens=24):
    return [case for case in named_cases(name, shape=(tokens, vocab)) if case.name in only]


# --- scenarios


LOSSES = ("MaskedCrossEntropy", "FusedLinearCrossEntropy", "KDLoss", "FusedLinearKDLoss")
CLASSES = LOSSES[:2]  # whose labels are classes


def oracle_float32():
    """Every kind of call, over two devices."""
    only = ("mean", "none", "all-ignored", "huge-logits", "minus-inf", "mask", "loss-weights", "nan-where-ignored",
            "temperature", "softcap-none", "no-upcast", "offset", "reverse", "jsd", "jsd-ruled-out")  # fmt: skip
    for name in LOSSES[:3]:
        for case in cases_of(name, 60, only):
            inside(case, "float32", mesh_of(tp=2))
    # The arithmetic of a pair of rows is tested with KDLoss.
    for case in cases_of("FusedLinearKDLoss", 60, ("all-ignored", "huge-logits", "nan-where-ignored", "jsd-heads")):
        inside(case, "float32", mesh_of(tp=2))


def oracle_shards():
    """One, three and four shards, and two axes at once; the case that depends on the order of the shards."""
    for name in CLASSES:
        (case,) = cases_of(name, 60, ("edge-labels",))
        for ranks in (1, 3):
            inside(case, "float32", mesh_of(tp=ranks))
        inside(case, "float32", mesh_of(a=2, b=2), axis=("a", "b"))
    (case,) = cases_of("KDLoss", 60, ("jsd",))
    inside(case, "float32", mesh_of(tp=3))
    (case,) = cases_of("TEParallelCrossEntropy", 60, ("mean",))
    inside(case, "bfloat16", mesh_of(tp=4))


def oracle_dtypes():
    # `uneven` and `sequence_parallel` are in bfloat16.
    for dtype in ("float16", "float64"):
        with jax.enable_x64(dtype == "float64"):
            for name in LOSSES:
                for case in cases_of(name, 60, ("basic",)):
                    inside(case, dtype, mesh_of(tp=2))


def where_the_gradient_is_taken():
    mesh = mesh_of(tp=3)
    for name, only in (("MaskedCrossEntropy", "none"), ("FusedLinearCrossEntropy", "softcap-none")):
        for case in cases_of(name, 60, (only,)):
            inside(case, "float32", mesh, grad_outside=False)
            inside(case, "float32", mesh, check_vma=False)
            # As for every psum there: the gradient of the sum of the loss over the devices.
            inside(case, "float32", mesh, check_vma=False, grad_outside=False, factor=3)
    (case,) = cases_of("FusedLinearKDLoss", 60, ("jsd-heads",))
    inside(case, "float32", mesh, grad_outside=False)


def sequence_parallel():
    by_dp_and_tp = mesh_of(dp=2, tp=2, kind=AxisType.Explicit)
    over_both = {"rows": "dp", "place": True, "tp_group": "tp", "sequence_parallel": True}
    (case,) = cases_of("FusedLinearCrossEntropy", 60, ("softcap-none",))
    mine = {"hidden_states": P("tp", None)}
    for taken in ({}, {"grad_outside": False}, {"check_vma": False}):
        inside(case, "bfloat16", mesh_of(tp=2), specs=mine, sequence_parallel=True, **taken)
    outside(case, "bfloat16", mesh_of(tp=4), tp_group="tp", sequence_parallel=True)
    outside(case, "bfloat16", by_dp_and_tp, **over_both)
    # Weights of the tokens, and two heads; `grad_outside` and `check_vma` do not depend on these.
    (case,) = cases_of("FusedLinearCrossEntropy", 60, ("loss-weights",))
    inside(case, "bfloat16", mesh_of(tp=2), specs=mine, sequence_parallel=True)
    (case,) = cases_of("FusedLinearKDLoss", 60, ("jsd-heads",))
    outside(case, "bfloat16", by_dp_and_tp, **over_both)


def hidden_states_that_vary():
    """Hidden states that the caller gathers: each device's copy has a separate gradient, and JAX sums them."""
    (case,) = cases_of("FusedLinearCrossEntropy", 60, ("mean",))
    exact, given = on_device(case, "float32")
    loss = built(case.config, tp_group="tp")

    def gathered(hidden, weight, labels):
        return loss(jax.lax.all_gather(hidden, "tp", axis=0, tiled=True), labels, weight)

    specs = (P("tp", None), P("tp", None), P())
    fn = jax.shard_map(gathered, mesh=mesh_of(tp=2), in_specs=specs, out_specs=P())
    both = jax.jit(jax.value_and_grad(fn, argnums=(0, 1)))
    value, grads = both(given["hidden_states"], given["lm_weight"], given["labels"])
    assert_agrees(case, "float32", exact, value, dict(zip(("hidden_states", "lm_weight"), grads, strict=True)))


def uneven():
    """Shards that the loss pads, with small logits, where bad padding shows; with V = 5, the last is only padding."""
    for name in LOSSES:
        for case in cases_of(name, 5, ("ragged",)):
            outside(case, "float32", mesh_of(tp=4), tp_group="tp")
        if name in CLASSES:
            for case in cases_of(name, 61, ("ragged",)):
                outside(case, "float32", mesh_of(dp=2, tp=2, kind=AxisType.Explicit), tp_group=("dp", "tp"))
        if name != "FusedLinearKDLoss":  # in bfloat16 in `sequence_parallel`
            for case in cases_of(name, 61, ("edge-labels",)):
                outside(case, "bfloat16", mesh_of(dp=2, tp=2), tp_group="tp")


def placed():
    """Arrays sharded over a 2 x 2 mesh, rows over one axis and the vocabulary over the other."""
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = mesh_of(dp=2, tp=2, kind=kind)
        for name in LOSSES if kind == AxisType.Explicit else LOSSES[:3]:
            (case,) = cases_of(name, 60, ("count",))
            outside(case, "float32", mesh, rows="dp", place=True)
            if kind == AxisType.Explicit:  # a named axis of an automatic mesh is in `uneven`
                outside(case, "float32", mesh, rows="dp", place=True, tp_group="tp")
    for name in LOSSES:
        (case,) = cases_of(name, 60, ("edge-labels",))
        exact, given = on_device(case, "float32")
        specs = specs_of(given, "tp", "dp")
        given = {k: jax.device_put(x, NamedSharding(mesh_of(dp=2, tp=2), specs[k])) for k, x in given.items()}
        # Eager, where each operation is a program, without a mesh set; axis names are resolved the same in every loss.
        ways = {"MaskedCrossEntropy": ({}, {"tp_group": "tp"}), "FusedLinearCrossEntropy": ({},)}
        for changes in ways.get(name, ()):
            assert_agrees(case, "float32", exact, built(case.config, **changes)(**given), {})
        if name == "FusedLinearCrossEntropy":
            # Under jax.grad the sharding of the hidden states is not readable, that of the weight is.
            varied = {"hidden_states": given.pop("hidden_states")}
            (_, value), grads = objective(built(case.config))(varied, given, 1.0)
            assert_agrees(case, "float32", exact, value, grads)


def rows_and_vocabulary_manual():
    """Both axes of the mesh manual; the caller sums over the rows' one."""
    mesh = mesh_of(dp=2, tp=2)
    for name in CLASSES:
        (case,) = cases_of(name, 60, ("count",))
        exact, given = on_device(case, "float32")
        varied = {k: given.pop(k) for k in case.grad_of}
        loss = built(case.config, tp_group="tp")
        specs = (specs_of(varied, "tp", "dp"), specs_of(given, "tp", "dp"))
        sharded = jax.shard_map(
            lambda v, f, loss=loss: jax.lax.psum(loss(**v, **f), "dp"), mesh=mesh, in_specs=specs, out_specs=P()
        )
        value, grads = jax.jit(jax.value_and_grad(sharded))(varied, given)
        grads = {name: grad * case.upstream for name, grad in grads.items()}
        assert_agrees(case, "float32", exact, value, grads)


def errors():
    (case,) = cases_of("FusedLinearCrossEntropy", 60, ("count",))
    _, given = on_device(case, "float32")
    mesh = mesh_of(dp=2, tp=2)

    def call(group="tp", arrays=given, **changes):
        return built(case.config, tp_group=group, **changes)(**arrays)

    def inside_mesh(fn):
        jax.eval_shape(jax.shard_map(fn, mesh=mesh, in_specs=(), out_specs=P()))

    with jax.set_mesh(mesh):
        with pytest.raises(ValueError, match="'model' can't be used here; the axes of the mesh are 'dp', 'tp'"):
            call("model")
        inside_mesh(call)
        with pytest.raises(ValueError, match="the axes of the mesh are 'dp', 'tp', of which 'dp', 'tp' manual already"):
            inside_mesh(lambda: call("model"))
        odd = {k: x[:23] if k in ("hidden_states", "labels") else x for k, x in given.items()}
        with pytest.raises(ValueError, match=r"hidden_states has shape \(23, 24\).* in 2 equal shares over .*'tp'"):
            call(arrays=odd, sequence_parallel=True)
        # Inside, hidden states are shares already: 24 of them make 48 rows.
        with pytest.raises(ValueError, match=r"labels has shape \(24,\) but hidden_states has shape \(48, 24\)"):
            inside_mesh(lambda: call(sequence_parallel=True))
        # Labels are classes of the full vocabulary.
        labels = np.full(24, 119)
        inside_mesh(lambda: call(arrays={**given, "labels": labels}))
        with pytest.raises(ValueError, match=r"labels\[0\] is 120, outside \[0, 120\)"):
            inside_mesh(lambda: call(arrays={**given, "labels": labels + 1}))
        with pytest.raises(BackendUnavailable, match=r"skip_ignored=True.* with a sharded vocabulary"):
            call(skip_ignored=True)
        with pytest.raises(BackendUnavailable, match="num_valid_tokens=4 with a sharded vocabulary"):
            call(arrays={**given, "num_valid_tokens": 4})


def second_derivatives(losses=LOSSES[:3]):
    mesh = mesh_of(tp=2)
    for name in losses:
        (case,) = cases_of(name, 12, ("ragged",), tokens=5)
        _, given = on_device(case, "float32")
        varied = {k: given.pop(k) for k in case.grad_of}
        plain, parallel = built(case.config), built(case.config, tp_group="tp")
        specs = (specs_of(varied, "tp"), specs_of(given, "tp"))
        sharded = jax.shard_map(lambda v, f, loss=parallel: loss(**v, **f), mesh=mesh, in_specs=specs, out_specs=P())

        def squared(fn, fixed=given):
            def norm(v):
                return sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(fn)(v, fixed)))

            return jax.jit(jax.grad(norm))

        want = squared(lambda v, f, loss=plain: loss(**v, **f))(varied)
        got = squared(sharded)(varied)
        for k in varied:
            np.testing.assert_allclose(got[k], want[k], rtol=1e-4, atol=1e-6)


def second_derivatives_of_linear_distillation():
    second_derivatives(LOSSES[3:])


SCENARIOS = {
    f.__name__: f
    for f in (
        oracle_float32,
        oracle_shards,
        oracle_dtypes,
        where_the_gradient_is_taken,
        sequence_parallel,
        hidden_states_that_vary,
        uneven,
        placed,
        rows_and_vocabulary_manual,
        errors,
        second_derivatives,
        second_derivatives_of_linear_distillation,
    )
}


def main(scenarios):
    for name in sys.argv[1:]:
        scenarios[name]()
        print("passed:", name, flush=True)


if __name__ == "__main__":
    main(SCENARIOS)

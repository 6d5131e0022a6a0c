"""The collectives of a sharded loss, read from the compiled program; see test_sharded.py.

T = 64, V = 480 and H = 24 differ, even divided by 1, 2 or 4, so that a shape identifies an array.
"""

# T = tokens, V = vocabulary, H = hidden

import re

from sharded_worker import SMALL, AxisType, NamedSharding, P, built, jax, jnp, main, mesh_of

from loss_core import FusedLinearCEConfig, KDLossConfig, MaskedCrossEntropyConfig
from loss_core.row_terms import CrossEntropy
from loss_core_jax.kernels import RowOptions
from loss_core_jax.losses.rows import PerRow, RowLoss, results_from_logits
from loss_core_jax.parallel.layout import UNSHARDED

T, H = 64, 24
CONFIGS = (MaskedCrossEntropyConfig(reduction="mean"), FusedLinearCEConfig(), KDLossConfig(temperature=2.0))
COLLECTIVE = re.compile(
    r"= ([^=]*?) ((?:ragged-)?all-to-all|all-gather|all-reduce|reduce-scatter|collective-[a-z]+)(?:-start)?\("
)


def collectives(fn, *args):
    """(operation, shapes of its results) for each collective of the compiled program."""
    text = jax.jit(fn).lower(*args).compile().as_text()
    return [
        (op, tuple(tuple(map(int, dims.split(","))) for dims in re.findall(r"\w+\[([\d,]+)\]", result)))
        for result, op in COLLECTIVE.findall(text)
    ]


def moves_logits(moved, vocab):
    """The collectives with a result as long as the vocabulary, or a shard of it, that is not of the weight."""
    v_long, h_long = {vocab, vocab // 2, vocab // 4}, {H, H // 2}
    return [
        (op, shapes) for op, shapes in moved if any(v_long & set(shape) and not h_long & set(shape) for shape in shapes)
    ]


def shaped(mesh, shape, dtype, *spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


def compiled(config, mesh, vocab, *, rows=None, weight=("tp", None), group=None, dtype="float32"):
    """Collectives of loss and gradients, with arrays on a mesh that is set."""
    labels = shaped(mesh, (T,), "int32", rows)
    loss = built(config, tp_group=group)
    if isinstance(config, FusedLinearCEConfig):
        args = (shaped(mesh, (T, H), dtype, rows, None), shaped(mesh, (vocab, H), dtype, *weight), labels)
        fn = jax.value_and_grad(lambda h, w, y: loss(h, y, w), argnums=(0, 1))
    elif isinstance(config, KDLossConfig):
        logits = shaped(mesh, (T, vocab), dtype, rows, "tp")
        args, fn = (logits, logits, labels), jax.value_and_grad(loss, argnums=(0, 1))
    else:
        args = (shaped(mesh, (T, vocab), dtype, rows, "tp"), labels)
        fn = jax.value_and_grad(loss)
    with jax.set_mesh(mesh):
        return collectives(fn, *args)


def inside_shard_map():
    """One all-gather of the row state forward; backward nothing, or the sum of the hidden states' gradient."""
    mesh = mesh_of(tp=4)
    for config in CONFIGS:
        fused, kd = isinstance(config, FusedLinearCEConfig), isinstance(config, KDLossConfig)
        loss = built(config, tp_group="tp")
        logits, y = jnp.zeros((T, 480)), jnp.zeros(T, int)
        args = (jnp.zeros((T, H)), jnp.zeros((480, H)), y) if fused else (logits, logits, y) if kd else (logits, y)
        specs = (P(), P("tp", None), P()) if fused else (P(None, "tp"),) * (len(args) - 1) + (P(),)

        def call(*args, fused=fused, loss=loss):
            return loss(args[0], args[2], args[1]) if fused else loss(*args)

        sharded = jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=P())
        forward = [("all-gather", ((4, 5 if kd else 3, T),))]
        backward = [("all-reduce", ((T, H),))] if fused else []
        assert collectives(sharded, *args) == forward, config
        both = jax.value_and_grad(sharded, argnums=(0, 1) if fused or kd else 0)
        assert collectives(both, *args) == forward + backward, (config, collectives(both, *args))


def no_logits_move():
    """No collective has the logits or grows with the vocabulary, except for weights under FSDP and data parallelism."""
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = mesh_of(dp=2, tp=2, kind=kind)
        for config in CONFIGS:
            fused = isinstance(config, FusedLinearCEConfig)
            weights = [("tp", None), ("dp", None), ("tp", "dp"), (None, "dp"), (("tp", "dp"), None)]
            # XLA partitions the same for explicit axes.
            weights = weights if kind == AxisType.Auto else weights[:1]
            for weight in weights if fused else [None]:
                moved = compiled(config, mesh, 480, rows="dp", weight=weight)
                assert moved
                assert not moves_logits(moved, 480), (kind, config, weight, moves_logits(moved, 480))
            # With rows that are not sharded, no weight's gradient is moved either.
            if kind == AxisType.Auto:
                assert compiled(config, mesh, 480) == compiled(config, mesh, 960)
            named = compiled(config, mesh, 480, rows="dp", group="tp", dtype="bfloat16")
            assert not moves_logits(named, 480), (kind, config, named)
            states = [
                shapes for _, shapes in named if (2, 5 if isinstance(config, KDLossConfig) else 3, T // 2) in shapes
            ]
            assert len(states) == 1, named


def moved_logits_are_detected():
    """In a plain loop over chunks of rows XLA gathers the logits, which the other scenarios must be able to detect."""
    mesh = mesh_of(dp=2, tp=2)
    # bfloat16: float32 logits are not processed in chunks.
    logits, target = shaped(mesh, (T, 480), "bfloat16", "dp", "tp"), shaped(mesh, (T,), "int32", "dp")
    row_loss = RowLoss(SMALL, CrossEntropy(480), RowOptions(), 480)

    def total(logits, target):
        return results_from_logits(logits, PerRow(target), row_loss, UNSHARDED)[0][0].sum()

    with jax.set_mesh(mesh):
        # As if nothing were sharded.
        moved = collectives(jax.grad(total), logits, target)
    assert moves_logits(moved, 480), moved


SCENARIOS = {f.__name__: f for f in (inside_shard_map, no_logits_move, moved_logits_are_detected)}


if __name__ == "__main__":
    main(SCENARIOS)

"""APIs of JAX that are private or differ between versions."""

import jax
import jax.numpy as jnp

from loss_core_jax.compat import limit_compiled_programs


def test_programs_are_dropped_above_a_limit():
    """Thousands of random cases compile thousands of programs, and a process can hold about three thousand."""
    programs = jax.devices()[0].client.live_executables
    jax.clear_caches()
    kept = [jax.jit(lambda x, n=n: x * n) for n in range(3)]
    assert [float(program(jnp.float32(2.0))) for program in kept] == [0, 2, 4]
    count = len(programs())
    assert count >= 3
    limit_compiled_programs(count)
    assert len(programs()) == count
    limit_compiled_programs(count - 1)
    assert not programs()
    assert float(kept[2](jnp.float32(2.0))) == 4

"""What differs between versions of JAX, or is private."""

import jax
import jax.numpy as jnp

from loss_core_jax.compat import forget_programs


def test_programs_are_dropped_beyond_a_number_of_them():
    """Thousands of random cases compile thousands of programs, and a process may hold some three thousand."""
    programs = jax.devices()[0].client.live_executables
    jax.clear_caches()
    kept = [jax.jit(lambda x, n=n: x * n) for n in range(3)]
    assert [float(program(jnp.float32(2.0))) for program in kept] == [0, 2, 4]
    number = len(programs())
    assert number >= 3
    forget_programs(number)
    assert len(programs()) == number
    forget_programs(number - 1)
    assert not programs()
    assert float(kept[2](jnp.float32(2.0))) == 4

"""Every JAX kernel x loss x case x dtype against float64."""

from helpers import matrix


@matrix.cells("jax")
def test_against_float64(flag, loss, case, dtype):
    matrix.assert_agrees(flag, loss, case, dtype)

"""Every kernel of torch x loss x case x dtype against float64."""

from helpers import interpreter, matrix


@matrix.cells("torch", interpreted=[interpreter.FLAG] if interpreter.possible() else [])
def test_against_float64(flag, loss, case, dtype):
    # The interpreter processes rows one by one.
    matrix.assert_agrees(flag, loss, case, dtype, shape=(5, 67) if flag == interpreter.FLAG else None)

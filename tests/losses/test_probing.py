"""A bound that is read off a loss: by hand for losses that multiply."""

import numpy as np

from helpers.roundings import NEAR_ZERO, U
from loss_core.dtypes import float_format
from loss_core.losses.probing import Sensitivity


def test_a_disturbance_of_each_input_is_scaled_by_how_roundings_add_up():
    # Relative to inputs of at least 1, absolute below.
    x, calls = np.array([2.0, 0.5, -4.0]), []

    def run(arrays):
        calls.append(arrays)
        return {"y": 3 * arrays["x"] * arrays["k"], "zero": 0 * arrays["x"]}

    probe = Sensitivity(run, {"x": x, "k": np.full(3, 7.0)}, ["x"], U)
    assert len(calls) == 1 + 8
    found = probe.allowed(2 * U, {"y": float_format("bfloat16"), "zero": float_format("bfloat16")})
    moved, growth = 21 * np.array([2.0, 1.0, 4.0]), 3 + 16
    bound = growth * (moved + 21 * np.abs(x)) * 2 * U + 2.0**-8 * 21 * np.abs(x)
    np.testing.assert_allclose(found["y"], bound, rtol=1e-7)
    assert found["zero"].tolist() == [NEAR_ZERO] * 3


def test_a_disturbance_that_gives_no_number_does_not_hide_another():
    found = Sensitivity(lambda x: {"y": np.where(x["x"] < 0, np.nan, x["x"])}, {"x": np.zeros(1)}, ["x"], U)
    assert found.allowed(U, {"y": float_format("float32")})["y"] >= (1 + 16) * U


def test_the_longest_axis_counts():
    long = Sensitivity(lambda arrays: {"y": arrays["x"]}, {"x": np.ones(2), "z": np.ones((3, 5))}, ["x"], U)
    bound = (5 + 16) * 2 * U + U
    np.testing.assert_allclose(long.allowed(U, {"y": float_format("float32")})["y"], bound, rtol=1e-6)

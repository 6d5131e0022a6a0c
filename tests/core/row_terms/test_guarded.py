"""Logarithms and products with infinities."""

import numpy as np

from loss_core.row_terms import guarded


def test_a_guarded_logarithm_is_minus_infinity_at_0_and_nan_below():
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(guarded.log(np, np.array([0.0, 1.0, -1.0])), [-np.inf, 0, np.nan])


def test_only_a_weight_of_0_removes_an_infinite_value():
    found = guarded.weighted(np, np.array([0.0, 0.0, -2.0, 0.5]), np.array([np.inf, np.nan, 3.0, -np.inf]))
    np.testing.assert_array_equal(found, [0, 0, -6, -np.inf])

"""Errors before rounding: no correct result fails, and every error that can be detected is."""

import numpy as np
import pytest

from loss_core.dtypes import FORMATS, float_format, round_to
from loss_core.losses.bounds.errors import errors_as_stored, errors_before_rounding, is_rounded, smallest_found
from loss_core.losses.bounds.rounding import stored

NARROW = [name for name in FORMATS if is_rounded(name)]


def values(dtype, size=20_000):
    """Numbers over the range of the format; some are powers of two, halfway between two numbers, or equal."""
    rng, fmt = np.random.default_rng(0), float_format(dtype)
    exponents = rng.integers(int(np.log2(fmt.tiny)) - 4, int(np.log2(fmt.max)), size)
    numbers = np.ldexp(rng.uniform(1, 2, size), exponents) * rng.choice([-1, 1], size)
    powers = np.ldexp(np.sign(numbers), exponents)
    halfway = round_to(numbers, dtype) * (1 + fmt.u)
    return np.choose(rng.integers(0, 5, size), [numbers, numbers, powers, halfway, np.full(size, 0.3)])


def test_narrow_formats_are_those_of_16_bits():
    assert NARROW == ["bfloat16", "float16"]


@pytest.mark.parametrize("dtype", NARROW)
def test_a_result_within_its_allowance_stays_within_it_when_rounded(dtype):
    rng, expected = np.random.default_rng(1), values(dtype)
    error = np.abs(expected) * 10.0 ** rng.uniform(-9, 0, expected.size)
    off = error * rng.choice([-1, 1, 0.5, 0, -0.99], expected.size)
    allowed = stored(expected, error, float_format(dtype))
    found = errors_before_rounding(round_to(expected + off, dtype), expected, allowed, dtype)
    assert np.max(found.ratio) <= 1 + 1e-9
    assert np.min(found.ratio) == 0
    assert np.all((found.error <= np.abs(off) * (1 + 1e-9)) | (found.ratio == 0))


@pytest.mark.parametrize("dtype", NARROW)
def test_a_result_to_which_no_allowed_value_rounds_fails(dtype):
    expected = values(dtype, 2000)
    error = np.abs(expected) * 10.0 ** np.random.default_rng(2).uniform(-5, -2, expected.size)
    allowed = stored(expected, error, float_format(dtype))
    inside = round_to(expected + error * np.linspace(-1, 1, 501)[:, None], dtype)
    for step in (-1, 1):
        # One number further than any that is explained.
        edge = (np.max if step > 0 else np.min)(inside, axis=0)
        got = round_to(edge * (1 + step * np.sign(edge) * 2 * float_format(dtype).u), dtype)
        # Only where the flush to 0 near 0 is negligible.
        large = (np.abs(edge) > 1e6 * float_format(dtype).near_zero) & np.isfinite(got)
        assert np.sum(large) > 500
        assert np.min(errors_before_rounding(got, expected, allowed, dtype).ratio[large]) > 1


def test_a_result_in_the_compute_dtype_is_compared_as_stored():
    got, expected, allowed = np.array([1.0, 2.5]), np.array([1.0, 2.0]), np.array([0.1, 0.1])
    for dtype in ("float32", "float64"):
        for errors_of in (errors_before_rounding, errors_as_stored):
            found = errors_of(got, expected, allowed, dtype)
            np.testing.assert_allclose(found.ratio, [0, 5])
            np.testing.assert_array_equal(found.error, [0, 0.5])
            np.testing.assert_array_equal(found.allowed, allowed)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_result_of_0_is_off_by_its_full_size(sign, dtype):
    got, expected = np.zeros(2), sign * np.array([1.0, 0.25])
    fmt = float_format(dtype)
    allowed = stored(expected, np.array([0.5, 0.5]), fmt)
    found = errors_before_rounding(got, expected, allowed, dtype)
    np.testing.assert_allclose(found.error, [1, 0.25], rtol=1e-4)
    np.testing.assert_allclose(found.ratio, [2, 0.5], rtol=1e-4)


def test_an_allowed_error_of_0_stays_0_before_rounding():
    found = errors_before_rounding(np.array([0.0, 1e-30]), np.zeros(2), np.zeros(2), "bfloat16")
    assert (found.allowed.tolist(), found.ratio.tolist()) == ([0, 0], [0, np.inf])


def test_special_values_are_compared_as_stored():
    nan, inf = np.nan, np.inf
    got = np.array([nan, inf, 1.0, nan, inf, -inf, 0.0, 1e-30])
    expected = np.array([nan, inf, nan, 1.0, 70000.0, 70000.0, 0.0, 0.0])
    allowed = np.array([1, 1, 1, 1, 40, 40, 0, 0])
    ratio = errors_before_rounding(got, expected, allowed, "float16").ratio
    np.testing.assert_array_equal(ratio, [0, 0, inf, inf, 0, inf, 0, inf])


@pytest.mark.parametrize("dtype", list(FORMATS))
@pytest.mark.parametrize("rounded", [True, False])
def test_errors_above_the_smallest_found_fail_and_smaller_ones_pass(dtype, rounded):
    rng, fmt = np.random.default_rng(3), float_format(dtype)
    errors_of = errors_before_rounding if rounded else errors_as_stored
    for size in (1, 10, 1000):
        expected = rng.standard_normal(size)
        allowed = stored(expected, np.abs(expected) * fmt.u * 1e-3, fmt)
        least = smallest_found(expected, allowed, dtype, rounded)

        def worst(d, expected=expected, allowed=allowed):
            got = expected * (1 + d)
            got = round_to(got, dtype) if rounded and is_rounded(dtype) else got
            return float(np.max(errors_of(got, expected, allowed, dtype).ratio))

        assert min(worst(1.001 * least), worst(-1.001 * least)) > 1
        assert min(worst(0.999 * least), worst(-0.999 * least)) <= 1


def test_an_error_common_to_many_elements_is_found_below_the_rounding_of_one():
    expected, fmt = np.random.default_rng(4).standard_normal(1000), float_format("bfloat16")
    allowed = stored(expected, 1e-6 * np.abs(expected), fmt)
    assert smallest_found(expected, allowed, "bfloat16", rounded=True) < 3e-5 < fmt.u / 100
    assert smallest_found(expected, allowed, "bfloat16", rounded=False) > fmt.u


def test_zeros_have_no_relative_error():
    assert smallest_found(np.zeros(5), np.ones(5), "bfloat16", rounded=True) == np.inf
    assert smallest_found(np.zeros(0), np.zeros(0), "float32", rounded=True) == np.inf

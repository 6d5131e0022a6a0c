"""Exponentials of a block in base 2, their sums, and the gradient computed from them."""

import math

import pytest
import torch

from loss_core.row_terms import Coefficients
from loss_core_torch.kernels.eager import exponentials
from loss_core_torch.kernels.eager.exponentials import log2_exp, remove_offset, row_dots, row_sums


@pytest.mark.parametrize("columns", [33, 40_000, 300_000])
def test_a_sum_does_not_depend_on_the_number_of_rows(columns):
    # With two threads, PyTorch splits the sum of a single row of more than 32,768.
    torch.manual_seed(0)
    x_BV, y_BV = torch.rand(5, columns), torch.rand(5, columns)
    for rows in (slice(0, 1), slice(4, 5), slice(1, 3)):
        assert torch.equal(row_sums(x_BV[rows]), row_sums(x_BV)[rows])
        assert torch.equal(row_dots(x_BV[rows], y_BV[rows]), row_dots(x_BV, y_BV)[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("largest", [0.0, 64.0, -8192.0, 2.0**17, 2.0**24, 1e30, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_the_powers_of_two_are_the_exponentials(dtype, largest, factor):
    # Multiples of 1/8, and powers of two as factors: factor z and factor z - m are exact.
    torch.manual_seed(0)
    z_BV = (torch.randn(3, 50, dtype=dtype) * 8).round() / 8
    z_BV[1] += largest  # the second row alone: it must not affect the others
    m_B = z_BV.amax(-1) * factor
    offset_B = log2_exp(z_BV, factor, m_B, y_BV := torch.empty_like(z_BV))
    got_B = remove_offset(y_BV.exp2().sum(-1), offset_B)
    shift_B = torch.where(m_B == -math.inf, 0.0, m_B.double())
    want_B = (z_BV.double() * factor - shift_B[:, None]).exp().sum(-1)
    torch.testing.assert_close(got_B.double(), want_B, rtol=32 * torch.finfo(dtype).eps, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("offset", [0.0, 3000.0, 2.0**24])
def test_a_class_of_probability_zero_adds_zero(dtype, offset):
    """0 * -inf is 0, in the sum of exp(x) x and in a gradient with a slope."""
    z_BC = torch.tensor([[0.0, -1.0, -math.inf, -1e30], [5.0, 5.0, 5.0, -2000.0]], dtype=dtype) + offset
    m_B = z_BC.amax(-1)
    offset_B = log2_exp(z_BC, 1.0, m_B, y_BC := torch.empty_like(z_BC))
    exponents_BC = exponentials.finite_exponents(y_BC, torch.empty_like(y_BC))
    exp2_BC = y_BC.exp2()
    s_B = remove_offset(row_sums(exp2_BC), offset_B)
    want_BC = z_BC.double() - m_B.double()[:, None]
    terms_BC = torch.where(want_BC.exp() == 0, 0.0, want_BC.exp() * want_BC)
    rtol = 32 * torch.finfo(dtype).eps
    got_B = exponentials.exponent_sums(exp2_BC, exponents_BC, offset_B, s_B)
    torch.testing.assert_close(got_B.double(), terms_BC.sum(-1), rtol=rtol, atol=rtol)
    scale_B, slope_B, uniform_B = (torch.tensor(x, dtype=dtype) for x in ([0.5, -1.0], [2.0, 3.0], [0.0, 0.25]))
    exponentials.write_gradient(
        exp2_BC, offset_B, Coefficients(scale_B, scale_B, uniform_B, slope_B), exponents_BC, None, exp2_BC
    )
    expected_BC = want_BC.exp() * scale_B[:, None] + terms_BC * slope_B[:, None] - uniform_B[:, None]
    torch.testing.assert_close(exp2_BC.double(), expected_BC, rtol=rtol, atol=rtol)

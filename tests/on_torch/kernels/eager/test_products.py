"""Matrix products by MKL and by oneDNN."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.operations import Operations
from loss_core.losses.bounds.rounding import sum_growth
from loss_core_torch import compat
from loss_core_torch.kernels.eager.products import Products

CPU = torch.device("cpu")


def _products(by_onednn, dtype=torch.float32):
    products = Products(dtype, CPU, by_onednn)
    assert products.by_onednn == (by_onednn and dtype == torch.float32)
    return products


def _bound(a, b):
    """Error bound of sums in float32."""
    return sum_growth(a.shape[1]) * 2.0**-24 * (a.double().abs() @ b.double().abs())


def test_a_product_is_within_its_bound_for_operands_in_any_order(by_onednn):
    torch.manual_seed(0)
    multiply = _products(by_onednn)
    for rows, inner, columns in [(1, 1, 1), (7, 33, 41), (64, 130, 257)]:
        a, b = torch.randn(rows, inner + 3), torch.randn(inner, columns)
        for left in (a[:, :inner], a[:, :inner].t().contiguous().t(), a[:, 3:]):
            for right in (b, b.t().contiguous().t()):
                exact, bound = left.double() @ right.double(), _bound(left, right)
                written, added = torch.full((rows, columns), torch.nan), torch.ones(rows, columns)
                multiply.into(written, left, right)
                multiply.add(added, left, right)
                assert ((multiply.new(left, right) - exact).abs() <= bound).all()
                assert ((written - exact).abs() <= bound).all()
                # The sum with 1 is rounded as well.
                assert ((added - 1 - exact).abs() <= bound + 2.0**-23 * (exact.abs() + 1)).all()


@pytest.mark.parametrize("num_products", [1, 2, 3])
def test_accumulate_sums_products(by_onednn, num_products):
    torch.manual_seed(1)
    multiply, out = _products(by_onednn), torch.full((9, 6), torch.nan)
    pairs = [(torch.randn(5, 9), torch.randn(5, 6)) for _ in range(num_products)]
    for i, (a_KM, b_KN) in enumerate(pairs):
        multiply.accumulate(out, a_KM, b_KN, b_KN.t().contiguous(), i == 0, i == num_products - 1)
    exact = sum(a.double().t() @ b.double() for a, b in pairs)
    bound = sum(_bound(a.t(), b) for a, b in pairs) + num_products * 2.0**-23 * exact.abs() + 1e-6
    assert ((out - exact).abs() <= bound).all()


class _Operands(TorchDispatchMode):
    """Records the operands of oneDNN's products."""

    def __init__(self):
        super().__init__()
        self.matrices = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() == "mkldnn::_linear_pointwise":
            self.matrices += args[:2]
        return func(*args, **kwargs or {})


@pytest.mark.skipif(compat.onednn_operator() is None, reason="this PyTorch has no oneDNN")
def test_onednn_gets_no_slice_of_the_columns_of_a_matrix():
    """It multiplies these by its reference kernels: 3.4 s instead of 0.003 for 384 x 1,536 of 32,000 columns."""
    multiply, wide = _products(True), torch.randn(6, 20)
    with _Operands() as operands:
        multiply.add(torch.zeros(6, 4), wide[:, 3:9], torch.randn(6, 4))
        multiply.accumulate(torch.zeros(6, 4), wide[:, 3:9], torch.randn(6, 4), torch.randn(4, 6), True, True)
        multiply.into(torch.zeros(6, 6), torch.randn(6, 6), wide[:, 3:9])
    assert len(operands.matrices) == 6
    assert all(x.is_contiguous() or x.t().is_contiguous() for x in operands.matrices)


def test_empty_operands(by_onednn):
    multiply = _products(by_onednn)
    assert multiply.new(torch.ones(3, 0), torch.ones(0, 4)).equal(torch.zeros(3, 4))
    assert multiply.new(torch.ones(0, 2), torch.ones(2, 4)).shape == (0, 4)


def test_by_onednn_selects_the_library(by_onednn):
    with Operations() as operations:
        _products(by_onednn).new(torch.ones(2, 3), torch.ones(3, 4))
    assert ("mkldnn::_linear_pointwise" in operations.names) == by_onednn


def test_onednn_is_not_used_for_float64_or_if_disabled():
    assert not Products(torch.float64, CPU, by_onednn=True).by_onednn
    with torch.backends.mkldnn.flags(enabled=False):
        assert not Products(torch.float32, CPU).by_onednn


@pytest.mark.parametrize("processor", ["vendor_id\t: GenuineIntel", "", "vendor_id\t: AuthenticAMD"])
def test_onednn_is_faster_on_amd_processors_with_avx512(processor):
    available = torch.backends.mkl.is_available() and compat.onednn_operator() is not None
    assert compat.onednn_is_faster(processor, "AVX512") == (available and "AMD" in processor)
    assert not compat.onednn_is_faster(processor, "AVX2")

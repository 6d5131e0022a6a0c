"""The fused loss on a CPU: either library of products, and the logits in the memory of the weight's gradient."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loss_core import FusedLinearCEConfig
from loss_core.check import check
from loss_core.tolerance import sum_growth
from loss_core_torch import block_logits, eager_linear, products
from loss_core_torch.products import Products

CPU = torch.device("cpu")
LIBRARIES = [
    pytest.param(False, id="mkl"),
    pytest.param(
        True,
        id="onednn",
        marks=pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN"),
    ),
]


@pytest.fixture(params=LIBRARIES)
def by_onednn(request, monkeypatch):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: request.param)
    return request.param


class _Operators(TorchDispatchMode):
    """Names of the operators that run, and the tensors that they make."""

    def __init__(self):
        super().__init__()
        self.names, self.made = set(), {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        self.names.add(str(func))
        if isinstance(result, torch.Tensor):
            # One for each memory; kept, so that none is used again.
            self.made.setdefault(result.untyped_storage().data_ptr(), result)
        return result


def test_a_product_is_within_its_bound_for_operands_in_any_order(by_onednn):
    torch.manual_seed(0)
    for rows, inner, columns in [(1, 1, 1), (7, 33, 41), (64, 130, 257)]:
        a, b = torch.randn(rows, inner + 3), torch.randn(inner, columns)
        for left in (a[:, :inner], a[:, :inner].t().contiguous().t(), a[:, 3:]):
            for right in (b, b.t().contiguous().t()):
                exact = left.double() @ right.double()
                bound = sum_growth(inner) * 2.0**-24 * (left.double().abs() @ right.double().abs())
                multiply = Products(torch.float32, CPU)
                written, added = torch.full((rows, columns), torch.nan), torch.ones(rows, columns)
                multiply.into(written, left, right)
                multiply.add(added, left, right)
                assert ((multiply.new(left, right) - exact).abs() <= bound).all()
                assert ((written - exact).abs() <= bound).all()
                # The sum with 1 is rounded as well.
                assert ((added - 1 - exact).abs() <= bound + 2.0**-23 * (exact.abs() + 1)).all()


def test_empty_operands(by_onednn):
    multiply = Products(torch.float32, CPU)
    assert multiply.new(torch.ones(3, 0), torch.ones(0, 4)).equal(torch.zeros(3, 4))
    assert multiply.new(torch.ones(0, 2), torch.ones(2, 4)).shape == (0, 4)


def test_the_library_of_the_rule_multiplies_and_both_pass_the_check(by_onednn, monkeypatch):
    seen = set()
    real = Products.into
    monkeypatch.setattr(Products, "into", lambda self, *args: seen.add(self.by_onednn) or real(self, *args))
    report = check("FusedLinearCrossEntropy", backends=["torch:eager"], dtypes=["float32", "bfloat16"])
    assert report.passed, str(report)
    assert seen == {by_onednn}
    with _Operators() as operators:
        Products(torch.float32, CPU).new(torch.ones(2, 3), torch.ones(3, 4))
    assert ("mkldnn._linear_pointwise.default" in operators.names) == by_onednn


def test_float64_and_a_switched_off_onednn_go_to_the_other_library(monkeypatch):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    assert Products(torch.float32, CPU).by_onednn == torch.backends.mkldnn.is_available()
    assert not Products(torch.float64, CPU).by_onednn
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not Products(torch.float32, CPU).by_onednn


@pytest.mark.parametrize("processor", ["vendor_id\t: GenuineIntel", "", "AuthenticAMD"])
def test_only_processors_that_mkl_neglects_are_given_to_onednn(processor, monkeypatch):
    monkeypatch.setattr(products, "_processor", lambda: processor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    products.onednn_is_faster.cache_clear()
    carried = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    assert products.onednn_is_faster() == (carried and "AMD" in processor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    products.onednn_is_faster.cache_clear()
    assert not products.onednn_is_faster()
    products.onednn_is_faster.cache_clear()


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 3 tokens after one of H, tiles of 7 classes."""
    monkeypatch.setattr(eager_linear, "_LOGITS_BYTES_CPU", 0)
    monkeypatch.setattr(eager_linear, "_MIN_BLOCK_TOKENS", 3)
    monkeypatch.setattr(block_logits, "_TILE_COLUMNS", 7)


def test_small_blocks_with_borrowed_memory_pass_the_check(small_blocks, by_onednn, monkeypatch):
    lenders = []
    real = block_logits.BlockLogits.__init__

    def init(self, memory, rows, tiles, softcap, lender=None):
        lenders.append((rows, lender is not None))
        real(self, memory, rows, tiles, softcap, lender)

    monkeypatch.setattr(block_logits.BlockLogits, "__init__", init)
    report = check("FusedLinearCrossEntropy", backends=["torch:eager"])
    assert report.passed, str(report)
    assert any(lent and rows > 3 for rows, lent in lenders)
    assert any(not lent for _, lent in lenders)


def test_the_first_tokens_need_no_memory_but_the_gradient(small_blocks):
    tokens, hidden, vocab = 16, 16, 4000
    h, w = torch.randn(tokens, hidden, requires_grad=True), torch.randn(vocab, hidden, requires_grad=True)
    loss = FusedLinearCEConfig().build(backend="torch:eager")
    with _Operators() as operators:
        loss(h, torch.arange(tokens), w)
    sizes = [x.untyped_storage().nbytes() for address, x in operators.made.items() if address != w.data_ptr()]
    assert sorted(size for size in sizes if size > tokens * vocab) == [vocab * hidden * 4]

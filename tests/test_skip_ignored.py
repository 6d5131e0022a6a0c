"""Ignored tokens out of the fused loss's products: by a sync, by the caller's number, and what a wrong number gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from loss_core import FusedLinearCEConfig
from loss_core.check import check
from loss_core_bridge import build_jax_loss, build_torch_loss
from loss_core_jax import fused_linear, skipping
from loss_core_torch import FusedLinearCrossEntropy, values
from loss_core_torch.block_logits import BlockLogits

T, V, H = 12, 11, 5
COUNTED = 8


def _arrays():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, V, (2, T // 2))
    labels.reshape(-1)[1::3] = -100
    hidden = rng.standard_normal((2, T // 2, H)).astype(np.float32)
    # What an ignored token holds must reach nothing.
    hidden.reshape(-1, H)[1::3] = np.nan
    return hidden, labels, rng.standard_normal((V, H)).astype(np.float32)


def _tensors():
    hidden, labels, weight = _arrays()
    return torch.tensor(hidden, requires_grad=True), torch.tensor(labels), torch.tensor(weight, requires_grad=True)


def _results(loss_fn, **extras):
    hidden, labels, weight = _tensors()
    loss = loss_fn(hidden, labels, weight, **extras)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), (hidden, weight))]


@pytest.fixture
def products(monkeypatch):
    """Tokens in each first product, as on an accelerator, whose values stay there."""
    monkeypatch.setattr(values, "may_read", lambda x: False)
    rows, fill = [], BlockLogits.fill
    monkeypatch.setattr(BlockLogits, "fill", lambda self, h_BH: rows.append(h_BH.shape[0]) or fill(self, h_BH))
    return rows


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize(
    ("skip", "number", "expected"), [(None, None, T), (False, None, T), (True, None, COUNTED), (None, COUNTED, COUNTED)]
)
def test_which_tokens_take_part(products, reduction, skip, number, expected):
    reference = _results(FusedLinearCrossEntropy(reduction=reduction))
    products.clear()
    got = _results(FusedLinearCrossEntropy(reduction=reduction, skip_ignored=skip), num_valid_tokens=number)
    assert set(products) == {expected}
    torch.testing.assert_close(got, reference)
    assert not got[1].reshape(-1, H)[1::3].any()


def test_on_a_cpu_they_are_left_out_unless_told_otherwise(monkeypatch):
    rows, fill = [], BlockLogits.fill
    monkeypatch.setattr(BlockLogits, "fill", lambda self, h_BH: rows.append(h_BH.shape[0]) or fill(self, h_BH))
    for skip in (None, True, False):
        _results(FusedLinearCrossEntropy(skip_ignored=skip))
    assert rows == [COUNTED, COUNTED, T]


@pytest.mark.parametrize("skip", [True, False])
def test_through_the_check(monkeypatch, skip):
    configs = [FusedLinearCEConfig(reduction=r, skip_ignored=skip) for r in ("sum", "none")]
    with monkeypatch.context() as patch:
        patch.setattr(values, "may_read", lambda x: False)
        report = check(configs, ["torch:eager"], dtypes=["float32", "bfloat16"], shape=(6, 33, 8))
    assert report.passed, str(report)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("number", [COUNTED - 1, COUNTED + 1, 0, T])
def test_a_wrong_number_is_never_a_finite_loss(monkeypatch, reduction, number):
    loss_fn = FusedLinearCrossEntropy(reduction=reduction)
    with pytest.raises(ValueError, match=rf"num_valid_tokens is {number}, but {COUNTED} of the {T} labels are not"):
        _results(loss_fn, num_valid_tokens=number)
    monkeypatch.setattr(values, "may_read", lambda x: False)
    loss, *grads = _results(loss_fn, num_valid_tokens=number)
    assert loss.isnan().all()
    if reduction != "none" or number:
        assert all(grad.isnan().any() for grad in grads)


def test_a_zero_count_is_zero_with_the_number_too(monkeypatch):
    for may_read in (values.may_read, lambda x: False):
        monkeypatch.setattr(values, "may_read", may_read)
        for result in _results(FusedLinearCrossEntropy(), num_label_tokens=0, num_valid_tokens=COUNTED):
            assert not result.any()


def test_all_ignored_is_a_connected_zero(monkeypatch):
    monkeypatch.setattr(values, "may_read", lambda x: False)
    for skip, number in ((True, None), (None, 0)):
        hidden, labels, weight = _tensors()
        loss_fn = FusedLinearCrossEntropy(skip_ignored=skip)
        loss = loss_fn(hidden, labels.fill_(-100), weight, num_valid_tokens=number)
        loss.backward()
        assert not torch.stack([loss.detach(), hidden.grad.abs().sum(), weight.grad.abs().sum()]).any()


def test_under_torch_compile():
    for skip, number in ((True, None), (None, COUNTED)):
        loss_fn = FusedLinearCrossEntropy(skip_ignored=skip)
        compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(_results(compiled, num_valid_tokens=number), _results(loss_fn))
        torch._dynamo.reset()
    compiled = torch.compile(FusedLinearCrossEntropy(), fullgraph=True, backend="aot_eager")
    assert _results(compiled, num_valid_tokens=COUNTED - 1)[0].isnan()
    torch._dynamo.reset()


BAD = {
    "tensor": (torch.tensor(8), None, TypeError, "num_valid_tokens must be a Python integer, got Tensor"),
    "float": (8.0, None, TypeError, "got float"),
    "negative": (-1, None, ValueError, r"must be in \[0, 12\], the number of tokens, got -1"),
    "too-many": (13, None, ValueError, r"in \[0, 12\].*got 13"),
    "forbidden": (8, False, ValueError, "which skip_ignored=False forbids"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_bad_numbers_get_a_clear_error(backend, name):
    number, skip, kind, text = BAD[name]
    hidden, labels, weight = _arrays() if backend == "jax" else _tensors()
    if name == "tensor" and backend == "jax":
        number, text = jnp.asarray(8), "num_valid_tokens must be a Python integer, got ArrayImpl"
    with pytest.raises(kind, match=text):
        FusedLinearCEConfig(skip_ignored=skip).build(backend=backend)(hidden, labels, weight, num_valid_tokens=number)


def _jax_results(loss_fn, hidden, labels, weight):
    def total(hidden, weight):
        loss = loss_fn(hidden, labels, weight)
        return jnp.sum(loss) * 1.5, loss

    (_, loss), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(hidden, weight)
    return [loss, *grads]


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_jax_leaves_them_out(monkeypatch, reduction):
    rows, plan_for = [], fused_linear.plan_for
    monkeypatch.setattr(fused_linear, "plan_for", lambda n, *args: rows.append(n) or plan_for(n, *args))
    hidden, labels, weight = map(jnp.asarray, _arrays())
    build = functools.partial(FusedLinearCEConfig, reduction=reduction)
    jax.clear_caches()  # what is compiled already asks for no plan
    reference = _jax_results(build().build(backend="jax"), hidden, labels, weight)
    assert set(rows) == {T}
    rows.clear()
    by_number = functools.partial(build().build(backend="jax"), num_valid_tokens=COUNTED)
    traced = jax.jit(functools.partial(_jax_results, by_number))(hidden, labels, weight)
    by_sync = _jax_results(build(skip_ignored=True).build(backend="jax"), hidden, labels, weight)
    assert set(rows) == {COUNTED}
    for got in (_jax_results(by_number, hidden, labels, weight), traced, by_sync):
        for a, b in zip(got, reference, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("number", [COUNTED - 1, COUNTED + 1, T])
def test_jax_a_wrong_number_is_never_a_finite_loss(reduction, number):
    hidden, labels, weight = map(jnp.asarray, _arrays())
    loss_fn = functools.partial(FusedLinearCEConfig(reduction=reduction).build(backend="jax"), num_valid_tokens=number)
    with pytest.raises(ValueError, match=f"num_valid_tokens is {number}, but {COUNTED} of the {T} labels"):
        loss_fn(hidden, labels, weight)
    loss, *grads = jax.jit(functools.partial(_jax_results, loss_fn))(hidden, labels, weight)
    assert np.isnan(loss).all()
    assert all(np.isnan(grad).any() for grad in grads)


def test_jax_says_what_to_do_under_jit():
    hidden, labels, weight = map(jnp.asarray, _arrays())
    with pytest.raises(ValueError, match=r"can't under jax\.jit: pass their number as num_valid_tokens"):
        jax.jit(FusedLinearCEConfig(skip_ignored=True).build(backend="jax"))(hidden, labels, weight)
    with pytest.raises(TypeError, match="static_argnames"):
        jax.jit(FusedLinearCEConfig().build(backend="jax"))(hidden, labels, weight, num_valid_tokens=COUNTED)


def test_jax_a_count_that_was_read_compiles_few_programs():
    ignored = [np.where(np.arange(1000) < n, -100, 0) for n in range(0, 1001, 10)]
    sizes = [skipping.num_rows(labels, -100, 1, True, None) for labels in ignored]
    assert len(set(sizes)) <= 18
    assert all(0 <= size - 1000 + n < 63 for size, n in zip(sizes, range(0, 1001, 10), strict=True))


def test_through_the_bridge():
    expected = _results(FusedLinearCrossEntropy())
    torch_side = _results(build_torch_loss(FusedLinearCEConfig(), backend="jax"), num_valid_tokens=COUNTED)
    torch.testing.assert_close(torch_side, expected)
    hidden, labels, weight = map(jnp.asarray, _arrays())
    loss_fn = build_jax_loss(FusedLinearCEConfig(), backend="torch")
    loss = jax.jit(functools.partial(loss_fn, num_valid_tokens=COUNTED))(hidden, labels, weight)
    np.testing.assert_allclose(loss, expected[0].numpy(), rtol=1e-6)
    with pytest.raises(ValueError, match="num_valid_tokens is 3, but 8"):
        loss_fn(hidden, labels, weight, num_valid_tokens=3)


def test_the_config_refuses_other_values():
    for value in (0, "yes"):
        with pytest.raises(ValueError, match="skip_ignored must be True, False or None, got"):
            FusedLinearCEConfig(skip_ignored=value)

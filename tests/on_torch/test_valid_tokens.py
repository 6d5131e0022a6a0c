"""Ignored tokens excluded from the fused loss's products: with a sync, with num_valid_tokens, and with a wrong number.

Where values may not be read, as on an accelerator, is shown by make_fx: what it traces reads none.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from loss_core import FusedLinearCEConfig
from loss_core.check import check

# T = tokens, V = vocabulary, H = hidden
T, V, H = 12, 11, 5
VALID = 8

reductions = pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
ways = pytest.mark.parametrize(
    ("skip", "number", "on_cpu", "unread"),
    [(None, None, VALID, T), (False, None, T, T), (True, None, VALID, None), (None, VALID, VALID, VALID)],
    ids=["unset", "off", "by-a-sync", "by-the-number"],
)


def _inputs():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, T // 2, H, generator=g), torch.randn(V, H, generator=g)
    labels = torch.randint(0, V, (2, T // 2), generator=g)
    labels.view(-1)[1::3] = -100
    # Values of ignored tokens must have no effect.
    hidden.view(-1, H)[1::3] = torch.nan
    return hidden, labels, weight


def _build(reduction="sum", skip=None, backend="torch:eager"):
    return FusedLinearCEConfig(reduction=reduction, skip_ignored=skip).build(backend=backend)


def _results(loss_fn, hidden, labels, weight, **extras):
    """The loss, and the gradients of hidden states and weight."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    # By name: FlopCounterMode puts hooks on leaves among them.
    loss = loss_fn(hidden_states=hidden, labels=labels, lm_weight=weight, **extras)
    return (loss.detach(), *torch.autograd.grad(loss.sum(), (hidden, weight)))


def _unread(loss_fn, *inputs, **extras):
    """The same, traced, where no value is readable."""
    return make_fx(lambda *inputs: _results(loss_fn, *inputs, **extras))(*inputs)(*inputs)


def _tokens_in_products(call, products):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / (2 * V * H * products)


@reductions
@ways
def test_which_tokens_are_in_the_products(reduction, skip, number, on_cpu, unread):
    # Without coefficients in the forward, logits are computed twice.
    inputs, products = _inputs(), 4 if reduction == "none" else 3
    loss_fn = _build(reduction, skip)
    assert _tokens_in_products(lambda: _results(loss_fn, *inputs, num_valid_tokens=number), products) == on_cpu
    if unread is not None:
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(x) for x in inputs]
            found = _tokens_in_products(lambda: _results(loss_fn, *fakes, num_valid_tokens=number), products)
        assert found == unread


@reductions
@ways
def test_results_do_not_depend_on_skipping(reduction, skip, number, on_cpu, unread):
    inputs = _inputs()
    expected = _results(_build(reduction, backend="torch:plain"), *inputs)
    got = _results(_build(reduction, skip), *inputs, num_valid_tokens=number)
    torch.testing.assert_close(got, expected)
    assert not got[1].view(-1, H)[1::3].any()
    torch.testing.assert_close(_unread(_build(reduction, skip), *inputs, num_valid_tokens=number), expected)


@pytest.mark.parametrize("skip", [True, False])
def test_through_the_check(skip):
    configs = [FusedLinearCEConfig(reduction=r, skip_ignored=skip) for r in ("sum", "none")]
    report = check(configs, ["torch:eager"], dtypes=["float32", "bfloat16"], shape=(6, 33, 8))
    assert report.passed, str(report)


@reductions
@pytest.mark.parametrize("number", [VALID - 1, VALID + 1, 0, T])
def test_a_wrong_number_is_never_a_finite_loss(reduction, number):
    loss_fn, inputs = _build(reduction), _inputs()
    with pytest.raises(ValueError, match=rf"num_valid_tokens is {number}, but {VALID} of the {T} labels are not"):
        _results(loss_fn, *inputs, num_valid_tokens=number)
    loss, *grads = _unread(loss_fn, *inputs, num_valid_tokens=number)
    assert loss.isnan().all()
    # With a number of 0 no token has a gradient.
    if number:
        assert all(grad.isnan().any() for grad in grads)


def test_a_count_of_0_gives_0_with_num_valid_tokens_too():
    for results in (_results, _unread):
        for result in results(_build(), *_inputs(), num_label_tokens=0, num_valid_tokens=VALID):
            assert not result.any()


def test_all_ignored_is_a_connected_zero():
    hidden, labels, weight = _inputs()
    labels.fill_(-100)
    for results in (_results, _unread):
        for skip, number in ((True, None), (None, 0)):
            for result in results(_build(skip=skip), hidden, labels, weight, num_valid_tokens=number):
                assert not result.any()


def test_under_torch_compile():
    inputs = _inputs()
    for skip, number in ((True, None), (None, VALID)):
        loss_fn = _build(skip=skip)
        compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
        found = _results(compiled, *inputs, num_valid_tokens=number)
        torch.testing.assert_close(found, _results(loss_fn, *inputs))
        torch._dynamo.reset()


BAD = {
    "tensor": (torch.tensor(8), None, TypeError, "num_valid_tokens must be a Python integer, got Tensor"),
    "float": (8.0, None, TypeError, "got float"),
    "negative": (-1, None, ValueError, r"must be in \[0, 12\], the number of tokens, got -1"),
    "too-many": (13, None, ValueError, r"in \[0, 12\].*got 13"),
    "forbidden": (8, False, ValueError, "which skip_ignored=False forbids"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("backend", ["torch:eager", "torch:plain"])
def test_bad_numbers_get_a_clear_error(backend, name):
    number, skip, kind, text = BAD[name]
    with pytest.raises(kind, match=text):
        _build(skip=skip, backend=backend)(*_inputs(), num_valid_tokens=number)


def test_through_the_bridge():
    jax = pytest.importorskip("jax")
    from loss_core_bridge import build_jax_loss, build_torch_loss

    inputs = _inputs()
    expected = _results(_build(), *inputs)
    torch_side = build_torch_loss(FusedLinearCEConfig(), backend="jax")
    torch.testing.assert_close(_results(torch_side, *inputs, num_valid_tokens=VALID), expected)
    arrays = [jax.numpy.asarray(x.numpy()) for x in inputs]
    loss_fn = build_jax_loss(FusedLinearCEConfig(), backend="torch")
    loss = jax.jit(lambda *arrays: loss_fn(*arrays, num_valid_tokens=VALID))(*arrays)
    assert float(loss) == pytest.approx(expected[0].item(), rel=1e-6)
    with pytest.raises(ValueError, match="num_valid_tokens is 3, but 8"):
        loss_fn(*arrays, num_valid_tokens=3)


def test_the_config_refuses_invalid_values():
    for value in (0, "yes"):
        with pytest.raises(ValueError, match="skip_ignored must be True, False or None, got"):
            FusedLinearCEConfig(skip_ignored=value)

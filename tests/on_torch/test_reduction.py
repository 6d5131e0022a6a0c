"""Reduction of token losses, against the oracle's."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from loss_core.losses.reduction import Reduction
from loss_core_torch.inputs import Tokens, resolve_keep
from loss_core_torch.reduction import coefficients, count_valid, reduce_tokens, weighted_sum, zero_where_ignored

# T = 3 tokens
LOSS_T, WEIGHTS_T, LABELS_T = torch.tensor([2.0, 7.0, 5.0]), torch.tensor([1.0, 0.5, 3.0]), torch.tensor([1, 0, 2])
KEPT = {"all": None, "some": [True, False, True], "one": [False, False, True], "none": [False, False, False]}
CALLS = [("sum", None, False), ("sum", 4, True), ("sum", 1, False), ("sum", 0, True), ("mean", None, False),
         ("none", None, False), ("sum", torch.tensor(4), False), ("sum", torch.tensor(0), True)]  # fmt: skip


def tokens_of(kept, count=None, weights_T=None, **more):
    keep_T = None if KEPT[kept] is None else torch.tensor(KEPT[kept])
    return Tokens(LABELS_T.shape, LABELS_T, keep_T, num_tokens=count, weights_T=weights_T, **more)


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize(("kind", "count", "weighted"), CALLS, ids=str)
def test_result_and_coefficients_are_those_of_the_oracle(kind, count, weighted, kept):
    tokens = resolve_keep(tokens_of(kept, count, WEIGHTS_T if weighted else None))
    oracle = Reduction(
        kind,
        (3,),
        np.ones(3, bool) if KEPT[kept] is None else np.array(KEPT[kept]),
        None if count is None else np.array(int(count)),
        WEIGHTS_T.numpy() if weighted else None,
    )
    loss_T = zero_where_ignored(LOSS_T, tokens.keep_T).clone().requires_grad_()
    result = reduce_tokens(loss_T, tokens, kind)
    np.testing.assert_allclose(result.detach(), oracle.loss(LOSS_T.numpy() * oracle.keep_T), rtol=1e-6)
    coef_T = coefficients(tokens, kind, torch.float32)
    np.testing.assert_allclose(coef_T, oracle.coefficients(None), rtol=1e-6)
    (grad_T,) = torch.autograd.grad(result.sum(), loss_T)
    # The loss of an ignored token does not depend on the logits, whatever its gradient is.
    np.testing.assert_allclose(zero_where_ignored(grad_T, tokens.keep_T), coef_T, rtol=1e-6)


@pytest.mark.parametrize(("given", "arithmetic"), [("bfloat16", "float32"), ("float32", "float32"), ("float64",) * 2])
@pytest.mark.parametrize("kept", ["all", "some"])
@pytest.mark.parametrize("weights_T", [None, WEIGHTS_T], ids=["", "weighted"])
def test_coefficients_have_the_dtype_of_the_arithmetic(weights_T, kept, given, arithmetic):
    found = coefficients(tokens_of(kept, 4, weights_T), "sum", getattr(torch, given))
    assert found.dtype == getattr(torch, arithmetic)


@pytest.mark.parametrize("kind", ["sum", "mean", "none"])
def test_nan_tokens_make_loss_and_gradient_nan(kind):
    tokens = tokens_of("some", nan_T=torch.tensor([False, False, True]))
    loss_T = zero_where_ignored(LOSS_T, tokens.keep_T).clone().requires_grad_()
    result = reduce_tokens(loss_T, tokens, kind)
    assert result.isnan().tolist() == ([False, False, True] if kind == "none" else True)
    assert torch.autograd.grad(result[2] if kind == "none" else result, loss_T)[0][2].isnan()
    assert coefficients(tokens, kind, torch.float32).isnan().tolist() == [False, False, True]


@pytest.mark.parametrize("count", [-1.0, torch.nan])
def test_an_invalid_count_makes_the_loss_nan(count):
    # A readable count has been refused before.
    tokens = tokens_of("some", torch.tensor(count))
    assert reduce_tokens(LOSS_T, tokens, "sum").isnan()
    assert coefficients(tokens, "sum", torch.float32).isnan().tolist() == [True, True, True]


def test_an_infinite_weight_of_an_ignored_token_has_no_effect():
    weights_T = torch.tensor([1.0, torch.inf, 3.0]).requires_grad_()
    tokens = tokens_of("some", weights_T=weights_T)
    result = reduce_tokens(zero_where_ignored(LOSS_T, tokens.keep_T), tokens, "sum")
    assert result == 17
    assert torch.autograd.grad(result, weights_T, torch.tensor(torch.inf))[0][1] == 0
    assert coefficients(tokens, "sum", torch.float32).tolist() == [1, 0, 3]


@pytest.mark.parametrize(("last", "total"), [(5.0, 17.0), (torch.inf, torch.inf)])
def test_a_coefficient_of_0_excludes_an_infinite_loss(last, total):
    loss_T = torch.tensor([2.0, torch.inf, last])
    assert weighted_sum(torch.tensor([1.0, 0.0, 3.0]), loss_T) == total
    assert loss_T[1] == torch.inf


@pytest.mark.parametrize(("kept", "number"), [("all", 3), ("some", 2), ("none", 0)])
def test_the_number_of_valid_tokens_is_an_integer_of_no_dimensions(kept, number):
    found = count_valid(tokens_of(kept))
    assert (found.dtype, found.shape, int(found)) == (torch.int64, (), number)


def test_a_mean_over_no_tokens_at_all_is_0():
    tokens = Tokens(torch.Size([0]), LABELS_T[:0], None)
    assert reduce_tokens(LOSS_T[:0], tokens, "mean") == 0
    assert coefficients(tokens, "mean", torch.float32).shape == (0,)


def test_under_a_trace_no_value_of_a_sum_is_read():
    with FakeTensorMode() as mode:
        assert weighted_sum(mode.from_tensor(WEIGHTS_T), mode.from_tensor(LOSS_T)).shape == ()

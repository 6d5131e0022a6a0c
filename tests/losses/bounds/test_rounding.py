"""Rounding to formats, and allowances that rounding does not exceed and bugs do."""

import numpy as np
import pytest

from loss_core import MaskedCrossEntropyConfig, TopKDistillationConfig
from loss_core.dtypes import FORMATS, float_format, round_to
from loss_core.losses import allowances, error_ratio, named_cases
from loss_core.losses.bounds.rounding import EXP_ARGUMENT_ROUNDINGS, sum_growth
from loss_core.losses.oracle import evaluate
from loss_core.registry import our_losses


@pytest.mark.parametrize("name", list(FORMATS))
def test_round_to_is_nearest_even_and_idempotent(name):
    fmt = float_format(name)
    # Halfway between 1 and the next number goes to the even one, 1; a little more goes up.
    if name != "float64":
        assert round_to(np.array(1 + fmt.u), name) == 1
        assert round_to(np.array(1 + fmt.u * (1 + 2.0**-20)), name) == 1 + 2 * fmt.u
    values = np.random.default_rng(0).standard_normal(1000) * 10.0 ** np.arange(-6, 4).repeat(100)
    once = round_to(values, name)
    np.testing.assert_array_equal(round_to(once, name), once)
    big = np.abs(values) > 10 * fmt.tiny
    assert np.all(np.abs(once - values)[big] <= fmt.u * np.abs(values)[big])
    special = np.array([np.inf, -np.inf, np.nan, 0.0])
    np.testing.assert_array_equal(round_to(special, name), special)


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_round_to_agrees_with_torch(name):
    import torch

    values = np.random.default_rng(1).standard_normal(5000) * 10.0 ** np.random.default_rng(2).integers(-40, 38, 5000)
    values = round_to(values, "float32")  # torch rounds float64 to 16 bits by way of float32
    with np.errstate(over="ignore"):
        expected = torch.tensor(values).to(getattr(torch, name)).to(torch.float64).numpy()
    np.testing.assert_array_equal(round_to(values, name), expected)


def test_unknown_format_lists_the_known():
    with pytest.raises(ValueError, match=r"Unknown dtype 'fp8'.*float16"):
        float_format("fp8")


def test_sum_growth_is_the_smaller_bound():
    assert sum_growth(4) == 4
    assert sum_growth(10**6) == pytest.approx(6000)


@pytest.mark.parametrize("loss", our_losses())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_allowance_is_small_relative_to_the_result(loss, dtype):
    # An allowance of the order of the result itself would prove nothing.
    case = next(case for case in named_cases(loss) if case.name == "basic")
    arrays = {k: round_to(v, dtype) if v.dtype.kind == "f" else v for k, v in case.arrays.items()}
    expected = evaluate(case.config, arrays, case.upstream)
    allowed = allowances(case.config, arrays, expected, dtype, upstream=case.upstream)
    assert np.linalg.norm(allowed["loss"]) < 2e-4 * np.linalg.norm(expected.loss)
    limit = {"float32": 2e-4, "bfloat16": 5e-3}[dtype]
    if loss == "FusedLinearKDLoss" and dtype == "float32":
        # The products add to the allowance of p (x - sum p x), which alone is half of the limit: see KDLoss.
        limit = 1e-3
    for name, grad in expected.grads.items():
        assert np.linalg.norm(allowed[name]) < limit * np.linalg.norm(grad), name


def test_ignored_rows_have_no_allowance_at_all():
    arrays = {"logits": np.random.default_rng(0).standard_normal((3, 5)), "labels": np.array([1, -100, 2])}
    expected = evaluate(MaskedCrossEntropyConfig(), arrays)
    allowed = allowances(MaskedCrossEntropyConfig(), arrays, expected, "float32")
    assert not allowed["logits"][1].any()
    got = expected.grads["logits"].copy()
    got[1, 0] = 1e-30
    ratio = error_ratio(got, expected.grads["logits"], allowed["logits"], "float32")
    assert np.isinf(ratio[1, 0])


def test_error_ratio_of_special_values():
    nan, inf = np.nan, np.inf
    got = np.array([nan, inf, 1.0, nan, 70000.0, inf, -inf])
    expected = np.array([nan, inf, nan, 1.0, 70000.0, 70000.0, 70000.0])
    ratio = error_ratio(got, expected, np.ones(7), "float16")
    np.testing.assert_array_equal(ratio, [0, 0, inf, inf, 0, 0, inf])


def test_a_probability_flushed_to_zero_before_its_coefficient_is_rounding():
    # exp(-87.5) = 1e-38 is below float32's normal range: 0 where denormals are flushed, though 3 p is normal.
    arrays = {"logits": np.array([[0.0, -87.5]]), "labels": np.array([0])}
    upstream = np.array(3.0)
    expected = evaluate(MaskedCrossEntropyConfig(), arrays, upstream)
    allowed = allowances(MaskedCrossEntropyConfig(), arrays, expected, "float32", upstream=upstream)
    assert expected.grads["logits"][0, 1] > float_format("float32").tiny
    assert allowed["logits"][0, 1] > expected.grads["logits"][0, 1]


def test_a_teachers_probability_flushed_to_zero_before_its_ratio_is_rounding():
    # p = exp(-87.75) is below float32's normal range; its gradient p (log p - log q + 1) is not.
    log_p = np.array([[0.0, -87.75]])
    arrays = {"student_logits": np.array([[0.0, -30.0, 1.0]]), "teacher_indices": np.array([[0, 1]])}
    arrays |= {"teacher_logprobs": log_p, "labels": np.array([0])}
    config = TopKDistillationConfig(tail=False)
    expected = evaluate(config, arrays)
    allowed = allowances(config, arrays, expected, "float32")["teacher_logprobs"]
    got = np.abs(expected.grads["teacher_logprobs"][0, 1])
    assert float_format("float32").tiny < got < allowed[0, 1]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_exp_by_way_of_exp2_is_rounding(dtype):
    # exp2(fl(fl(z - m) fl(log2 e))), all else exact: as Triton and CUDA's __expf compute it.
    if dtype == "float64" and np.finfo(np.longdouble).nmant < 60:
        pytest.skip("long double is no wider than double here")
    kind, u = getattr(np, dtype), float_format(dtype).u
    rng = np.random.default_rng(0)
    m, z = rng.uniform(0, 64, 200_000).astype(kind), rng.uniform(-64, 0, 200_000).astype(kind)
    r = m.astype(np.longdouble) - z
    log2_e = 1 / np.log(np.longdouble(2))
    product = (z - m) * kind(log2_e)
    # The absolute error of exp's argument is the relative error of its result, to first order.
    off = np.abs(product.astype(np.longdouble) / log2_e + r) / (u * r)
    assert 1.5 < np.max(off) <= EXP_ARGUMENT_ROUNDINGS


def test_a_probability_by_way_of_exp2_is_within_its_allowance():
    rng = np.random.default_rng(1)
    logits = rng.uniform(-85, 0, (2000, 2)).astype(np.float32)
    logits[:, 0] = rng.uniform(0, 8, 2000)
    arrays = {"logits": logits.astype(np.float64), "labels": np.zeros(2000, dtype=np.int64)}
    expected = evaluate(MaskedCrossEntropyConfig(), arrays)
    allowed = allowances(MaskedCrossEntropyConfig(), arrays, expected, "float32")["logits"]
    product = (logits[:, 1] - logits[:, 0]) * np.float32(1 / np.log(2))
    got = expected.grads["logits"].copy()
    # exp2.approx is off by up to 2 ulp as well, here always in the direction that adds up.
    e = np.exp2(product.astype(np.float64))
    e *= 1 + 4 * 2.0**-24 * np.sign(e / (1 + e) - got[:, 1])
    got[:, 1] = e / (1 + e)
    assert np.max(error_ratio(got, expected.grads["logits"], allowed, "float32")) <= 1


def test_float16_keeps_its_subnormals():
    # A gradient of 1e-5 is below float16's normal range; a flush to 0 is not explained by rounding.
    arrays = {"logits": np.array([[0.0, -11.5]]), "labels": np.array([0])}
    expected = evaluate(MaskedCrossEntropyConfig(), arrays)
    allowed = allowances(MaskedCrossEntropyConfig(), arrays, expected, "float16")
    assert expected.grads["logits"][0, 1] < float_format("float16").tiny
    assert allowed["logits"][0, 1] < expected.grads["logits"][0, 1] / 100

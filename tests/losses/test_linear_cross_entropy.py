"""Error bounds of products before and after a cross entropy against roundings counted by hand."""

import numpy as np
import pytest

from helpers.roundings import COEFFICIENT, NEAR_ZERO, TINY, U, softcapped, softmax, stored
from loss_core import FusedLinearCEConfig
from loss_core.losses import allowances, evaluate
from loss_core.losses.linear_cross_entropy import DEFINITION, sampled_rows

# T = 2 tokens, V = 3, H = 2
HIDDEN_TH = np.array([[0.5, -1.5], [2.0, 0.25]])
WEIGHT_VH = np.array([[1.0, 0.5], [-0.75, 1.25], [0.5, -1.0]])
BIAS_V = np.array([0.3, -0.2, 0.1])
BF16_U = 2.0**-8


@pytest.mark.parametrize("size", [1.0, TINY])
@pytest.mark.parametrize("product_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("cap", [0.0, 4.0])
@pytest.mark.parametrize("bias", [False, True])
def test_every_rounding_is_in_the_bound_once(bias, cap, product_dtype, size):
    arrays = {"hidden_states": HIDDEN_TH, "lm_weight": WEIGHT_VH, "labels": np.array([1, 0])}
    arrays |= {"lm_bias": BIAS_V} if bias else {}
    config = FusedLinearCEConfig(logit_softcapping=cap, reduction="none")
    upstream_T = size * np.array([-0.8, 1.3])
    expected = evaluate(config, arrays, upstream_T)
    allowed = allowances(config, arrays, expected, "float32", upstream=upstream_T, product_dtype=product_dtype)

    bias_V = BIAS_V if bias else np.zeros(3)
    raw_TV = HIDDEN_TH @ WEIGHT_VH.T + bias_V
    # Sums of 2 products and a bias.
    err_raw_T = np.max(3 * U * (np.abs(HIDDEN_TH) @ np.abs(WEIGHT_VH).T + np.abs(bias_V)), axis=-1)
    dz_TV, err_TV = np.zeros((2, 3)), np.zeros((2, 3))
    for row, label in enumerate(arrays["labels"]):
        raw_V, err_raw, factor = raw_TV[row], err_raw_T[row], abs(upstream_T[row])
        z_V, slope_V, err_z, err_slope = softcapped(raw_V, err_raw, cap)
        sm, one_hot_V = softmax(z_V, err_z), np.arange(3) == label
        loss = -sm.log_p_V[label]
        err = sm.err_lse + err_z + U * (abs(z_V[label]) + 2 * loss)
        assert allowed["loss"][row] == pytest.approx(stored(loss, err), rel=1e-10)
        dz_V = np.abs(sm.p_V - one_hot_V)
        err_V = (factor * (sm.err_p_V + (1 + COEFFICIENT) * U * dz_V) + NEAR_ZERO) * slope_V
        err_TV[row] = err_V + factor * dz_V * err_slope
        dz_TV[row] = factor * dz_V * slope_V
    if product_dtype:
        err_TV += BF16_U * dz_TV + NEAR_ZERO
    err_h_TH = (err_TV + 3 * U * dz_TV) @ np.abs(WEIGHT_VH) + 3 * NEAR_ZERO
    of_sums_TV = err_TV + 2 * U * dz_TV
    errors = {"hidden_states": err_h_TH, "lm_weight": of_sums_TV.T @ np.abs(HIDDEN_TH) + 2 * NEAR_ZERO}
    errors |= {"lm_bias": of_sums_TV.sum(0) + 2 * NEAR_ZERO} if bias else {}
    assert set(errors) == set(expected.grads)
    for name, error in errors.items():
        np.testing.assert_allclose(allowed[name], stored(expected.grads[name], error), rtol=1e-10, err_msg=name)


def test_without_a_product_dtype_no_operand_is_flushed_near_0():
    arrays = {"hidden_states": HIDDEN_TH, "lm_weight": WEIGHT_VH, "lm_bias": BIAS_V, "labels": np.array([-100, -100])}
    expected = evaluate(FusedLinearCEConfig(), arrays)
    allowed = allowances(FusedLinearCEConfig(), arrays, expected, "float32", product_dtype="bfloat16")
    # A sum of 2, and the result.
    np.testing.assert_allclose(allowed["lm_bias"], (2 + 1) * NEAR_ZERO)
    np.testing.assert_allclose(allowed["lm_weight"], (2 + 1) * NEAR_ZERO)
    assert not allowed["hidden_states"].any()


def test_rows_of_a_call_too_large_for_the_oracle_have_its_gradient():
    rng = np.random.default_rng(0)
    hidden_TH, weight_VH, labels_T = rng.standard_normal((5, 3)), rng.standard_normal((7, 3)), rng.integers(0, 7, 5)
    config = FusedLinearCEConfig(logit_softcapping=4.0, z_loss=0.1, reduction="none")
    upstream_T = rng.standard_normal(5)
    arrays = {"hidden_states": hidden_TH, "lm_weight": weight_VH, "labels": labels_T}
    blocks = [weight_VH[:2], weight_VH[2:6], weight_VH[6:]]
    found = sampled_rows(config, hidden_TH, blocks, {"labels": labels_T}, upstream_T)
    np.testing.assert_allclose(found, evaluate(config, arrays, upstream_T).grads["hidden_states"], rtol=1e-12)


def test_num_valid_tokens_is_optional():
    assert [a.name for a in DEFINITION.arguments if a.optional][-2:] == ["num_valid_tokens", "lm_bias"]

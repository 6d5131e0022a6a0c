"""Error bounds of cross entropy against roundings counted by hand."""

import numpy as np
import pytest

from helpers.roundings import COEFFICIENT, NEAR_ZERO, TINY, U, scaled_loss, softcapped, softmax, stored
from loss_core import MaskedCrossEntropyConfig
from loss_core.losses import allowances, evaluate

LABEL, WEIGHT, COUNT = 1, 1.7, 3


@pytest.mark.parametrize("upstream", [-0.8, -0.8 * TINY])
@pytest.mark.parametrize("raw_V", [[0.5, -1.0, 2.25], [-3.0, -1.25, -2.5]], ids=["", "negative"])
@pytest.mark.parametrize("cap", [0.0, 4.0])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_every_rounding_is_in_the_bound_once(raw_V, cap, z_loss, smoothing, upstream):
    config = MaskedCrossEntropyConfig(label_smoothing=smoothing, z_loss=z_loss, logit_softcapping=cap)
    arrays = {"logits": np.array([raw_V]), "labels": np.array([LABEL])}
    arrays |= {"loss_weights": np.array([WEIGHT]), "num_label_tokens": np.array(COUNT)}
    expected = evaluate(config, arrays, np.array(upstream))
    allowed = allowances(config, arrays, expected, "float32", upstream=np.array(upstream))

    raw_V, one_hot_V = np.array(raw_V), np.arange(3) == LABEL
    z_V, slope_V, err_z, err_slope = softcapped(raw_V, 0.0, cap)
    sm = softmax(z_V, err_z)
    loss = -(1 - smoothing) * sm.log_p_V[LABEL] - smoothing * np.mean(sm.log_p_V) + z_loss * sm.lse**2
    err = sm.err_lse + err_z + U * (abs(z_V[LABEL]) + 2 * loss)
    if smoothing:
        # A mean (a sum of 3 and a division), a factor; and five roundings of parts of the loss.
        err += U * (smoothing * (3 + 2) * np.mean(np.abs(z_V)) + 5 * loss)
    # Of z_loss: l, the square, the product, and the sum.
    err += z_loss * abs(sm.lse) * (2 * sm.err_lse + 4 * U * abs(sm.lse))
    assert allowed["loss"] == pytest.approx(scaled_loss(loss, err, WEIGHT / COUNT), rel=1e-10)
    by_weight = upstream * loss / COUNT
    err_by_weight = abs(upstream) * err / COUNT + COEFFICIENT * U * abs(by_weight)
    assert allowed["loss_weights"] == pytest.approx(stored(by_weight, err_by_weight), rel=1e-10)

    factor, coefficient = 1 + 2 * z_loss * sm.lse, upstream * WEIGHT / COUNT
    dz_V = factor * sm.p_V - smoothing / 3 - (1 - smoothing) * one_hot_V
    err_V = abs(factor) * sm.err_p_V + (1 + COEFFICIENT) * U * np.abs(dz_V)
    if z_loss:
        err_V += sm.p_V * (2 * z_loss * sm.err_lse + 4 * U * (1 + 2 * z_loss * abs(sm.lse)))
    if smoothing:
        # e/V and 1 - e are rounded, multiplied, added; or a sum of 3 terms e/V instead of 1.
        err_V += U * (smoothing * (4 / 3 + 3 * sm.p_V) + 4 * (1 - smoothing) * one_hot_V)
    err_V = (abs(coefficient) * err_V + NEAR_ZERO) * slope_V + abs(coefficient * dz_V) * err_slope
    np.testing.assert_allclose(expected.grads["logits"][0], coefficient * dz_V * slope_V, rtol=1e-12)
    np.testing.assert_allclose(allowed["logits"][0], stored(coefficient * dz_V * slope_V, err_V), rtol=1e-10)

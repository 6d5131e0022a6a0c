"""Error bounds of distillation of two heads against roundings counted by hand."""

import numpy as np
import pytest

from helpers.roundings import NEAR_ZERO, TINY, U, jensen_shannon, kl_divergence, scaled_loss, softmax, stored
from loss_core import FusedLinearKDConfig
from loss_core.losses import allowances, evaluate

# T = 1 token, V = 3, H = 2, and 3 of the teacher
HIDDEN = {"student": np.array([0.5, -1.5]), "teacher": np.array([0.5, -1.5, 1.0])}
WEIGHT = {"student": np.array([[1.0, 0.5], [-0.75, 1.25], [0.5, -1.0]])}
WEIGHT["teacher"] = np.column_stack([WEIGHT["student"], [0.5, 1.25, -0.25]])
TOKEN_WEIGHT, COUNT, BETA = 1.7, 3, 0.3


def centred_change(p_V, x_V, factor_V, shift_V):
    """Change of p (x - sum p x) if p changes by p * factor, and x by shift."""
    change_V = factor_V * np.abs(x_V - p_V @ x_V) + (1 + factor_V) * shift_V
    return p_V * (change_V + (1 + factor_V) * (p_V @ change_V))


@pytest.mark.parametrize("upstream", [-0.8, -0.8 * TINY])
@pytest.mark.parametrize("temp", [1.0, 2.5])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_every_rounding_is_in_the_bound_once(divergence, temp, upstream):
    config = FusedLinearKDConfig(divergence=divergence, beta=BETA, temperature=temp)
    arrays = {f"{side}_hidden_states": HIDDEN[side][None] for side in HIDDEN}
    arrays |= {f"{side}_lm_weight": WEIGHT[side] for side in WEIGHT}
    arrays |= {"labels": np.array([0]), "loss_weights": np.array([TOKEN_WEIGHT]), "num_batch_labels": np.array(COUNT)}
    expected = evaluate(config, arrays, np.array(upstream))
    allowed = allowances(config, arrays, expected, "float32", upstream=np.array(upstream))

    sides, shifts, tops, err_z = [], [], [], []
    for side, h_H in HIDDEN.items():
        z_V = WEIGHT[side] @ h_H / temp
        tops.append(np.max(np.abs(z_V)))
        err_z.append(2 * U * tops[-1] if temp != 1 else 0.0)
        sides.append(softmax(z_V, err_z[-1]))
        # Sums of len(h_H) products and a bias.
        shifts.append((len(h_H) + 1) * U * (np.abs(WEIGHT[side]) @ np.abs(h_H)) / temp)
    (student, teacher), err_ratio = sides, sides[0].err_lse + sides[1].err_lse + sum(err_z) + 2 * U * sum(tops)
    # The change of log p is that of z plus that of lse; p changes by the factor exp of it.
    logs = [shift_V + np.log(side.p_V @ np.exp(shift_V)) for side, shift_V in zip(sides, shifts, strict=True)]
    factors = [np.expm1(log_V) for log_V in logs]
    if divergence == "jsd":
        loss, err, *errors = jensen_shannon(student, teacher, err_ratio, BETA)
        log_m_V = np.log(BETA * teacher.p_V + (1 - BETA) * student.p_V)
        changes, by_z = [], []
        for side, share, factor_V in zip(sides, (1 - BETA, BETA), factors, strict=True):
            x_V = side.log_p_V - log_m_V
            changes.append(share * centred_change(side.p_V, x_V, factor_V, logs[0] + logs[1]))
            by_z.append(share * side.p_V * (x_V - side.p_V @ x_V))
    else:
        order = slice(None) if divergence == "forward_kl" else slice(None, None, -1)
        q, p = sides[order]
        loss, err, *errors = kl_divergence(q, p, err_ratio)
        ratio_V, (factor_q, factor_p) = p.log_p_V - q.log_p_V, factors[order]
        changes = [q.p_V * factor_q + p.p_V * factor_p, centred_change(p.p_V, ratio_V, factor_p, shifts[0] + shifts[1])]
        by_z = [q.p_V - p.p_V, p.p_V * (ratio_V - loss)]
        errors, changes, by_z = errors[order], changes[order], by_z[order]
    errors = [error_V + moved_V for error_V, moved_V in zip(errors, changes, strict=True)]
    err += sum((np.abs(b) + e) @ m for b, e, m in zip(by_z, errors, shifts, strict=True))
    err = temp**2 * (err + 3 * U * loss)
    assert allowed["loss"] == pytest.approx(scaled_loss(temp**2 * loss, err, TOKEN_WEIGHT / COUNT), rel=1e-9)

    coefficient = abs(upstream) * TOKEN_WEIGHT / COUNT * temp
    for side, by_z_V, error_V in zip(HIDDEN, by_z, errors, strict=True):
        dz_V, err_V = coefficient * np.abs(by_z_V), coefficient * error_V + NEAR_ZERO
        err_h = (err_V + 3 * U * dz_V) @ np.abs(WEIGHT[side]) + 3 * NEAR_ZERO
        err_w = np.outer(err_V + U * dz_V, np.abs(HIDDEN[side])) + NEAR_ZERO
        for name, error in ((f"{side}_hidden_states", err_h), (f"{side}_lm_weight", err_w)):
            bound = stored(expected.grads[name], error)
            np.testing.assert_allclose(allowed[name], bound, rtol=1e-9, err_msg=name)

"""Rounding errors counted by hand for one token of a few classes in float32, to compare error bounds with.

The counts are those that loss_core.losses.bounds.rounding derives, written out again, so that no change goes unnoticed.
"""

# V = classes, at most 36: until then a sum of n terms is off by n u

from typing import NamedTuple

import numpy as np

U, NEAR_ZERO = 2.0**-24, 2.0**-126
# An upstream gradient with which gradients are mostly below the normal range, and may be flushed to 0.
TINY = 2.0**-120
EXP, EXP_ARGUMENT, LOG, TANH, COEFFICIENT = 6, 2.25, 4, 9, 4


class Softmax(NamedTuple):
    z_V: np.ndarray
    log_p_V: np.ndarray
    p_V: np.ndarray
    lse: float
    err_p_V: np.ndarray
    err_lse: float


def softmax(z_V, err_z=0.0):
    z_V = np.asarray(z_V, float)
    m = np.max(z_V)
    r_V = m - z_V
    log_sum = np.log(np.sum(np.exp(-r_V)))
    lse = m + log_sum
    p_V = np.exp(z_V - lse)
    of_exp_V = EXP_ARGUMENT * r_V + EXP
    of_sum = p_V @ of_exp_V + len(z_V)
    # Roundings of the log, of the sum m + log s, and of z - (m + log s).
    err_lse = err_z + (of_sum + LOG * log_sum + abs(m) + 2 * abs(lse)) * U
    err_p_V = p_V * ((of_exp_V + 2) * U + err_z + err_lse) + NEAR_ZERO
    return Softmax(z_V, z_V - lse, p_V, lse, err_p_V, err_lse)


def stored(value, error):
    return error + U * (np.abs(value) + error) + NEAR_ZERO


def scaled_loss(loss, err, scale):
    """Bound of scale * loss of one token."""
    return stored(scale * loss, abs(scale) * (err + (1 + COEFFICIENT) * U * abs(loss)))


def kl_divergence(q, p, err_ratio):
    """KL(p || q), its bound, and those of its gradients by z of q and of p; log p - log q is off by err_ratio."""
    ratio_V, gap_V = p.log_p_V - q.log_p_V, np.abs(p.z_V - q.z_V)
    kl, weighted = p.p_V @ ratio_V, p.p_V @ gap_V
    of_sum = p.err_p_V @ gap_V + len(gap_V) * U * weighted
    err = err_ratio + of_sum + 2 * U * (weighted + abs(q.lse) + abs(p.lse) + kl)
    err_q_V = q.err_p_V + p.err_p_V + (2 + COEFFICIENT) * U * np.abs(q.p_V - p.p_V)
    weight_V = p.err_p_V + (2 + COEFFICIENT) * U * p.p_V
    return kl, err, err_q_V, weight_V * np.abs(ratio_V - kl) + p.p_V * (err_ratio + err)


def jensen_shannon(student, teacher, err_ratio, beta):
    """The divergence, its bound, and those of its gradients by z of student and of teacher."""
    log_m_V = np.log(beta * teacher.p_V + (1 - beta) * student.p_V)
    # One exp, the rounding of its argument (r e^-r < 0.4), the log of a sum of at most 2, logarithms of the shares.
    fixed = EXP + 0.4 * EXP_ARGUMENT + LOG * np.log(2) - 3 * (np.log(beta) + np.log(1 - beta))
    divergence, err, by_side = 0.0, 0.0, []
    for side, share in ((student, 1 - beta), (teacher, beta)):
        x_V = side.log_p_V - log_m_V
        kl, err_x_V = side.p_V @ x_V, 2 * err_ratio + U * (fixed + 2 * np.abs(x_V))
        err_kl = (side.err_p_V + (2 + len(x_V)) * U * side.p_V) @ np.abs(x_V) + side.p_V @ err_x_V
        weight_V = side.err_p_V + (4 + COEFFICIENT) * U * side.p_V
        by_side.append(share * (weight_V * np.abs(x_V - kl) + side.p_V * (err_x_V + err_kl)))
        divergence, err = divergence + share * kl, err + share * (err_kl + 4 * U * kl)
    return divergence, err, *by_side


def softcapped(raw_V, err_raw, cap):
    """softcap(raw), its slope, the largest error of the former, and the error of the slope."""
    if not cap:
        return raw_V, np.ones(len(raw_V)), err_raw, 0.0
    tanh_V = np.tanh(raw_V / cap)
    err_z = err_raw + TANH * U * np.max(np.abs(raw_V))
    return cap * tanh_V, 1 - tanh_V**2, err_z, 2 * err_raw / cap + 2 * TANH * U


def log_probs(raw_V, err_raw, label, upstream_R, cap, temp):
    """Results [R] of one token, their bounds [R], and the bound of the gradient by raw logits."""
    z_V, slope_V, err_z, err_slope = softcapped(raw_V, err_raw, cap)
    z_V, err_z = z_V / temp, err_z / temp
    # The reciprocal of the temperature, and the product with it.
    scaled = 2 * U if temp != 1 else 0.0
    sm, one_hot_V = softmax(z_V, err_z + scaled * np.max(np.abs(z_V))), np.arange(len(z_V)) == label
    log_p, size = sm.log_p_V[label], abs(upstream_R[0])
    found, errors = [log_p], [sm.err_lse + err_z + U * (3 * abs(z_V[label]) + 2 * abs(log_p))]
    dz_V = size * np.abs(one_hot_V - sm.p_V)
    err_V = size * sm.err_p_V + (1 + COEFFICIENT) * U * dz_V
    if len(upstream_R) == 2:
        h, err_h = entropy(sm, err_z)
        d_V, err_d = np.maximum(np.max(z_V) - z_V, -sm.log_p_V), sm.err_lse + 2 * err_z
        found, errors = [log_p, h], [*errors, err_h]
        centred_V, size = np.abs(sm.log_p_V + h), abs(upstream_R[1])
        err_V += size * sm.err_p_V * centred_V
        err_V += size * sm.p_V * (err_d + err_h + (3 + COEFFICIENT) * U * (d_V + sm.p_V @ d_V))
        dz_V = dz_V + size * sm.p_V * centred_V
    # A gradient may be flushed to 0 before 1 / temp increases it.
    err_V = (err_V + scaled * dz_V) / temp + NEAR_ZERO / min(temp, 1)
    return np.array(found), np.array(errors), err_V * slope_V + dz_V / temp * err_slope


def entropy(sm, err_z):
    """The entropy, and its bound: a sum of p d, with d = z - m or log p."""
    d_V, h = np.maximum(np.max(sm.z_V) - sm.z_V, -sm.log_p_V), -sm.p_V @ sm.log_p_V
    err = sm.err_p_V @ d_V + (sm.err_lse + 2 * err_z) + sm.err_lse
    return h, err + U * ((len(d_V) + 3) * (sm.p_V @ d_V) + 2 * h)


class TopK(NamedTuple):
    """One token: T^2 D, its bound; gradient by raw logits, its bound; bound of the gradient by log p."""

    loss: float
    err: float
    by_raw_V: np.ndarray
    err_raw_V: np.ndarray
    flushed: float  # of the gradient by raw logits, whatever its coefficient
    err_K: np.ndarray


def top_k(raw_V, err_raw, classes_K, log_p_K, tail, cap, temp):
    vocab, num, u2 = len(raw_V), len(log_p_K), 2 * U
    z_V, slope_V, err_z, err_slope = softcapped(raw_V, err_raw, cap)
    z_V, err_z = z_V / temp, err_z / temp
    err_z += u2 * np.max(np.abs(z_V)) if temp != 1 else 0.0
    # The other classes have a separate softmax; its sum also has V terms, of which K are 0.
    sm, rest = softmax(z_V, err_z), np.setdiff1d(np.arange(vocab), classes_K)
    others = softmax(z_V[rest], err_z)
    err_others, err_others_V = others.err_lse + num * U, others.err_p_V + num * U * others.p_V
    log_q_K, q_rest, r = sm.log_p_V[classes_K], sm.p_V[rest].sum(), np.max(z_V) - np.max(z_V[rest])
    log_q_rest = np.log(q_rest)
    # The sum over all classes is that of the others, rescaled, plus that of the K.
    more = U * q_rest * (EXP_ARGUMENT * r + EXP + 2)
    err_lse = sm.err_lse + more
    err_log_q_K = err_lse + err_z + U * (3 * np.abs(z_V[classes_K]) + 2 * np.abs(log_q_K))
    err_log_q_rest = err_lse + err_others + u2 * (abs(log_q_rest) + r)

    p_K = np.exp(log_p_K)
    err_p_K = p_K * U * (EXP - EXP_ARGUMENT * log_p_K) + NEAR_ZERO
    err_sum = err_p_K.sum() + num * U * p_K.sum()
    p_rest = 1 - p_K.sum() if tail else 0.0
    err_rest = err_sum + U * p_rest if tail else 0.0
    log_p_rest = np.log(p_rest) if tail else 0.0
    ratio_K, ratio = log_p_K - log_q_K, log_p_rest - log_q_rest if tail else 0.0
    divergence, sizes = p_K @ ratio_K + p_rest * ratio, p_K @ np.abs(ratio_K) + p_rest * abs(ratio)
    err = p_K @ err_log_q_K + err_p_K @ np.abs(ratio_K) + (num + 3) * U * sizes
    if tail:
        err += p_rest * (err_log_q_rest + LOG * U * abs(log_p_rest)) + err_rest * abs(log_q_rest)
        # The error of x log x is that of x times its slope.
        err += err_rest * (abs(np.log(p_rest - err_rest)) + 1)

    total, w_V, err_w_V = p_K.sum() + p_rest, np.zeros(vocab), np.zeros(vocab)
    w_V[rest], err_w_V[rest] = p_rest * others.p_V, p_rest * err_others_V + err_rest * others.p_V
    w_V[classes_K], err_w_V[classes_K] = p_K, err_p_K
    err_total = err_sum + err_rest + vocab * U * total
    logs = sm.lse - np.max(z_V) + others.lse - np.max(z_V[rest])
    err_q_V = sm.err_p_V + sm.p_V * (more + U * (LOG * logs + 2 * abs(log_q_rest) + 2 * r))
    dz_V, size_V = total * sm.p_V - w_V, total * sm.p_V + w_V
    err_V = total * err_q_V + err_total * sm.p_V + err_w_V + (2 + COEFFICIENT) * U * size_V
    err_V = temp * (err_V + u2 * np.abs(dz_V)) * slope_V + temp * np.abs(dz_V) * err_slope

    err_ratio_K = err_log_q_K
    if tail:
        # The lse of all classes, which both log-probabilities contain, cancels.
        err_log_p_rest = err_rest / (p_rest - err_rest) + LOG * U * abs(log_p_rest)
        err_ratio_K = err_log_q_K + err_log_p_rest + err_log_q_rest - 2 * err_lse
    sizes_K = np.abs(ratio_K) + abs(ratio) + 1
    err_K = err_p_K * sizes_K + p_K * (err_ratio_K + (2 + COEFFICIENT) * U * sizes_K)
    err = temp**2 * (err + 3 * U * abs(divergence))
    return TopK(
        temp**2 * divergence, err, temp * dz_V * slope_V, err_V, NEAR_ZERO / min(temp, 1), temp**2 * err_K + NEAR_ZERO
    )


class Head(NamedTuple):
    """Hidden states of one token, weight and bias."""

    hidden_H: np.ndarray
    weight_VH: np.ndarray
    bias_V: np.ndarray

    def arrays(self):
        return {"hidden_states": self.hidden_H[None], "lm_weight": self.weight_VH, "lm_bias": self.bias_V}

    @property
    def logits(self):
        return self.weight_VH @ self.hidden_H + self.bias_V

    @property
    def err(self):
        """Error of the logits: sums of H products and a bias."""
        sizes_V = np.abs(self.weight_VH) @ np.abs(self.hidden_H) + np.abs(self.bias_V)
        return (len(self.hidden_H) + 1) * U * np.max(sizes_V)

    def gradient_errors(self, dz_V, err_V):
        """Errors of the gradients, before they are stored, from the gradient by the logits and its error."""
        vocab, size_V = len(dz_V), np.abs(dz_V)
        # Sums over V, or over one token; each term may be flushed to 0.
        err_H = (err_V + vocab * U * size_V) @ np.abs(self.weight_VH) + vocab * NEAR_ZERO
        err_V = err_V + U * size_V
        err_VH = np.outer(err_V, np.abs(self.hidden_H)) + NEAR_ZERO
        return {"hidden_states": err_H, "lm_weight": err_VH, "lm_bias": err_V + NEAR_ZERO}

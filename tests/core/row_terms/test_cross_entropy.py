"""Cross entropy, its options and metrics from row terms, against the definition; over NumPy, torch and JAX."""

import numpy as np
import pytest

from helpers.row_terms import OBJECTIVE, dense, draw_logits, log_softmax, namespace, namespaces, terms_of
from loss_core import row_terms
from loss_core.row_terms import CrossEntropy, RowTerms

# T = rows, V = vocabulary


@namespaces
def test_value_and_gradient_are_those_of_the_definition(name):
    xp, asarray = namespace(name)
    z_TV, column_T = draw_logits()
    upstream_T = np.linspace(0.5, 2.0, 6)
    terms = RowTerms(*map(asarray, terms_of(z_TV, column_T)))
    rtol, atol = (1e-5, 1e-5) if name == "jax" else (1e-13, 1e-13)
    log_p = log_softmax(z_TV)
    value_T = OBJECTIVE.values(xp, terms)[0]
    np.testing.assert_allclose(np.asarray(value_T), -log_p[np.arange(6), column_T], rtol=rtol, atol=atol)
    coefficients = OBJECTIVE.coefficients(xp, terms, [asarray(upstream_T)])
    scale_T, target_T = (np.asarray(x) for x in coefficients[:2])
    assert coefficients.uniform is None
    one_hot = column_T[:, None] == np.arange(13)
    grad_TV = np.exp(z_TV - z_TV.max(-1, keepdims=True)) * scale_T[:, None]
    grad_TV = np.where(one_hot, target_T[:, None], grad_TV)
    np.testing.assert_allclose(grad_TV, upstream_T[:, None] * (np.exp(log_p) - one_hot), rtol=rtol, atol=atol)


@namespaces
def test_smoothing_and_z_loss_are_those_of_the_definition(name):
    import torch

    xp, asarray = namespace(name)
    z_TV, column_T = draw_logits()
    z_TV, options = np.where(np.isneginf(z_TV), -5.0, z_TV), (0.1, 0.5)
    upstream_T, objective = np.linspace(0.5, 2.0, 6), CrossEntropy(13, *options)
    z, columns = torch.from_numpy(z_TV).requires_grad_(), torch.from_numpy(column_T)
    expected_T = torch.nn.functional.cross_entropy(z, columns, reduction="none", label_smoothing=options[0])
    expected_T = expected_T + options[1] * z.logsumexp(-1).square()
    (expected_TV,) = torch.autograd.grad(expected_T, z, torch.from_numpy(upstream_T))
    terms = RowTerms(*map(asarray, terms_of(z_TV, column_T)))
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if name == "jax" else {"rtol": 1e-12, "atol": 1e-12}
    value = np.asarray(objective.values(xp, terms)[0])
    np.testing.assert_allclose(value, expected_T.detach().numpy(), **tolerance)
    found = objective.coefficients(xp, terms, [asarray(upstream_T)])
    np.testing.assert_allclose(dense(found, z_TV, terms, column_T[:, None]), expected_TV.numpy(), **tolerance)


def test_a_large_common_offset_costs_no_precision():
    z_TV, column_T = draw_logits(scale=1.0)
    z_TV = np.where(np.isneginf(z_TV), -30.0, z_TV).astype(np.float32)
    z_TV[:] = z_TV[0]  # the same row everywhere
    z_TV = np.round(z_TV * 1024) / 1024
    both = (z_TV, z_TV + np.float32(4096))
    losses = [
        OBJECTIVE.values(np, RowTerms(*map(np.float32, terms_of(z.astype(np.float32), column_T))))[0] for z in both
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-7)


@pytest.mark.parametrize(("roundings", "accuracy"), [(0, 1), (4, 1), (5, 0)])
@pytest.mark.parametrize("m", [8.0, -8.0])
def test_a_target_within_two_roundings_of_the_maximum_is_the_maximum(m, roundings, accuracy):
    # In float64, in which numbers around 8 are 8 eps apart.
    t = m - roundings * 8 * np.finfo(np.float64).eps
    terms = RowTerms(*(np.asarray([x]) for x in (m, 1.0, t)))
    assert row_terms.token_metrics(np, terms, OBJECTIVE, ["accuracy"])[0] == accuracy


def test_metrics_of_a_token_are_those_of_the_definition():
    z_TV, column_T = draw_logits()
    terms, objective, log_p = RowTerms(*terms_of(z_TV, column_T)), CrossEntropy(13, z_loss=0.25), log_softmax(z_TV)
    lse_T = z_TV.max(-1) - log_p.max(-1)
    expected = {
        "accuracy": z_TV.argmax(-1) == column_T,
        "entropy": -(np.exp(log_p) * np.where(np.isneginf(log_p), 0.0, log_p)).sum(-1),
        "lse": lse_T,
        "z_loss": 0.25 * lse_T**2,
    }
    found = row_terms.token_metrics(np, terms, objective, list(expected))
    for name, metric_T in zip(expected, found, strict=True):
        np.testing.assert_allclose(metric_T, expected[name], rtol=1e-12, atol=1e-12, err_msg=name)

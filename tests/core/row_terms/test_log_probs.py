"""Log-probability and entropy from row terms, against the definition; over NumPy, torch and JAX."""

import numpy as np

from helpers.row_terms import draw_logits, log_softmax, namespace, namespaces, terms_of
from loss_core import row_terms
from loss_core.row_terms import LogProbability, RowTerms

# T = rows, V = vocabulary


@namespaces
def test_log_probability_and_entropy_are_those_of_the_definition(name):
    xp, asarray = namespace(name)
    z_TV, column_T = draw_logits()
    upstream_T, of_entropy_T = np.linspace(0.5, 2.0, 6), np.linspace(1.0, -1.0, 6)
    terms = RowTerms(*map(asarray, terms_of(z_TV, column_T)))
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if name == "jax" else {"rtol": 1e-13, "atol": 1e-13}
    log_p = log_softmax(z_TV)
    weighted = np.exp(log_p) * np.where(np.isneginf(log_p), 0.0, log_p)
    entropy_T = -weighted.sum(-1)
    np.testing.assert_allclose(
        np.asarray(LogProbability().values(xp, terms)[0]), log_p[np.arange(6), column_T], **tolerance
    )
    np.testing.assert_allclose(np.asarray(row_terms.entropy(xp, terms)), entropy_T, **tolerance)
    found = LogProbability(entropy=True).coefficients(xp, terms, [asarray(upstream_T), asarray(of_entropy_T)])
    scale_T1, target_T1, _, slope_T1 = (None if x is None else np.asarray(x)[:, None] for x in found[:4])
    x_TV, one_hot = z_TV - z_TV.max(-1, keepdims=True), column_T[:, None] == np.arange(13)
    grad_TV = np.exp(x_TV) * (scale_T1 + slope_T1 * np.where(np.isneginf(x_TV), 0.0, x_TV))
    grad_TV = np.where(one_hot, target_T1, grad_TV)
    expected_TV = upstream_T[:, None] * (one_hot - np.exp(log_p))
    expected_TV -= of_entropy_T[:, None] * (weighted + np.exp(log_p) * entropy_T[:, None])
    np.testing.assert_allclose(grad_TV, expected_TV, **tolerance)
    assert LogProbability(entropy=True).coefficients(xp, terms, [asarray(upstream_T), None]).slope is None

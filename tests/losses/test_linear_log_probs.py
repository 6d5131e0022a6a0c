"""Error bounds of log-probabilities of a head against roundings counted by hand."""

import numpy as np
import pytest

from helpers.roundings import TINY, Head, log_probs, stored
from loss_core import FusedLinearLogProbsConfig
from loss_core.losses import allowances, evaluate

HEAD = Head(np.array([0.5, -1.5]), np.array([[1.0, 0.5], [-0.75, 1.25], [0.5, -1.0]]), np.array([0.3, -0.2, 0.1]))
LABEL, UPSTREAM_R = 1, np.array([-0.8, 1.3])


@pytest.mark.parametrize("size", [1.0, TINY])
@pytest.mark.parametrize("temp", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("cap", [0.0, 4.0])
def test_every_rounding_is_in_the_bound_once(cap, temp, size):
    config = FusedLinearLogProbsConfig(entropy=True, logit_softcapping=cap, temperature=temp)
    arrays, upstream = HEAD.arrays() | {"labels": np.array([LABEL])}, size * UPSTREAM_R[:, None]
    expected = evaluate(config, arrays, upstream)
    allowed = allowances(config, arrays, expected, "float32", upstream=upstream)
    found, errors, err_V = log_probs(HEAD.logits, HEAD.err, LABEL, size * UPSTREAM_R, cap, temp)
    np.testing.assert_allclose(expected.loss.ravel(), found, rtol=1e-12)
    np.testing.assert_allclose(allowed["loss"].ravel(), stored(found, errors), rtol=1e-10)
    for name, error in HEAD.gradient_errors(expected.grads["lm_bias"], err_V).items():
        bound = stored(expected.grads[name], error)
        np.testing.assert_allclose(allowed[name], bound, rtol=1e-10, err_msg=name)

"""Error bounds of log-probabilities and entropies against roundings counted by hand."""

import numpy as np
import pytest

from helpers.roundings import TINY, log_probs, stored
from loss_core import FusedLinearLogProbsConfig, LogProbsConfig
from loss_core.losses import allowances, evaluate

RAW_V, LABEL, UPSTREAM_R = np.array([0.5, -1.0, 2.25]), 1, np.array([-0.8, 1.3])


@pytest.mark.parametrize("size", [1.0, TINY])
@pytest.mark.parametrize("temp", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("cap", [0.0, 4.0])
@pytest.mark.parametrize("entropy", [False, True])
def test_every_rounding_is_in_the_bound_once(entropy, cap, temp, size):
    config = LogProbsConfig(entropy=entropy, logit_softcapping=cap, temperature=temp)
    arrays, upstream_RT = {"logits": RAW_V[None], "labels": np.array([LABEL])}, size * UPSTREAM_R[: 1 + entropy, None]
    upstream = upstream_RT if entropy else upstream_RT[0]
    expected = evaluate(config, arrays, upstream)
    allowed = allowances(config, arrays, expected, "float32", upstream=upstream)
    found, errors, err_V = log_probs(RAW_V, 0.0, LABEL, upstream_RT[:, 0], cap, temp)
    np.testing.assert_allclose(expected.loss.ravel(), found, rtol=1e-12)
    np.testing.assert_allclose(allowed["loss"].ravel(), stored(found, errors), rtol=1e-10)
    np.testing.assert_allclose(allowed["logits"][0], stored(expected.grads["logits"][0], err_V), rtol=1e-10)


@pytest.mark.parametrize(
    "config", [LogProbsConfig(entropy=True), FusedLinearLogProbsConfig(entropy=True)], ids=["logits", "heads"]
)
@pytest.mark.parametrize("label", [3, -1, 2**40])
def test_a_label_that_is_no_class_makes_its_own_token_nan(config, label):
    rows, arrays = np.array([[0.5, -1.0, 2.25], [1.0, 2.0, 3.0]]), {"labels": np.array([1, label])}
    if isinstance(config, LogProbsConfig):
        name, arrays = "logits", arrays | {"logits": rows}
    else:
        name, arrays = "hidden_states", arrays | {"hidden_states": rows, "lm_weight": np.eye(3)}
    expected = evaluate(config, arrays)
    allowed = allowances(config, arrays, expected, "float32")
    for found in (expected.loss.T, expected.grads[name]):
        assert np.isfinite(found[0]).all()
        assert np.isnan(found[1]).all()
    assert all(np.isfinite(error).all() for error in allowed.values())

"""The distribution of differences, against values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from loss_core.mismatch import Token, dump_of
from loss_core.mismatch.statistics import statistics_of


def test_statistics_computed_by_hand():
    trainer = np.log([0.5, 0.25, 0.125, 0.5, 0.5])
    engine = np.log([0.5, 0.5, 0.125 / 1.005, 0.5, 0.9])
    labels = np.array([1, 0, 2, 7, -100])
    engine[3] = np.nan
    found = statistics_of(dump_of({"labels": labels, "trainer_logprobs": trainer, "engine_logprobs": engine}))
    half, little = np.log(2), np.log(1.005)
    assert (found.tokens, found.ignored, found.not_finite) == (3, 1, {"trainer": 0, "engine": 1})
    assert found.mean == pytest.approx((little - half) / 3)
    # r = trainer / engine is 1, 1/2 and 1.005.
    assert found.k1 == pytest.approx((half - little) / 3)
    assert found.k3 == pytest.approx((0.5 - 1 + half + 1.005 - 1 - little) / 3)
    assert found.quantiles[0.5] == pytest.approx(little)
    assert found.quantiles[1.0] == pytest.approx(half)
    assert found.bands == pytest.approx({1e-3: 1 / 3, 1e-2: 2 / 3, 5e-2: 2 / 3})
    assert found.worst[0] == Token((1,), 0, trainer[1], engine[1])
    assert [token.position for token in found.worst] == [(1,), (2,), (0,)]
    assert sum(found.histogram) == 3


def test_nothing_to_compare_gives_nan():
    found = statistics_of(
        dump_of({"labels": np.array([1]), "trainer_logprobs": np.array([np.nan]), "engine_logprobs": np.array([-1.0])})
    )
    assert found.tokens == 0
    assert np.isnan(found.k3)
    assert found.worst == []

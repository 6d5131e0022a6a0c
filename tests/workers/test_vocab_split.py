"""Splits of a vocabulary over ranks, and the merged results of the ranks."""

from dataclasses import replace

import numpy as np
import pytest

from loss_core import LOSS_CONFIG_REGISTRY, FusedLinearCEConfig
from loss_core.dispatch.protocol import Evaluation
from loss_core.workers.vocab_split import merge, shard, splits, vocab_axes


@pytest.mark.parametrize("vocab", [1, 2, 7, 504, 507])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_split_covers_the_vocabulary(vocab, ranks):
    found = splits(vocab, ranks)
    assert all(len(sizes) == ranks and sum(sizes) == vocab and min(sizes) >= 0 for sizes in found.values())
    assert ("even" in found) == (ranks > 1 and vocab % ranks == 0)
    if ranks > 1:
        assert found["empty"][-1] == 0
        # Code for equal shards assumes that offsets are multiples of a rank's size: here they are not.
        starts = np.cumsum((0, *found["uneven"][:-1]))
        assert vocab < 7 or any(s != r * n for r, (s, n) in enumerate(zip(starts, found["uneven"], strict=True)))


@pytest.mark.parametrize(
    ("config", "name"), [(loss(), name) for loss in LOSS_CONFIG_REGISTRY.values() for name in vocab_axes(loss)]
)
def test_shards_concatenate_to_the_unsharded_array(config, name):
    axis = vocab_axes(config)[name]
    whole = np.arange(5.0 * 7).reshape((7, 5) if axis == 0 else (5, 7))
    of_ranks = [
        Evaluation(np.zeros(()), {name: shard(axis, whole, (4, 0, 3), rank), "hidden_states": np.ones(2)}, {}, (), "")
        for rank in range(3)
    ]
    found = merge(config, of_ranks)
    np.testing.assert_array_equal(found.grads[name], whole)
    assert found.ranks_differ == ()


def test_a_difference_of_one_bit_between_ranks_is_reported():
    one = Evaluation(np.ones(()), {"hidden_states": np.zeros(2)}, {}, (), "")
    other = replace(one, loss=np.nextafter(np.ones(()), 2), grads={"hidden_states": np.array([0.0, -0.0])})
    found = merge(FusedLinearCEConfig(), [one, other])
    assert (found.ranks_differ, found.loss, found.grads) == (("loss", "hidden_states"), one.loss, one.grads)
    assert merge(FusedLinearCEConfig(), [one]) == one
    nan = replace(one, loss=np.full((), np.nan))
    assert merge(FusedLinearCEConfig(), [nan, nan]).ranks_differ == ()

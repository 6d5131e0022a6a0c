"""One benchmark call: inputs, sizes, bytes."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from loss_core import FusedLinearCEConfig, KDLossConfig, MaskedCrossEntropyConfig
from loss_core.bench.measure.job import BLOCK, Job, Tiled, gradient_bytes, input_bytes, make_inputs


def test_inputs_are_reproducible_and_have_the_exact_share_of_ignored_labels():
    job = Job(FusedLinearCEConfig().to_dict(), (40, 30, 8), "float32", ignored=0.25)
    (tiles, labels), (again, labels_again) = make_inputs(job), make_inputs(job)
    assert all(np.array_equal(tiles[name].full(), again[name].full()) for name in tiles)
    assert np.array_equal(labels, labels_again)
    assert (labels == -100).sum() == 10
    assert job.num_valid_tokens == 30
    assert tiles["lm_weight"].full().shape == (30, 8)
    assert input_bytes(job) == 4 * (40 * 8 + 30 * 8)


def test_no_two_rows_of_a_repeated_block_are_equal():
    rng = np.random.default_rng(0)
    tile = Tiled(rng.standard_normal(BLOCK, np.float32), (300, 32_768))
    rows = tile.full()
    assert len(np.unique(rows[:, :3], axis=0)) == 300
    assert np.array_equal(tile.rows(np.array([0, 7, 299])), rows[[0, 7, 299]])


def test_torch_and_jax_have_the_same_inputs():
    torch_inputs = importlib.import_module("loss_core_bench.torch_inputs")
    jax_runner = importlib.import_module("loss_core_bench.jax_runner")
    tile = Tiled(np.random.default_rng(0).standard_normal(1000, np.float32), (70, 50))
    ours = torch_inputs.place(tile, torch_inputs.DTYPES["bfloat16"], "cpu").float().numpy()
    theirs = np.asarray(jax_runner.place(tile, "bfloat16")).astype(np.float32)
    assert np.array_equal(ours, theirs)
    assert ours.shape == (70, 50)
    assert ours[1, 0] == pytest.approx(tile.full()[1, 0], rel=2**-8)


@pytest.mark.parametrize(
    ("config", "shape", "more", "size"),
    [
        (MaskedCrossEntropyConfig(), (6, 10), {}, 4 * 60),
        (KDLossConfig(), (6, 10), {"dtype": "bfloat16"}, 2 * 60),
        (FusedLinearCEConfig(), (6, 10, 5), {}, 4 * (6 + 10) * 5),
        (FusedLinearCEConfig(), (6, 10, 5), {"tp": 3}, 4 * (6 + 4) * 5),
        (KDLossConfig(), (6, 10), {"forward_only": True}, 0),
    ],
)
def test_gradient_bytes_are_those_of_the_returned_gradients(config, shape, more, size):
    assert gradient_bytes(Job(config.to_dict(), shape, **{"dtype": "float32"} | more)) == size

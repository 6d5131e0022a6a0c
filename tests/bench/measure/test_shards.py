"""Shards of a call over ranks, and the merged results of the ranks."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from loss_core.bench.measure.job import Tiled
from loss_core.bench.measure.shards import merge_ranks, rank_sizes


def test_the_vocabulary_is_sharded_as_torch_does():
    torch = importlib.import_module("torch")
    for vocab in (1, 2, 7, 12, 301):
        for ranks in (1, 2, 3, 4):
            chunks = [len(part) for part in torch.arange(vocab).chunk(ranks)]
            sizes = rank_sizes(vocab, ranks)
            assert [size for size in sizes if size] == chunks
            assert len(sizes) == ranks


def test_the_inputs_of_a_rank_are_a_slice_of_the_full_arrays():
    torch_inputs = importlib.import_module("loss_core_bench.torch_inputs")
    # A block shorter than the array, so that it is repeated and rows start at any offset in it.
    tile = Tiled(np.random.default_rng(0).standard_normal(997, np.float32), (50, 70))
    full = tile.full()
    columns = torch_inputs.place_columns(tile, 20, 45, torch_inputs.DTYPES["float32"], "cpu").numpy()
    assert np.array_equal(columns, full[:, 20:45])
    assert np.array_equal(tile.row_range(11, 30).full(), full[11:30])
    wide = Tiled(tile.block, (3, 2000))
    columns = torch_inputs.place_columns(wide, 1500, 2000, torch_inputs.DTYPES["float32"], "cpu").numpy()
    assert np.array_equal(columns, wide.full()[:, 1500:])


def test_merged_results_concatenate_shards_and_keep_distinct_replicated_values():
    per_rank = [
        {"loss": np.array(1.0), "lm_weight": np.ones((3, 2)), "hidden_states": np.zeros((4, 2)),
         "rows": np.zeros((1, 2)), "inner": np.array([5.0, 2.0])},
        {"loss": np.array(1.0), "lm_weight": np.ones((2, 2)), "hidden_states": np.zeros((4, 2)),
         "rows": np.zeros((1, 2)), "inner": np.array([5.0, 3.0])},
    ]  # fmt: skip
    (same,) = merge_ranks(per_rank, {"lm_weight": 0}, ("hidden_states", "lm_weight"))
    assert same["lm_weight"].shape == (5, 2)
    assert list(same["inner"]) == [5.0, 5.0]
    per_rank[1]["hidden_states"] = np.full((4, 2), np.nan)
    assert [
        merged["hidden_states"][0, 0]
        for merged in merge_ranks(per_rank, {"lm_weight": 0}, ("hidden_states", "lm_weight"))
    ] == pytest.approx([0, np.nan], nan_ok=True)
    rows = [{"rows": np.zeros((2, size))} for size in (3, 2)]
    assert merge_ranks(rows, {"logits": -1}, ("logits",))[0]["rows"].shape == (2, 5)

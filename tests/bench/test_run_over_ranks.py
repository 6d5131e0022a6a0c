"""`bench` over ranks that shard the vocabulary."""

from __future__ import annotations

import os
import sys

import pytest

from helpers.processes import workers_of
from loss_core import unregister_loss
from loss_core.bench import bench
from loss_core.bench.text import bench_text

DIES = """
import os
import torch.distributed as dist
from dataclasses import dataclass
from loss_core import MaskedCrossEntropyConfig, register_loss

@dataclass
class DiesConfig(MaskedCrossEntropyConfig):
    pass

def dies(config):
    def loss(logits, labels):
        if dist.get_rank() == 1:
            os.kill(os.getpid(), 9)
        dist.barrier()
    return loss

register_loss("Dies", DiesConfig, {"torch": dies})
"""


def test_a_run_over_ranks_has_every_column_and_a_rank_that_dies_is_a_row_with_its_error(tmp_path, monkeypatch):
    before = workers_of(os.getpid())
    (tmp_path / "dying_loss.py").write_text(DIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    __import__("dying_loss")
    try:
        report = bench(["FusedLinearCrossEntropy", "Dies"], ["torch:eager"], shapes=[(40, 301, 16)], tp=2, rounds=1,
                       threads=2, imports=["dying_loss"], baselines=["compiled-torch", "torch-linear-ce"])  # fmt: skip
    finally:
        unregister_loss("Dies")
        del sys.modules["dying_loss"]
    (roofline, ours), (_, dead) = report.groups()
    assert roofline.seconds > 0
    assert "of the largest of 2 parts" in roofline.note
    assert "not counted: communication between the ranks, at least 3 numbers per token" in roofline.note
    assert ours.error == ""
    assert ours.error_ratio <= 1
    assert len(ours.rounds) == 1
    assert ours.calls >= 1
    assert report.settings["tp"] == 2
    assert dead.error.startswith("rank 1 of 2: its process was ended by SIGKILL")
    assert dead.seconds is None
    text = bench_text(report)
    assert "FusedLinearCrossEntropy, 40 x 301 x 16, float32, forward + backward, over 2 ranks" in text
    assert "compiled-torch: not over tensor parallel" in text
    assert "torch-linear-ce: not over tensor parallel" in text
    assert workers_of(os.getpid()) == before


def test_a_loss_that_cannot_be_sharded_is_not_run_and_listed():
    report = bench("ChunkedCrossEntropy", ["torch:eager"], shapes=[(8, 10, 4)], tp=2, baselines=[])
    assert report.rows == []
    assert [(missing.name, missing.reason) for missing in report.missing] == [
        ("ChunkedCrossEntropy", "it has no tp_group")
    ]


@pytest.mark.parametrize("options", [{"tp": 0}, {"tp": True}, {"tp": 2, "device": "cuda:1"}])
def test_an_invalid_count_of_ranks_raises_before_any_process_is_started(options):
    with pytest.raises(ValueError, match=r"tp must be a whole number >= 1|name the kind alone, 'cuda'"):
        bench("KDLoss", ["torch:eager"], shapes=[(8, 10)], baselines=[], **options)

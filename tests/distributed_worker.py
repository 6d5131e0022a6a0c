"""One rank of the scenarios of test_torch_distributed.py; run as a script, one process per rank.

Usage: distributed_worker.py RANK WORLD_SIZE FOLDER [FLAG]

Runs every scenario of its world size and flag in turn, since starting the interpreters takes longer than all of them.
"""

import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import fsdp_scenarios as fsdp
import parallel_scenarios as parallel
from worker_exit import leave_after

SCENARIOS = {
    1: (parallel.every_loss_and_case, parallel.placed_on_one_dimension, parallel.sequence_parallel),
    2: (
        parallel.every_loss_and_case, parallel.every_split, parallel.few_classes, parallel.other_dtypes,
        parallel.logits_computed_again, parallel.values_stay_on_the_device, parallel.backward_twice,
        parallel.sequence_parallel, parallel.a_mesh_as_group, parallel.placed_on_one_dimension, parallel.collectives,
        parallel.no_tokens, parallel.over_the_logits,
        parallel.refusals, parallel.a_rank_outside, parallel.a_rank_that_does_not_come, parallel.keys_do_not_pile_up,
        parallel.compiled, fsdp.one_dimension,
    ),
    3: (
        parallel.every_split, parallel.few_classes, parallel.sequence_parallel, parallel.a_mesh_as_group,
        parallel.placed_on_one_dimension, parallel.refusals, parallel.a_rank_outside,
    ),
    4: (
        parallel.every_split, parallel.few_classes, parallel.placed_on_one_dimension,
        parallel.placed_on_two_dimensions, parallel.a_batch_of_sequences, parallel.tokens_elsewhere,
        parallel.refusals, parallel.refusals_across_replicas, fsdp.two_dimensions, fsdp.a_head_alone,
    ),
}  # fmt: skip
# Where the kernel plays a part.
OF_TRITON = (parallel.with_triton, parallel.with_triton_in_pieces)


def main():
    rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    flag = sys.argv[4] if len(sys.argv) > 4 else "torch:eager"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=(Path(folder) / "store").as_uri(), rank=rank, world_size=ranks,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    for scenario in OF_TRITON if flag == "torch:triton" else SCENARIOS[ranks]:
        begin = time.monotonic()
        scenario(parallel.World(rank, ranks, flag))
        print(f"held: {scenario.__module__}.{scenario.__name__}", flush=True)
        print(f"{time.monotonic() - begin:.1f} s", file=sys.stderr, flush=True)
    dist.barrier()


if __name__ == "__main__":
    leave_after(main)

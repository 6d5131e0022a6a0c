"""The roofline: a lower bound on the time of a call, from its least work and the rates that the same run measured.

Memory: each input is read once (of arguments with a row per token, the rows of valid tokens) and each gradient written
once, at the rate of a large copy. Arithmetic: a loss over hidden states computes its matrix products over the valid
tokens, one for the logits of each head and one for each gradient, at the rate of a large product. The roofline is the
larger of the two times; only an implementation that skips work can be much faster.

Over ranks that shard the vocabulary it is that of the largest shard, at the rates of one rank while all are busy.
Communication is not counted.
"""

# T = tokens, V = vocabulary, H = hidden

from __future__ import annotations

import math
from dataclasses import dataclass

from loss_core.bench.measure.job import BYTES, Job


@dataclass(frozen=True)
class Work:
    """Least work of one call: bytes through memory, floating-point operations of matrix products."""

    num_bytes: int
    num_flops: int

    def seconds(self, copy_rate: float, product_rate: float) -> float:
        """Time at the rates of a copy (bytes read and written per second) and of a product (operations per second)."""
        product_seconds = self.num_flops / product_rate if self.num_flops else 0.0
        return max(self.num_bytes / copy_rate, product_seconds)


def least_work(job: Job) -> Work:
    """Least work of any implementation of the call, on the rank with the most classes."""
    job = job.of_largest_rank()
    shapes, num_valid = job.float_shapes, job.num_valid_tokens
    # Ignored tokens are not read, but their gradient of 0 has to be stored.
    read = {
        a.name: (num_valid, *shapes[a.name][1:]) if a.dims[0] == "T" else shapes[a.name] for a in job.definition.inputs
    }
    written = () if job.forward_only else job.trained
    elements = sum(map(math.prod, read.values())) + sum(math.prod(shapes[name]) for name in written)
    return Work(BYTES[job.dtype] * elements, 2 * num_valid * job.shape[1] * sum(_hidden_sizes(job)))


def counted_text(job: Job) -> str:
    """What the roofline of a call counts, for the report."""
    if products := len(_hidden_sizes(job)):
        counted = f"{products} matrix product{'s' if products > 1 else ''}"
    else:
        # Arguments with K values per token are too small to mention.
        reads = sum("V" in argument.dims for argument in job.definition.inputs)
        writes = 0 if job.forward_only else len(job.trained)
        counted = f"{reads} read{'s' if reads > 1 else ''}"
        counted += f" + {writes} write{'s' if writes > 1 else ''} of the logits" if writes else " of the logits"
    return counted if job.tp == 1 else f"{counted}, of the largest of {job.tp} parts,"


def uncounted_text(job: Job) -> str:
    """Necessary work that the roofline does not count, for the report: communication; "" for one rank.

    Ranks exchange the statistics of each row over their own classes, and sum the gradients of replicated inputs. How
    much of that can overlap with other work is not known.
    """
    if job.tp == 1:
        return ""
    exchanged = f"{job.definition.row_numbers} numbers per token"
    replicated = [name for name in job.trained if name not in job.definition.vocab_axes]
    if replicated and not job.forward_only:
        exchanged += f" and the sum of the gradients of {' and '.join(replicated)}"
    return f"; not counted: communication between the ranks, at least {exchanged}"


def _hidden_sizes(job: Job) -> list[int]:
    """H of each matrix product [T, H] x [H, V]: the logits of each head, and the gradient of each trained operand."""
    if not job.definition.products:
        return []
    shapes = job.float_shapes
    weights = [argument.name for argument in job.definition.inputs if argument.dims[0] == "V"]
    return [shapes[name][-1] for name in (*weights, *(() if job.forward_only else job.trained))]

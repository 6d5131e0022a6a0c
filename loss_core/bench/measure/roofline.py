"""The roofline: the least work that a loss must do, over the rates that the same run measured.

Over ranks that share the vocabulary it is the work of the largest part, at the rates that one rank has while all of
them are busy. Communication is not counted.

Each input is read once, of arguments with a row per token the rows that are not ignored, and each gradient written
once, at the rate of a large copy; a loss over hidden states must make its matrix products over the tokens that are
not ignored, one for the logits of a head and one for each gradient, at the rate of a large product. The larger of the
two times is the roofline. Nothing runs much faster, unless it leaves out work.
"""

# T = tokens, V = vocabulary, H = hidden

from __future__ import annotations

import math
from dataclasses import dataclass

from loss_core.bench.measure.job import BYTES, Job


@dataclass(frozen=True)
class Work:
    """Least work of one call: bytes through memory, floating-point operations of matrix products."""

    moved: int
    operations: int

    def seconds(self, copy_rate: float, product_rate: float) -> float:
        """Time at the rates of a copy (bytes read and written per second) and of a product (operations per second)."""
        of_products = self.operations / product_rate if self.operations else 0.0
        return max(self.moved / copy_rate, of_products)


def least_work(job: Job) -> Work:
    """Bytes and operations that no implementation of the call can do without, on the rank with the most classes."""
    job = job.of_largest_rank()
    shapes, kept = job.float_shapes, job.num_kept
    # Fewer tokens are read than written: the gradient of an ignored one is 0, and has to be stored.
    read = {a.name: (kept, *shapes[a.name][1:]) if a.dims[0] == "T" else shapes[a.name] for a in job.definition.inputs}
    written = () if job.forward_only else job.trained
    moved = sum(map(math.prod, read.values())) + sum(math.prod(shapes[name]) for name in written)
    return Work(BYTES[job.dtype] * moved, 2 * kept * job.shape[1] * sum(_inner_sizes(job)))


def words(job: Job) -> str:
    """What the roofline of a call counts."""
    if products := len(_inner_sizes(job)):
        counted = f"{products} matrix product{'s' if products > 1 else ''}"
    else:
        # What has K numbers per token is not worth words.
        reads = sum("V" in argument.dims for argument in job.definition.inputs)
        writes = 0 if job.forward_only else len(job.trained)
        counted = f"{reads} read{'s' if reads > 1 else ''}"
        counted += f" + {writes} write{'s' if writes > 1 else ''} of the logits" if writes else " of the logits"
    return counted if job.tp == 1 else f"{counted}, of the largest of {job.tp} parts,"


def left_out(job: Job) -> str:
    """What the roofline does not count though it has to be done: communication of ranks; "" for one rank.

    Ranks exchange the statistics of each row over their own classes, and the gradients of what all of them hold whole,
    which are sums over the classes. How much of that can overlap with other work is not known.
    """
    if job.tp == 1:
        return ""
    exchanged = f"{job.definition.row_numbers} numbers per token"
    whole = [name for name in job.trained if name not in job.definition.vocab_axes]
    if whole and not job.forward_only:
        exchanged += f" and the sum of the gradients of {' and '.join(whole)}"
    return f"; not counted: what the ranks tell each other, at least {exchanged}"


def _inner_sizes(job: Job) -> list[int]:
    """H of each matrix product [T, H] x [H, V]: the logits of each head, and the gradient of each trained operand."""
    if not job.definition.products:
        return []
    shapes = job.float_shapes
    made = [argument.name for argument in job.definition.inputs if argument.dims[0] == "V"]
    return [shapes[name][-1] for name in (*made, *(() if job.forward_only else job.trained))]

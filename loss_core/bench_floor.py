"""The floor: the least work that a loss must do, over the rates that the same run measured.

Over ranks that share the vocabulary it is the work of the largest part, at the rates that one rank has while all of
them are busy. What they tell each other is not counted.

Each input is read once and each gradient written once, at the rate of a large copy; the fused loss must make its
matrix products, at the rate of a large product. The larger of the two times is the floor. Nothing runs much
faster, unless it leaves out work.

| loss | forward + backward | forward only |
|---|---|---|
| cross entropy over logits | 1 read of the rows that count, 1 write of [T, V] | 1 read |
| KD | 2 reads of the rows that count, 1 write of [T, V] | 2 reads |
| fused linear | 3 products over the tokens that count; hidden states and weight read, gradients written | 1 product |
"""

# T = tokens, V = vocabulary, H = hidden

from __future__ import annotations

from dataclasses import dataclass

from loss_core.bench_job import BYTES, Job, kind_of

# What ranks have to tell each other: of each row the statistics that a rank made of its classes, and the gradient of
# hidden states, which is a sum over the classes. Not in the floor: how little of it can't hide behind other work is
# not known.
_EXCHANGE = {
    "logits": "3 numbers per token",
    "kd": "5 numbers per token",
    "fused": "3 numbers per token and the sum of the gradients of hidden_states",
}

# What each kind counts, in words, for reports.
WORDS = {
    ("logits", False): "1 read + 1 write of the logits",
    ("logits", True): "1 read of the logits",
    ("kd", False): "2 reads + 1 write of the logits",
    ("kd", True): "2 reads of the logits",
    ("fused", False): "3 matrix products",
    ("fused", True): "1 matrix product",
}


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
    size = BYTES[job.dtype]
    kind = kind_of(job.loss_config())
    tokens, vocab = job.shape[:2]
    kept = job.num_kept
    if kind == "fused":
        hidden = job.shape[2]
        reads = (kept + vocab) * hidden
        writes = 0 if job.forward_only else (tokens + vocab) * hidden
        products = 1 if job.forward_only else 3
        return Work((reads + writes) * size, products * 2 * kept * vocab * hidden)
    reads = (2 if kind == "kd" else 1) * kept * vocab
    writes = 0 if job.forward_only else tokens * vocab
    return Work((reads + writes) * size, 0)


def words(job: Job) -> str:
    """What the floor of a call counts."""
    counted = WORDS[kind_of(job.loss_config()), job.forward_only]
    return counted if job.tp == 1 else f"{counted}, of the largest of {job.tp} parts,"


def left_out(job: Job) -> str:
    """What it does not count, though every implementation has to do it: empty for one rank."""
    kind = kind_of(job.loss_config())
    exchanged = _EXCHANGE["logits" if kind == "fused" and job.forward_only else kind]
    return "" if job.tp == 1 else f"; not counted: what the ranks tell each other, at least {exchanged}"

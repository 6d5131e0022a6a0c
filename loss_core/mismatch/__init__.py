"""Why a trainer's log-probabilities differ from its inference engine's: `loss-core check --logprobs DUMP`.

>>> import numpy as np
>>> from loss_core.mismatch import dump_of, explain
>>> logprobs = np.log([0.5, 0.25])
>>> dump = dump_of({"labels": np.array([3, 1]), "trainer_logprobs": logprobs, "engine_logprobs": logprobs})
>>> explain(dump).agree
True
"""

from loss_core.mismatch.dump import Dump, dump_of, read_dump, write_dump
from loss_core.mismatch.explain import explain
from loss_core.mismatch.report import Explanation, MismatchReport
from loss_core.mismatch.statistics import Statistics, Token

__all__ = [
    "Dump",
    "Explanation",
    "MismatchReport",
    "Statistics",
    "Token",
    "dump_of",
    "explain",
    "read_dump",
    "write_dump",
]

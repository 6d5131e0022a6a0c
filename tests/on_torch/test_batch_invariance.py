"""Batch-invariant kernels: a token's loss and gradient are bitwise the same whatever else is in the call."""

import pytest

from helpers import interpreter
from helpers.torch_calls import usable_flags
from loss_core import KDLossConfig, LogProbsConfig, MaskedCrossEntropyConfig, TopKDistillationConfig
from loss_core.check import check_invariance
from loss_core.dispatch.flags import COMPILED_AT_FIRST_CALL, parse_flag
from loss_core_torch.backend import batch_invariant

# Each option that changes how kernels process a row.
CONFIGS = {
    "cross-entropy": MaskedCrossEntropyConfig(),
    "cross-entropy-options": MaskedCrossEntropyConfig(label_smoothing=0.1, z_loss=1e-3, logit_softcapping=5.0),
    "kd": KDLossConfig(),
    "kd-reverse": KDLossConfig(divergence="reverse_kl"),
    "jsd": KDLossConfig(divergence="jsd", beta=0.3, temperature=2.0),
    "log-probs": LogProbsConfig(entropy=True, logit_softcapping=5.0, temperature=0.7),
    "top-k": TopKDistillationConfig(logit_softcapping=5.0, temperature=2.0),
}
# Sizes of rows of full vectors in float32 and bfloat16.
PROMISING = [
    pytest.param(flag, marks=[pytest.mark.slow] if flag in COMPILED_AT_FIRST_CALL else [])
    for flag in usable_flags()
    if batch_invariant(parse_flag(flag).kernel, 2 * 504)
]


def test_which_kernels_guarantee_it():
    kernels = ("auto", "plain", "eager", "compile", "triton", "te")
    assert [kernel for kernel in kernels if batch_invariant(kernel, 2 * 504)] == ["eager", "compile", "triton"]
    # Rows that do not begin at a vector.
    assert [kernel for kernel in kernels if batch_invariant(kernel, 2 * 507)] == ["eager", "compile"]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("flag", PROMISING)
def test_the_guarantee_holds(flag, config):
    # The interpreter processes rows one by one.
    report = check_invariance(config, [flag], shape=(2, 72) if flag == interpreter.FLAG else None)
    assert report.passed, str(report)
    assert {row.dtype for row in report.rows if row.promised and row.compared} == {"float32", "bfloat16"}


@pytest.mark.parametrize("name", ["cross-entropy-options", "jsd", "top-k"])
def test_eager_is_invariant_over_blocks_and_threads(name):
    # 20 and 40 rows are two and more blocks of 2^20 logits, and each is shared among threads.
    report = check_invariance(CONFIGS[name], ["torch:eager"], dtypes=["float32"], shape=(20, 60_001))
    assert report.passed, str(report)

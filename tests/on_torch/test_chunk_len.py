"""`chunk_len` of ChunkedCrossEntropy on torch: a bound that holds, results that do not depend on it, refusals."""

# T = tokens, V = vocabulary, H = hidden

import pytest
import torch

from helpers.largest_tensor import LargestTensor
from helpers.torch_calls import REDUCTIONS, assert_same, cells, inputs, run
from loss_core import BackendUnavailable, ChunkedCEConfig, FusedLinearCEConfig
from loss_core_torch.kernels import plain

# H = 4 so that neither the weight's gradient nor the hidden states are larger than a few rows of logits; CHUNK * V is a
# multiple of 256, to which torch:eager rounds the memory for the exponentials of a block.
T, V, H, CHUNK = 20, 320, 4, 8
SIZES = {"lead": (T,), "vocab": V, "hidden": H}
BLOCKWISE = ["torch:eager", "torch:triton"]


def _largest(call):
    with LargestTensor() as seen:
        call()
    return seen.numel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@cells([ChunkedCEConfig(CHUNK, reduction=reduction) for reduction in REDUCTIONS], BLOCKWISE)
def test_at_most_chunk_len_rows_of_logits_are_allocated(flag, config, dtype):
    loss, arguments = config.build(backend=flag), inputs(config, **SIZES, dtype=dtype, ignored=0)
    assert 0 < _largest(lambda: run(loss, arguments)) <= CHUNK * V
    with torch.no_grad():
        assert 0 < _largest(lambda: loss(**arguments)) <= CHUNK * V


@cells([FusedLinearCEConfig(reduction=reduction) for reduction in REDUCTIONS], BLOCKWISE)
def test_without_chunk_len_all_logits_are_allocated(flag, config):
    # Otherwise the test above would pass for any chunk_len.
    loss, arguments = config.build(backend=flag), inputs(config, **SIZES, ignored=0)
    assert _largest(lambda: run(loss, arguments)) >= T * V


@pytest.mark.parametrize("ignored", [0, 3])
@pytest.mark.parametrize("chunk_len", [1, 7, T, T + 1, 10**9])
@cells([ChunkedCEConfig(reduction=reduction) for reduction in REDUCTIONS], BLOCKWISE)
def test_any_chunk_len_gives_the_same(flag, config, chunk_len, ignored):
    lead = (2, 8) if flag == "torch:triton" else (T,)  # whose interpreter visits rows one by one
    arguments = inputs(config, lead, 37, H, dtype=torch.float64, ignored=ignored)
    got = run(ChunkedCEConfig(chunk_len, reduction=config.reduction).build(backend=flag), arguments)
    expected = run(FusedLinearCEConfig(reduction=config.reduction).build(backend="torch:plain"), arguments)
    assert_same(got, expected, rtol=1e-10, atol=1e-12)


def test_other_arguments_of_the_fused_loss_are_accepted():
    arguments = inputs(ChunkedCEConfig(), **SIZES, dtype=torch.float64)
    arguments |= {"lm_bias": torch.linspace(-1, 1, V, dtype=torch.float64).requires_grad_()}
    arguments |= {"loss_weights": torch.linspace(0, 2, T, dtype=torch.float64).requires_grad_()}
    known = {"num_label_tokens": 7, "num_valid_tokens": 13}
    got = run(ChunkedCEConfig(CHUNK).build(backend="torch:eager"), arguments | known)
    expected = run(FusedLinearCEConfig().build(backend="torch:plain"), arguments | {"num_label_tokens": 7})
    assert_same(got, expected, rtol=1e-10, atol=1e-12)


def test_under_torch_compile():
    loss = ChunkedCEConfig(CHUNK).build(backend="torch:eager")
    arguments = inputs(ChunkedCEConfig(), **SIZES)
    traced = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_same(run(traced, arguments), run(loss, arguments))


# --- which kernels


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("flag", ["torch:plain", "torch:te", "torch:compile"])
def test_a_flag_without_blocks_of_tokens_is_refused(flag, compile):
    with pytest.raises(BackendUnavailable, match=rf"'{flag}' has no kernel.*served by torch:eager, torch:triton\."):
        ChunkedCEConfig(compile=compile).build(backend=flag)


@pytest.mark.parametrize("compile", [True, False])
@cells([ChunkedCEConfig()], ["torch", *BLOCKWISE])
def test_no_kernel_is_compiled_by_torch_compile(flag, config, compile):
    loss = ChunkedCEConfig(compile=compile).build(backend=flag)
    assert loss.compile is compile
    assert run(loss, inputs(config))["loss"] > 0


def test_auto_chooses_no_flag_that_is_refused():
    loss = ChunkedCEConfig().build()
    assert not {"plain", "compile", "te"} & set(loss.kernel_choice.candidates)
    # Where FusedLinearCrossEntropy would be torch:plain's.
    cpu, small = torch.device("cpu"), (4, 8, 5)
    assert loss.kernel_for(cpu, torch.float32, small).flag == "torch:eager"
    assert FusedLinearCEConfig().build().kernel_for(cpu, torch.float32, small).flag == "torch:plain"


def test_custom_kernels_without_blocks_are_refused_by_the_call():
    loss = ChunkedCEConfig(CHUNK).build().with_kernels(plain.KERNELS)
    with pytest.raises(BackendUnavailable, match="logits of all tokens, got chunk_len=8: use 'torch:eager' or"):
        loss(**inputs(ChunkedCEConfig()))

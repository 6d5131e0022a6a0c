"""The fused loss in torch:eager: against float64 over several blocks and tiles, its memory, and the work it skips."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from helpers.operations import Operations
from helpers.torch_calls import assert_same, run
from loss_core import FusedLinearCEConfig
from loss_core.row_terms import CrossEntropy, Sums, combine
from loss_core_torch.kernels import HeadOperands, Linear, Wanted, linear_rows
from loss_core_torch.kernels.eager import KERNELS

EAGER = "torch:eager"
# Two blocks of at most 1,024 tokens, three tiles of at most 1,536 classes.
T, V, H = 1030, 3100, 8


def _arguments(tokens=T, vocab=V, dtype=torch.float32, ignored=3):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    if ignored:
        labels[::ignored] = -100
    draw = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in ((tokens, H), (vocab, H))]
    return {"hidden_states": draw[0], "labels": labels, "lm_weight": draw[1]}


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_several_blocks_and_tiles_agree_with_float64(dtype, reduction, softcap):
    config = FusedLinearCEConfig(reduction=reduction, logit_softcapping=softcap)
    arguments = _arguments(dtype=dtype, ignored=0 if reduction == "mean" else 50)
    got = run(config.build(backend=EAGER), arguments)
    wide = {k: x.detach().double().requires_grad_() if x.requires_grad else x for k, x in arguments.items()}
    wanted = run(config.build(backend="torch:plain"), wide)
    torch.testing.assert_close(got["loss"].double(), wanted["loss"], rtol=1e-5, atol=1e-5)
    for name in ("hidden_states", "lm_weight"):
        largest = wanted[name].abs().max().item()
        rtol = torch.finfo(dtype).eps
        torch.testing.assert_close(got[name].double(), wanted[name], rtol=rtol, atol=1e-5 * largest)
    with torch.no_grad():
        evaluated = config.build(backend=EAGER)(**arguments)
    torch.testing.assert_close(evaluated.double(), wanted["loss"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("keep_logits", [True, False])
def test_shards_combine_to_the_full_vocabulary(smoothing, keep_logits):
    torch.manual_seed(0)
    h_TH, w_VH, objective = torch.randn(40, H), torch.randn(V, H), CrossEntropy(V, smoothing)
    labels_T, upstream_T = torch.randint(0, V, (40,)), torch.linspace(-1, 1, 40)
    labels_T[:3] = torch.tensor([0, 13, V - 1])

    def linear(start=0, stop=V):
        bias_V = torch.linspace(-1, 1, V)[start:stop]
        return Linear(HeadOperands(h_TH, w_VH[start:stop], torch.float32, bias_V), labels_T, start, 4.0)

    want = Wanted(True, True, True)
    full, grads = linear_rows.terms_and_grads(KERNELS, linear(), upstream_T, objective, want)
    combined, kept = None, []
    shards = ((0, 13), (13, 13), (13, 14), (14, V))
    for shard in shards:
        part, logits = linear_rows.terms(KERNELS, linear(*shard), objective.sums, keep_logits)
        kept.append(logits)
        combined = part if combined is None else combine(torch, combined, part)
    for got, wanted in zip(combined, full, strict=True):
        if wanted is None:
            continue
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-3)
    assert [x.numel() for x in kept] == [40 * (stop - start) * keep_logits for start, stop in shards]
    coefficients = objective.coefficients(torch, full, [upstream_T])
    found = [
        linear_rows.grads(KERNELS, linear(*shard), full, coefficients, want, logits)
        for shard, logits in zip(shards, kept, strict=True)
    ]
    torch.testing.assert_close(sum(x.hidden_TH for x in found), grads.hidden_TH, rtol=1e-4, atol=1e-5)
    for name in ("weight_VH", "bias_V"):
        parts = torch.cat([getattr(x, name) for x in found])
        torch.testing.assert_close(parts, getattr(grads, name), rtol=1e-4, atol=1e-5)


def test_no_more_logits_are_kept_than_block_tokens_allows():
    h_TH, w_VH, labels_T = torch.randn(40, H), torch.randn(50, H), torch.randint(0, 50, (40,))
    for block_tokens, kept in ((0, True), (39, False), (40, True)):
        linear = Linear(HeadOperands(h_TH, w_VH, torch.float32), labels_T, block_tokens=block_tokens)
        assert linear_rows.terms(KERNELS, linear, Sums(), True)[1].numel() == (40 * 50 if kept else 0)


def test_no_token_and_no_class():
    linear = Linear(HeadOperands(torch.randn(2, H), torch.empty(0, H), torch.float32), torch.tensor([0, 1]), 5)
    empty = linear_rows.terms(KERNELS, linear, Sums(), True)[0]
    assert [x if x is None else x.tolist() for x in empty] == [
        [-torch.inf] * 2,
        [0.0] * 2,
        [-torch.inf] * 2,
        None,
        None,
    ]
    linear = Linear(
        HeadOperands(torch.empty(0, H), torch.randn(4, H), torch.float32), torch.empty(0, dtype=torch.int64)
    )
    terms, grads = linear_rows.terms_and_grads(
        KERNELS, linear, torch.empty(0), CrossEntropy(4), Wanted(True, True, True)
    )
    assert terms.m.shape == (0,)
    assert grads.hidden_TH.shape == (0, H)
    assert torch.equal(grads.weight_VH, torch.zeros(4, H))
    assert torch.equal(grads.bias_V, torch.zeros(4))


@pytest.mark.parametrize(
    "config",
    [FusedLinearCEConfig(), FusedLinearCEConfig(logit_softcapping=5.0, reduction="none")],
    ids=["sum", "softcap-none"],
)
def test_evaluation_allocates_no_tensor_of_tokens_times_vocabulary(config):
    tokens, vocab = 300, 8000
    arguments = _arguments(tokens, vocab)
    with torch.no_grad(), Operations(arguments.values()) as seen:
        config.build(backend=EAGER)(**arguments)
    assert 0 < seen.largest <= tokens * 1536 * 4 < tokens * vocab * 4 / 2


def test_training_allocates_the_logits_of_one_block():
    # 4,096 x 20,000 float32 logits are 328 MB; the budget of a block is 48 MiB.
    arguments = _arguments(4096, 20000, ignored=0)
    with Operations(arguments.values()) as seen:
        FusedLinearCEConfig().build(backend=EAGER)(**arguments)
    assert 0 < seen.largest <= 48 << 20


def _products(call):
    """Floating-point operations of a call, in products of all tokens with the full weight."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / (2 * 60 * V * H)


def test_only_wanted_gradients_are_computed():
    arguments = _arguments(60, ignored=0)
    loss = FusedLinearCEConfig().build(backend=EAGER)
    assert _products(lambda: run(loss, arguments)) == 3
    for name in ("hidden_states", "lm_weight"):
        frozen = arguments | {name: arguments[name].detach()}
        assert _products(lambda frozen=frozen: run(loss, frozen)) == 2
    with torch.no_grad():
        assert _products(lambda: loss(**arguments)) == 1


def test_ignored_tokens_are_excluded_from_products():
    arguments = _arguments(60, ignored=0)
    arguments["labels"][torch.arange(60) % 3 != 0] = -100
    with torch.no_grad():
        arguments["hidden_states"][arguments["labels"] == -100] = torch.nan
    loss = FusedLinearCEConfig(reduction="mean").build(backend=EAGER)
    assert _products(lambda: run(loss, arguments)) == pytest.approx(1.0)
    keep = arguments["labels"] != -100
    kept = {
        "hidden_states": arguments["hidden_states"].detach()[keep].requires_grad_(),
        "labels": arguments["labels"][keep],
        "lm_weight": arguments["lm_weight"],
    }
    got, wanted = run(loss, arguments), run(loss, kept)
    assert not got["hidden_states"][~keep].any()
    assert_same(got | {"hidden_states": got["hidden_states"][keep]}, wanted, rtol=1e-6, atol=1e-8)

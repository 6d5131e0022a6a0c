"""Rows of logits in torch:eager: against float64, by blocks, and rows that are skipped."""

import numpy as np
import pytest
import torch

from helpers.operations import Operations
from helpers.torch_calls import DTYPES, assert_same, built, configs, inputs, name_of, run
from loss_core import MaskedCrossEntropyConfig
from loss_core.row_terms import CrossEntropy, RowTerms, Sums, combine
from loss_core_torch.kernels import Rows
from loss_core_torch.kernels.eager import KERNELS
from loss_core_torch.kernels.eager.sizes import SIZES

EAGER = "torch:eager"
# Three rows per block.
LARGE = (1 << 18) + 3
CROSS_ENTROPIES = [config for config in configs() if "logits" in inputs(config)]

each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
some_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def _float64(config, arguments):
    """Results of torch:plain in float64."""
    wide = {k: x.detach().double().requires_grad_() if x.requires_grad else x for k, x in arguments.items()}
    return run(built(config, "torch:plain"), wide)


@pytest.mark.parametrize("config", CROSS_ENTROPIES, ids=name_of)
@pytest.mark.parametrize("ignored", [0, 3])
@pytest.mark.parametrize("size", [((), 2), ((6,), 33), ((2, 3), 515)], ids=str)
@each_dtype
def test_loss_and_gradient_agree_with_float64(config, dtype, size, ignored):
    lead, vocab = size
    arguments = inputs(config, lead, vocab, dtype=dtype, ignored=ignored)
    got, wanted = run(built(config, EAGER), arguments), _float64(config, arguments)
    # A gradient is computed from an exponential and a sum in float32, and rounded once to the dtype.
    inner = 1e-13 if dtype == torch.float64 else 2e-6
    assert_same({"loss": got["loss"].double()}, {"loss": wanted["loss"]}, rtol=inner, atol=inner)
    torch.testing.assert_close(
        got["logits"].double(), wanted["logits"], rtol=torch.finfo(dtype).eps + 10 * inner, atol=max(inner, 1e-7)
    )
    with torch.no_grad():
        evaluated = built(config, EAGER)(**arguments)
    torch.testing.assert_close(evaluated.double(), wanted["loss"], rtol=inner, atol=inner)


@pytest.mark.parametrize("scale", [1e7, 1e12, 1e30])
def test_logits_too_large_for_a_rounded_product(scale):
    # If z log2(e) were rounded before the maximum is subtracted, no digit would be left above 2^24.
    logits = torch.tensor([[scale, scale, -scale, 0.0]], requires_grad=True)
    loss = MaskedCrossEntropyConfig().build(backend=EAGER)(logits, torch.tensor([1]))
    loss.backward()
    torch.testing.assert_close(loss.item(), float(np.log(2.0)), rtol=1e-6, atol=0)
    torch.testing.assert_close(logits.grad, torch.tensor([[0.5, -0.5, 0.0, 0.0]]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("vocab", [507, LARGE])
def test_a_row_does_not_depend_on_the_block_it_is_in(vocab):
    torch.manual_seed(0)
    logits, labels = torch.randn(7, vocab), torch.arange(7)
    loss = MaskedCrossEntropyConfig(reduction="none").build(backend=EAGER)

    def results(rows):
        return run(loss, {"logits": logits[rows].clone().requires_grad_(), "labels": labels[rows]}, 1.0)

    full = results(slice(None))
    for rows in (slice(0, 1), slice(1, 3), slice(2, 7), torch.arange(7).flip(0)):
        assert_same(results(rows), {name: x[rows] for name, x in full.items()}, rtol=0, atol=0)


@some_dtypes
def test_evaluation_allocates_no_tensor_of_tokens_times_vocabulary(dtype):
    tokens, vocab = 300, 8000
    logits, labels = torch.randn(tokens, vocab, dtype=dtype), torch.zeros(tokens, dtype=torch.int64)
    loss = MaskedCrossEntropyConfig().build(backend=EAGER)
    with torch.no_grad(), Operations((logits, labels)) as seen:
        loss(logits, labels)
    assert 0 < seen.largest <= SIZES.block_rows(vocab, logits.device) * vocab * 4 + 1024 < tokens * vocab * 4 / 2


@some_dtypes
def test_ignored_rows_are_not_read(dtype):
    labels = torch.tensor([3, -100, -100, -100, -100, 5, 7, -100])
    keep = labels != -100

    def call(rows):
        torch.manual_seed(1)
        logits = torch.randn(8, LARGE).to(dtype)
        logits[~keep] = torch.nan
        logits, loss = logits[rows].requires_grad_(), MaskedCrossEntropyConfig().build(backend=EAGER)
        with Operations() as seen:
            with torch.no_grad():
                evaluated = loss(logits, labels[rows])
            results = run(loss, {"logits": logits, "labels": labels[rows]})
        num_read = sum(rows for rows, *_ in seen.shapes("aten::amax"))
        return results | {"evaluated": evaluated}, num_read

    (found, num_read), (wanted, _) = call(slice(None)), call(keep)
    # Evaluation, and loss and gradient together.
    assert num_read == 2 * 3
    assert not found["logits"][~keep].any()
    assert_same(found | {"logits": found["logits"][keep]}, wanted, rtol=0, atol=0)
    none, _ = call(~keep)
    assert not any(x.any() for x in none.values())


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_ignored_rows_of_a_slice_may_hold_nan(reduction):
    logits = torch.randn(2, 4, 33)
    logits[:, 1] = torch.nan
    labels = torch.tensor([[3, -100, 5], [7, -100, 0]])
    logits.requires_grad_()
    loss = MaskedCrossEntropyConfig(reduction=reduction).build(backend=EAGER)(logits[:, :-1], labels)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(logits.grad).all()
    assert not logits.grad[:, 1].any()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_shards_combine_to_the_full_vocabulary(smoothing, dtype):
    torch.manual_seed(0)
    z_TV, labels_T, objective = (
        torch.randn(5, 40, dtype=dtype),
        torch.tensor([0, 12, 13, 39, 7]),
        CrossEntropy(40, smoothing),
    )
    z_TV[0, 14:] = -torch.inf
    coef_T, uniform_T = torch.linspace(-1, 1, 5, dtype=dtype), torch.linspace(0, 1, 5, dtype=dtype)
    full = KERNELS.row_terms(Rows(z_TV, labels_T, None), objective.sums)
    assert (full.z_sum is None) == (smoothing == 0)
    coefficients = CrossEntropy(40).coefficients(torch, full, [coef_T])
    coefficients = coefficients._replace(uniform=uniform_T, target=coefficients.target - uniform_T)
    combined, grads = None, []
    # A rank may own no class, or one.
    for start, stop in ((0, 13), (13, 13), (13, 14), (14, 40)):
        rows = Rows(z_TV[:, start:stop], labels_T, None, start)
        part = KERNELS.row_terms(rows, objective.sums)
        combined = part if combined is None else combine(torch, combined, part)
        grads.append(KERNELS.row_grad(rows, full, coefficients))
    for got, wanted in zip(combined, full, strict=True):
        if wanted is None:
            continue
        torch.testing.assert_close(got, wanted, rtol=2e-6, atol=1e-6)
    grad_TV = KERNELS.row_grad(Rows(z_TV, labels_T, None), full, coefficients)
    torch.testing.assert_close(torch.cat(grads, 1), grad_TV, rtol=2e-6, atol=1e-6)
    hit_TV = labels_T[:, None] == torch.arange(40)
    expected = coef_T[:, None] * (z_TV.double().softmax(-1) - hit_TV.double()) - uniform_T[:, None]
    torch.testing.assert_close(grad_TV.double(), expected, rtol=1e-5, atol=1e-6)


def test_an_empty_shard_is_the_identity():
    for sums in (Sums(), Sums(z_sum=True), Sums(e=True)):
        terms = KERNELS.row_terms(Rows(torch.empty(2, 0), torch.tensor([0, 1]), None, 5), sums)
        others = ([0.0] * 2 if is_needed else None for is_needed in sums)
        expected = RowTerms([-torch.inf] * 2, [0.0] * 2, [-torch.inf] * 2, *others)
        assert RowTerms(*(None if x is None else x.tolist() for x in terms)) == expected

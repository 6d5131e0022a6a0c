"""Rows and pairs of rows in torch:compile: results and memory."""

import pytest
import torch

from helpers.torch_calls import assert_same, run
from loss_core import KDLossConfig, MaskedCrossEntropyConfig
from loss_core.check import check
from loss_core.row_terms import CrossEntropy, combine, combine_pairs, kl_divergence
from loss_core_torch.kernels import PairCoefficients, Pairs, Rows, find
from loss_core_torch.kernels.compiled import programs
from loss_core_torch.kernels.eager.sizes import SIZES

FLAG = "torch:compile"
LOGITS_LOSSES = ["MaskedCrossEntropy", "TEParallelCrossEntropy", "KDLoss"]

pytestmark = [
    pytest.mark.skipif(not programs.status().usable, reason=programs.status().reason),
    pytest.mark.slow,
]


def _results(flag, logits, labels, reduction="none"):
    loss = MaskedCrossEntropyConfig(reduction=reduction).build(backend=flag)
    return run(loss, {"logits": logits.detach().clone().requires_grad_(), "labels": labels}, 1.0)


def test_check_passes():
    report = check(LOGITS_LOSSES, [FLAG], dtypes=["float32"])
    assert report.passed, str(report)
    assert all(row.cases >= 15 for row in report.rows)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_dtypes(dtype):
    report = check(LOGITS_LOSSES, [FLAG], dtypes=[dtype], only=["basic"])
    assert report.passed, str(report)


def test_shards_combine_to_the_full_vocabulary():
    torch.manual_seed(0)
    kernels, eager = find("compile"), find("eager")
    student, teacher, labels = torch.randn(5, 40), torch.randn(5, 40), torch.tensor([0, 12, 13, 39, 7])
    keep, coef = torch.tensor([True, True, False, True, True]), torch.linspace(-1, 1, 5)
    student[0, 14:] = teacher[0, 14:] = -torch.inf
    objective, rows = CrossEntropy(40), Rows(student, labels, None)
    full, pairs = eager.row_terms(rows, objective.sums), eager.pair_terms(Pairs(student, teacher, None, 0.5))
    coefficients, kl = objective.coefficients(torch, full, [coef]), kl_divergence(torch, pairs)
    terms, grads, pair_terms, pair_grads = None, [], None, {False: [], True: []}
    # A rank may own no class, or one.
    for start, stop in ((0, 13), (13, 13), (13, 14), (14, 40)):
        part, of_teacher = student[:, start:stop], teacher[:, start:stop]
        part_terms = kernels.row_terms(Rows(part, labels, None, start), objective.sums)
        terms = part_terms if terms is None else combine(torch, terms, part_terms)
        grads.append(kernels.row_grad(Rows(part, labels, keep, start), full, coefficients))
        part_terms = kernels.pair_terms(Pairs(part, of_teacher, None, 0.5))
        pair_terms = part_terms if pair_terms is None else combine_pairs(torch, pair_terms, part_terms)
        for by_teacher, found in pair_grads.items():
            found.append(
                kernels.pair_grad(Pairs(part, of_teacher, keep, 0.5), pairs, PairCoefficients(kl, coef, by_teacher))
            )
    expected = [
        eager.row_grad(Rows(student, labels, keep), full, coefficients),
        *(
            eager.pair_grad(Pairs(student, teacher, keep, 0.5), pairs, PairCoefficients(kl, coef, by_teacher))
            for by_teacher in pair_grads
        ),
    ]
    got = [torch.cat(found, 1) for found in (grads, *pair_grads.values())]
    torch.testing.assert_close([*terms[:3], *pair_terms, *got], [*full[:3], *pairs, *expected], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("vocab", [5000, 37])
def test_rows_of_minus_infinity_agree_with_eager(vocab):
    logits = torch.randn(6, vocab)
    logits[1] = -torch.inf
    logits[2, 1:] = -torch.inf
    logits[3] = torch.nan
    labels = torch.tensor([1, 1, 0, -100, 4, 5])
    found, wanted = (_results(flag, logits, labels) for flag in (FLAG, "torch:eager"))
    assert_same(found, wanted, rtol=1e-5, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("largest", [25.0, 1e4])
@pytest.mark.parametrize("ignored", [torch.nan, -torch.inf])
def test_a_row_whose_maximum_is_not_in_the_first_columns(largest, ignored):
    torch.manual_seed(5)
    logits, labels = torch.randn(8, 5000), torch.randint(0, 4000, (8,))
    logits[3, 4900] = largest
    logits[4, :300] = -torch.inf
    logits[5], labels[5] = ignored, -100
    wide = logits.double().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(wide, labels, reduction="none")
    wanted.sum().backward()
    got = _results(FLAG, logits, labels)
    torch.testing.assert_close(got["loss"], wanted.detach().float(), rtol=1e-6, atol=0)
    expected = torch.where((labels == -100)[:, None], 0, wide.grad).float()
    torch.testing.assert_close(got["logits"], expected, rtol=2e-5, atol=1e-30)
    with torch.no_grad():
        loss = MaskedCrossEntropyConfig(reduction="none").build(backend=FLAG)
        in_batches = loss(logits.view(2, 4, -1), labels.view(2, 4))
    torch.testing.assert_close(in_batches, wanted.detach().float().view(2, 4), rtol=1e-6, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_gradient_in_place_is_bitwise_the_same(reduction):
    # Many rows whose last columns fill no vector: the compiler may round these differently.
    labels = torch.randint(0, 45, (2, 200))
    labels[:, ::3] = -100
    full, results = torch.randn(2, 201, 45), []
    for inplace in (False, True):
        logits = full.clone().requires_grad_().clone()[:, :-1]
        loss = MaskedCrossEntropyConfig(reduction=reduction, inplace_grad=inplace).build(backend=FLAG)
        value = loss(logits, labels)
        (grad,) = torch.autograd.grad(value, logits, torch.full_like(value, -2.0))
        assert not inplace or grad.data_ptr() == logits.data_ptr()
        results.append((value.detach(), grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_single_rows_and_classes_and_strided_columns_agree_with_eager():
    for logits in (torch.randn(1, 9), torch.randn(9, 1), torch.randn(9, 4).T, torch.randn(0, 5), torch.randn(7)):
        labels = torch.zeros(logits.shape[:-1], dtype=torch.int64)
        found, wanted = (_results(flag, logits, labels) for flag in (FLAG, "torch:eager"))
        assert_same(found, wanted, rtol=1e-6, atol=1e-7)


TOKENS, VOCAB = 64, 5000


def _allocations(call):
    """Bytes of each tensor that a call allocates, including those freed and those of compiled programs."""
    call()  # compiles
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
    return [max(event.nbytes(), 0) for event in events if event.name() == "[memory]"]


def _allocated(call):
    return sum(_allocations(call))


def test_evaluation_allocates_no_tensor_of_tokens_times_vocabulary():
    logits, teacher, labels = torch.randn(TOKENS, VOCAB), torch.randn(TOKENS, VOCAB), torch.zeros(TOKENS).long()
    ce, kd = (config.build(backend=FLAG) for config in (MaskedCrossEntropyConfig(), KDLossConfig()))
    with torch.no_grad():
        assert _allocated(lambda: torch.exp(logits)) >= logits.nbytes
        assert _allocated(lambda: ce(logits, labels)) < logits.nbytes / 20
        assert _allocated(lambda: kd(logits, teacher, labels)) < logits.nbytes / 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_gradient_is_the_only_tensor_of_tokens_times_vocabulary(dtype):
    logits = torch.randn(TOKENS, VOCAB, dtype=dtype, requires_grad=True)
    labels = torch.zeros(TOKENS, dtype=torch.int64)
    loss = MaskedCrossEntropyConfig().build(backend=FLAG)
    assert _allocated(lambda: loss(logits, labels)) < 1.1 * logits.nbytes
    assert _allocated(lambda: logits.float().exp()) >= TOKENS * VOCAB * 4


@pytest.mark.parametrize(
    "config",
    [
        MaskedCrossEntropyConfig(z_loss=0.1),
        MaskedCrossEntropyConfig(logit_softcapping=5.0),
        MaskedCrossEntropyConfig(logit_softcapping=5.0, label_smoothing=0.1),
        MaskedCrossEntropyConfig(logit_softcapping=5.0, metrics=("entropy",)),
    ],
    ids=["z_loss", "softcap", "softcap-smoothing", "softcap-entropy"],
)
def test_what_the_compiler_stores_is_no_larger_than_a_block(config):
    logits = torch.randn(3 * SIZES.elements_cpu // VOCAB, VOCAB, requires_grad=True)
    labels = torch.zeros(len(logits), dtype=torch.int64)
    loss = config.build(backend=FLAG)

    def loss_and_gradient():
        result = loss(logits, labels)
        torch.autograd.grad(result[0] if config.metrics else result, logits)

    gradient, *others = sorted(_allocations(loss_and_gradient), reverse=True)
    assert gradient >= logits.nbytes
    assert others[0] <= 4 * SIZES.elements_cpu

"""Pairs of logits in torch:eager: against float64, by blocks, and rows that are skipped."""

import numpy as np
import pytest
import torch

from helpers.operations import Operations
from helpers.torch_calls import DTYPES, assert_same, run
from loss_core import KDLossConfig
from loss_core.row_terms import PairTerms, combine_pairs, kl_divergence
from loss_core_torch.kernels import PairCoefficients, Pairs
from loss_core_torch.kernels.eager import KERNELS
from loss_core_torch.kernels.eager.sizes import SIZES

EAGER = "torch:eager"
# Two rows per block: half as many as of a single tensor.
LARGE = (1 << 18) - 3

each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def _pair(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).mul_(3).to(dtype) for _ in range(2)]


def _arguments(student, teacher, labels):
    return {
        "student_logits": student.detach().requires_grad_(),
        "teacher_logits": teacher.detach().requires_grad_(),
        "labels": labels,
    }


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("ignored", [0, 3])
@pytest.mark.parametrize("size", [((), 2), ((6,), 33), ((2, 3), 515)], ids=str)
@each_dtype
def test_loss_and_both_gradients_agree_with_float64(dtype, size, ignored, temperature):
    lead, vocab = size
    student, teacher = _pair(*lead, vocab, dtype=dtype)
    labels = torch.zeros(lead, dtype=torch.int64)
    if ignored:
        labels.view(-1)[::ignored] = -100
    config = KDLossConfig(temperature=temperature)
    got = run(config.build(backend=EAGER), _arguments(student, teacher, labels))
    wanted = run(config.build(backend="torch:plain"), _arguments(student.double(), teacher.double(), labels))
    inner = 1e-13 if dtype == torch.float64 else 4e-6
    torch.testing.assert_close(got["loss"].double(), wanted["loss"], rtol=inner, atol=inner)
    for name in ("student_logits", "teacher_logits"):
        rtol = torch.finfo(dtype).eps + 10 * inner
        torch.testing.assert_close(got[name].double(), wanted[name], rtol=rtol, atol=max(inner, 1e-7))


@pytest.mark.parametrize("scale", [1e7, 1e12, 1e30])
def test_logits_too_large_for_a_rounded_product(scale):
    student, teacher = torch.tensor([[scale, scale, 0.0]], requires_grad=True), torch.tensor([[scale, 0.0, 0.0]])
    kl = KDLossConfig().build(backend=EAGER)(student, teacher, torch.tensor([0]))
    torch.testing.assert_close(kl.item(), float(np.log(2.0)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("vocab", [507, LARGE])
def test_a_pair_does_not_depend_on_the_block_it_is_in(vocab):
    student, teacher = _pair(5, vocab)
    coef_T = torch.linspace(0.5, 1.0, 5)

    def results(rows):
        pairs = Pairs(student[rows], teacher[rows], None, 0.5)
        terms, grad = KERNELS.pair_terms_and_grad(pairs, coef_T[rows])
        kl_T = kl_divergence(torch, terms)
        of_teacher = KERNELS.pair_grad(pairs, terms, PairCoefficients(kl_T, coef_T[rows], True))
        mixture = KERNELS.pair_mixture(pairs, terms, 0.3)
        to_mixture = KERNELS.pair_grad(pairs, terms, PairCoefficients(mixture.kl_s, coef_T[rows], False, 0.3))
        return {"kl": kl_T, "student": grad, "teacher": of_teacher, **mixture._asdict(), "to_mixture": to_mixture}

    full = results(slice(None))
    for rows in (slice(0, 1), slice(4, 5), slice(1, 4), torch.arange(5).flip(0)):
        assert_same(results(rows), {name: x[rows] for name, x in full.items()}, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("chunk_size", [0, 10])
def test_evaluation_allocates_no_tensor_of_tokens_times_vocabulary(dtype, chunk_size):
    tokens, vocab = 300, 8000
    student, teacher = _pair(tokens, vocab, dtype=dtype)
    labels = torch.zeros(tokens, dtype=torch.int64)
    loss = KDLossConfig(chunk_size=chunk_size).build(backend=EAGER)
    with torch.no_grad(), Operations((student, teacher, labels)) as seen:
        loss(student, teacher, labels)
    rows = chunk_size or SIZES.block_rows(2 * vocab, student.device)
    assert 0 < seen.largest <= rows * vocab * 4 + 1024 < tokens * vocab * 4 / 2


def test_ignored_pairs_are_not_read():
    labels = torch.tensor([3, -100, -100, -100, 5, -100])
    keep = labels != -100

    def call(rows):
        student, teacher = _pair(6, LARGE)
        student[~keep] = teacher[~keep] = torch.nan
        loss = KDLossConfig().build(backend=EAGER)
        arguments = _arguments(student[rows], teacher[rows], labels[rows])
        with Operations() as seen:
            results = run(loss, arguments)
        return results, sum(rows for rows, *_ in seen.shapes("aten::amax"))

    (found, num_read), (wanted, _) = call(slice(None)), call(keep)
    assert num_read == 2 * 2
    for name in ("student_logits", "teacher_logits"):
        assert not found[name][~keep].any()
        found[name] = found[name][keep]
    assert_same(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_shards_combine_to_the_full_vocabulary(temperature):
    student, teacher = _pair(5, 40)
    teacher[0, 14:] = student[0, 14:] = -torch.inf
    coef_T, inverse = torch.linspace(-1, 1, 5), 1 / temperature
    full = KERNELS.pair_terms(Pairs(student, teacher, None, inverse))
    kl_T, combined, grads = kl_divergence(torch, full), None, {False: [], True: []}
    # A rank may own no class, or one.
    for start, stop in ((0, 13), (13, 13), (13, 14), (14, 40)):
        pairs = Pairs(student[:, start:stop], teacher[:, start:stop], None, inverse)
        part = KERNELS.pair_terms(pairs)
        combined = part if combined is None else combine_pairs(torch, combined, part)
        for of_teacher, found in grads.items():
            found.append(KERNELS.pair_grad(pairs, full, PairCoefficients(kl_T, coef_T, of_teacher)))
    for got, wanted in zip(combined, full, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-6, atol=1e-6)
    for of_teacher, found in grads.items():
        expected = KERNELS.pair_grad(
            Pairs(student, teacher, None, inverse), full, PairCoefficients(kl_T, coef_T, of_teacher)
        )
        torch.testing.assert_close(torch.cat(found, 1), expected, rtol=2e-6, atol=1e-6)


def test_sums_against_the_mixture_add_up_over_shards():
    student, teacher = _pair(5, 40)
    teacher[0, 14:] = student[0, 10:] = -torch.inf
    full = Pairs(student, teacher, None, 0.5)
    terms, total = KERNELS.pair_terms(full), [torch.zeros(5), torch.zeros(5)]
    for start, stop in ((0, 13), (13, 13), (13, 14), (14, 40)):
        part = KERNELS.pair_mixture(Pairs(student[:, start:stop], teacher[:, start:stop], None, 0.5), terms, 0.2)
        total = [x + y for x, y in zip(total, part, strict=True)]
    torch.testing.assert_close(total, list(KERNELS.pair_mixture(full, terms, 0.2)), rtol=2e-6, atol=1e-6)


def test_an_empty_shard_is_the_identity():
    terms = KERNELS.pair_terms(Pairs(torch.empty(2, 0), torch.empty(2, 0), None, 1.0))
    assert PairTerms(*(x[0].item() for x in terms)) == (-torch.inf, 0.0, 0.0, -torch.inf, 0.0)


def test_student_and_teacher_may_differ_in_layout_and_dtype():
    base = torch.randn(2, 5, 11)
    student, teacher, labels = base[:, :-1], torch.randn(2, 4, 11), torch.randint(0, 11, (2, 4))
    loss = KDLossConfig().build(backend=EAGER)
    expected = run(loss, _arguments(student.contiguous(), teacher, labels))
    assert_same(run(loss, _arguments(student, teacher, labels)), expected, rtol=0, atol=0)
    # The same with a slice as the teacher.
    expected = run(loss, _arguments(teacher, student.contiguous(), labels))
    assert_same(run(loss, _arguments(teacher, student, labels)), expected, rtol=0, atol=0)
    half = run(loss, _arguments(student, teacher.bfloat16(), labels))
    assert_same(
        half,
        run(loss, _arguments(student, teacher.bfloat16().float(), labels)) | {"teacher_logits": half["teacher_logits"]},
        rtol=0, atol=0,
    )  # fmt: skip

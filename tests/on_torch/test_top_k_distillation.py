"""Distillation from K log-probabilities on torch, beyond what `check` compares."""

import pytest
import torch

from helpers.torch_calls import cells
from loss_core import KDLossConfig, TopKDistillationConfig
from loss_core.row_terms import Sums
from loss_core_torch import TopKDistillation
from loss_core_torch.kernels import Rows, find
from loss_core_torch.kernels.eager import EagerKernels
from loss_core_torch.kernels.eager.sizes import Sizes

# T = tokens, V = vocabulary, K = classes of the teacher
T, V, K = 6, 23, 5
every_flag = cells([TopKDistillationConfig()])


def _call(seed=0, dtype=torch.float32, ignored=True):
    g = torch.Generator().manual_seed(seed)
    logits, teacher = (torch.randn(T, V, generator=g, dtype=torch.float64) * 3 for _ in range(2))
    log_p, indices = teacher.log_softmax(-1).topk(K)
    labels = torch.zeros(T, dtype=torch.int64)
    if ignored:
        labels[1] = -100
    return logits.to(dtype), indices, log_p.to(dtype), labels


@every_flag
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_with_all_classes_it_equals_the_distillation_of_full_logits(flag, config, temperature):
    logits, teacher = torch.randn(T, V) * 3, torch.randn(T, V)
    logits.requires_grad_()
    labels = torch.zeros(T, dtype=torch.int64)
    order = torch.stack([torch.randperm(V) for _ in range(T)])
    log_p = (teacher / temperature).log_softmax(-1)
    loss = TopKDistillationConfig(temperature=temperature).build(backend=flag)
    got = loss(logits, order, log_p.gather(1, order), labels)
    expected = KDLossConfig(temperature=temperature).build(backend="torch:plain")(logits, teacher, labels)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(value, logits)[0] for value in (got, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


@every_flag
def test_the_order_of_the_classes_does_not_matter(flag, config):
    logits, indices, log_p, labels = _call()
    loss = TopKDistillationConfig().build(backend=flag)
    order = torch.randperm(K)
    found = []
    for at in (torch.arange(K), order):
        student, teacher = logits.clone().requires_grad_(), log_p[:, at].clone().requires_grad_()
        value = loss(student, indices[:, at], teacher, labels)
        by_student, by_teacher = torch.autograd.grad(value, (student, teacher))
        found.append((value.detach(), by_student, by_teacher[:, at.argsort()]))
    for got, expected in zip(*found, strict=True):
        assert torch.equal(got, expected)


@every_flag
def test_a_confident_student_has_a_finite_loss(flag, config):
    """The probability of the tail is 1e-30: as 1 minus the sum of the K it would be 0 in float32."""
    logits, indices, log_p, labels = _call()
    logits = logits.scatter_add(1, indices, torch.full(indices.shape, 70.0)).requires_grad_()
    loss = TopKDistillationConfig().build(backend=flag)(logits, indices, log_p, labels)
    exact = logits.detach().double().requires_grad_()
    expected = TopKDistillationConfig().build(backend="torch:plain")(exact, indices, log_p, labels)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(value, x)[0] for value, x in ((loss, logits), (expected, exact))]
    torch.testing.assert_close(grads[0].double(), grads[1], rtol=1e-4, atol=1e-6)


@every_flag
def test_a_second_backward_gives_the_same(flag, config):
    logits, indices, log_p, labels = _call()
    logits.requires_grad_()
    value = TopKDistillationConfig().build(backend=flag)(logits, indices, log_p, labels)
    first, second = (torch.autograd.grad(value, logits, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-8)


ONE, TWO, THREE = (torch.tensor([i]) for i in (1, 2, 3))
# Changes of indices and log-probabilities, and the error message of each.
BAD = {
    "outside": (lambda i, p: (i.index_fill(1, TWO, V), p), r"teacher_indices\[0, 2\] is 23, .*\[0, 23\)"),
    "negative": (lambda i, p: (i.index_fill(1, TWO, -1), p), r"teacher_indices\[0, 2\] is -1"),
    "twice": (lambda i, p: (i.index_copy(1, THREE, i[:, 1:2]), p), r"teacher_indices\[0, \d\] is \d+, which"),
    "above 0": (lambda i, p: (i, p.index_fill(1, ONE, 0.5)), r"teacher_logprobs\[0, 1\] is 0.5; .*<= 0"),
    "NaN": (lambda i, p: (i, p.index_fill(1, ONE, torch.nan)), r"teacher_logprobs\[0, 1\] is nan"),
    "sum": (lambda i, p: (i, p * 0 - 1.0), r"teacher_logprobs\[0\] sum to 1.83"),
    "K": (lambda i, p: (i[:, :3], p), r"teacher_indices has shape \(6, 3\) but teacher_logprobs has shape \(6, 5\)"),
    "lead": (lambda i, p: (i[:3], p[:3]), r"indices has shape \(3, 5\) but student_logits has leading shape \(6,\)"),
    "none": (lambda i, p: (i[:, :0], p[:, :0]), r"teacher_indices has shape \(6, 0\): .* must not be empty"),
    "more than V": (lambda i, p: (torch.arange(V + 1).expand(T, -1), p.new_full((T, V + 1), -9.0)), r"24 classes"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_an_invalid_teacher_is_refused(name):
    logits, indices, log_p, labels = _call()
    change, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        TopKDistillation()(logits, *change(indices, log_p), labels)


@pytest.mark.parametrize("name", ["outside", "twice", "above 0", "NaN", "sum"])
def test_an_invalid_teacher_is_nan_where_not_readable_and_has_no_effect_where_ignored(name):
    logits, indices, log_p, labels = _call()
    bad = BAD[name][0](indices, log_p)
    of_row = torch.arange(T)[:, None] == 1
    mixed = [torch.where(of_row, x, y) for x, y in zip(bad, (indices, log_p), strict=True)]
    loss = TopKDistillation()
    assert loss(logits, *mixed, labels).isfinite()
    program = torch.compile(loss, backend="eager", fullgraph=True)
    assert program(logits, *mixed, labels).isfinite()
    assert program(logits, *bad, labels).isnan()


@pytest.mark.parametrize(
    ("indices", "log_p", "message"),
    [
        (torch.zeros(T, K), torch.zeros(T, K), "teacher_indices must be integers of any width, got torch.float32"),
        (torch.zeros(T, K, dtype=torch.bool), torch.zeros(T, K), "integers of any width, got torch.bool"),
        (torch.zeros(T, K, dtype=torch.int32), torch.zeros(T, K).long(), "teacher_logprobs must be float32"),
        ([1], torch.zeros(T, K), "teacher_indices must be a torch.Tensor, got list"),
    ],
)  # fmt: skip
def test_types(indices, log_p, message):
    logits, *_, labels = _call()
    with pytest.raises(TypeError, match=message):
        TopKDistillation()(logits, indices, log_p, labels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_probabilities_may_sum_to_more_than_1_by_their_rounding(dtype):
    logits, teacher = torch.randn(200, 64), torch.randn(200, 64) * 2
    log_p = teacher.log_softmax(-1).to(dtype)
    assert (log_p.double().exp().sum(-1) > 1).any()
    indices = torch.arange(64).expand(200, -1)
    logits = torch.cat((logits, logits), 1)
    assert TopKDistillation()(logits, indices, log_p, torch.zeros(200, dtype=torch.int64)).isfinite()


def test_a_teacher_in_float64_makes_the_arithmetic_float64():
    logits, indices, log_p, labels = _call()
    loss = TopKDistillation()(logits.requires_grad_(), indices, log_p.double().log_softmax(-1), labels)
    assert loss.dtype == torch.float64
    assert torch.autograd.grad(loss, logits)[0].dtype == torch.float32


def test_terms_exclude_the_columns_of_the_targets():
    z_TV, labels_TK = torch.randn(T, V) * 4, torch.stack([torch.randperm(V)[:K].sort().values for _ in range(T)])
    terms = find("eager").row_terms(Rows(z_TV, labels_TK, None), Sums())
    others_TV = z_TV.scatter(1, labels_TK, -torch.inf)
    torch.testing.assert_close(terms.m + terms.s.log(), others_TV.logsumexp(-1), rtol=1e-6, atol=1e-6)
    assert torch.equal(terms.t, z_TV.gather(1, labels_TK))


def test_results_do_not_depend_on_blocks_of_rows():
    logits, indices, log_p, labels = _call()
    logits.requires_grad_()
    found = []
    for sizes in (Sizes(), Sizes(elements_cpu=2 * V)):
        value = TopKDistillation().with_kernels(EagerKernels(sizes))(logits, indices, log_p, labels)
        found.append((value.detach(), *torch.autograd.grad(value, logits)))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)

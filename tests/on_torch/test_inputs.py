"""Checks of the arguments of losses, and which tokens are valid."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from loss_core_torch import inputs
from loss_core_torch.inputs import Tokens

SHAPE, CPU = torch.Size([2, 3]), torch.device("cpu")
LABELS = torch.tensor([[1, 0, -100], [4, 2, 3]])


def tokens(labels=LABELS, *, reduction="sum", ignore_index=-100, **more):
    return inputs.tokens("logits", SHAPE, CPU, reduction, ignore_index, labels, **more)


def kept(found):
    return None if found.keep_T is None else found.keep_T.tolist()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
def test_labels_of_any_width_and_layout_become_contiguous_int64(dtype):
    found = tokens(LABELS.to(dtype).T.contiguous().T)
    assert (found.shape, found.labels_T.dtype) == (SHAPE, torch.int64)
    assert found.labels_T.is_contiguous()
    assert found.labels_T.tolist() == LABELS.flatten().tolist()
    assert kept(found) == [True, True, False, True, True, True]
    assert (found.num_tokens, found.weights_T) == (None, None)


@pytest.mark.parametrize(
    "mask", [torch.tensor([True, False, True]), torch.tensor([[1, 0, 2]]), torch.tensor([0.5, 0.0, torch.nan])]
)
def test_a_mask_of_any_dtype_marks_ignored_tokens(mask):
    assert kept(tokens(mask=mask)) == [True, False, False, True, False, True]


@pytest.mark.parametrize(
    ("labels", "ignore_index", "vocab", "all_count"),
    [
        ([0, 1, 4, 3, 2, 0], -100, 5, True),
        ([0, 1, 4, 3, 2, 0], 5, 5, True),
        ([0, 1, 4, 3, 2, 0], 0, 5, False),
        ([0, 1, 4, 3, 2, 0], 4, 5, False),
        ([0, 1, 4, 3, 2, 0], -100, 4, False),
        ([0, 1, 4, -100, 2, 0], -100, 5, False),
        ([0, 1, 4, 3, 2, 0], -100, None, False),
    ],
)
def test_no_mask_where_all_labels_are_classes(labels, ignore_index, vocab, all_count):
    labels = torch.tensor(labels).reshape(SHAPE)
    found = tokens(labels, ignore_index=ignore_index, vocab=vocab)
    assert kept(found) == (None if all_count else (labels != ignore_index).flatten().tolist())
    assert kept(tokens(labels, ignore_index=ignore_index, vocab=vocab, mask=torch.zeros(3))) == [False] * 6


@pytest.mark.parametrize(
    ("keep", "count", "settled"),
    [
        (None, None, None),
        (None, 3, None),
        (None, 0, [False] * 3),
        (None, torch.tensor(0.0), [False] * 3),
        (None, torch.tensor(2), None),
        ([True, False, True], None, [True, False, True]),
        ([True, False, True], torch.tensor(2), [True, False, True]),
        ([True, True, True], 1, None),
        ([True, False, True], 0, [False] * 3),
    ],
)
def test_keep_is_all_false_for_a_count_of_0_and_none_where_all_are_valid(keep, count, settled):
    keep_T = None if keep is None else torch.tensor(keep)
    assert kept(inputs.resolve_keep(Tokens(torch.Size([3]), torch.tensor([1, 2, 3]), keep_T, count))) == settled


def test_tokens_are_equally_weighted_only_without_options():
    plain = Tokens(torch.Size([2]), torch.tensor([1, 2]), None)
    assert inputs.equally_weighted(plain)
    ones_T = torch.ones(2)
    for change in ({"keep_T": ones_T}, {"num_tokens": 2}, {"weights_T": ones_T}, {"nan_T": ones_T}):
        assert not inputs.equally_weighted(plain._replace(**change))
    assert not inputs.equally_weighted(plain._replace(labels_T=torch.tensor([], dtype=torch.int64)))


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (
            [[1, 0, -100], [5, 2, 9]],
            r"^labels\[1, 0\] is 5, .* neither a class in \[0, 5\) nor ignore_index \(-100\)",
        ),
        ([[1, 0, -1], [4, 2, 3]], r"^labels\[0, 2\] is -1"),
    ],
)
def test_the_first_label_that_is_no_class_is_named(labels, text):
    with pytest.raises(ValueError, match=text):
        inputs.in_range(tokens(torch.tensor(labels)), 5, -100)
    ignored = tokens(torch.tensor(labels), mask=torch.tensor([[1, 1, 0], [0, 1, 0]]))
    assert inputs.in_range(ignored, 5, -100) is ignored


def test_nan_tokens_of_several_arguments_are_merged():
    plain = Tokens(torch.Size([3]), torch.tensor([1, 2, 3]), None)
    given = inputs.mark_nan(plain, torch.tensor([False, True, False]))
    assert given.nan_T.tolist() == [False, True, False]
    assert inputs.mark_nan(given, torch.tensor([True, False, False])).nan_T.tolist() == [True, True, False]


@pytest.mark.parametrize("count", [0, 3, 2.5, torch.tensor(3), torch.tensor(0.0)])
def test_a_count_is_a_number_or_a_tensor_of_no_dimensions(count):
    assert inputs.count("n", count, "sum", CPU) == count
    assert inputs.count("n", None, "mean", CPU) is None


@pytest.mark.parametrize(("number", "skip"), [(2, None), (2, True), (None, False)])
def test_the_right_number_of_valid_tokens_changes_nothing(number, skip):
    some = Tokens(torch.Size([3]), torch.tensor([1, 0, 2]), torch.tensor([True, False, True]))
    assert inputs.check_num_valid(some, number, skip) is some
    everything = some._replace(keep_T=None)
    assert inputs.check_num_valid(everything, None if number is None else 3, skip) is everything


SOME = Tokens(torch.Size([3]), torch.tensor([1, 0, 2]), torch.tensor([True, False, True]))
REFUSED = [
    (lambda: inputs.tensor("x", 3.0), TypeError, r"x must be a torch\.Tensor, got float"),
    (lambda: inputs.floats("x", LABELS), TypeError, "x must be float32, .* got torch.int64"),
    (lambda: inputs.floats("x", torch.tensor(1.0)), ValueError, "at least one dimension"),
    (lambda: inputs.not_empty("x", "end", torch.zeros(2, 0)), ValueError, r"x has shape \(2, 0\): the end must not"),
    (lambda: inputs.not_empty("x", "start", torch.zeros(0, 2), 0), ValueError, r"the start must not be empty"),
    (lambda: tokens(LABELS.float()), TypeError, "labels must be integers of any width, got torch.float32"),
    (lambda: tokens(LABELS == 0), TypeError, "got torch.bool"),
    (lambda: tokens(LABELS * 1j), TypeError, "got torch.complex64"),
    (lambda: tokens(LABELS[:1]), ValueError, r"labels has shape \(1, 3\) but logits has leading shape \(2, 3\)"),
    (lambda: tokens(mask=LABELS * 1j), TypeError, "mask must be bool, integer or float"),
    (lambda: tokens(mask=torch.ones(2)), ValueError, r"mask has shape \(2,\) but labels has shape \(2, 3\)"),
    (lambda: inputs.count("n", 3, "mean", CPU), ValueError, "n is only supported when reduction is 'sum'"),
    (lambda: inputs.count("n", torch.ones(1), "sum", CPU), ValueError, r"got a tensor of shape \(1,\)"),
    (lambda: inputs.count("n", torch.tensor(True), "sum", CPU), ValueError, "torch.bool"),
    (lambda: inputs.count("n", torch.tensor(1j), "sum", CPU), ValueError, "torch.complex64"),
    (lambda: inputs.count("n", torch.tensor(-1), "sum", CPU), ValueError, "n must be >= 0, got -1"),
    (lambda: inputs.count("n", torch.tensor(torch.nan), "sum", CPU), ValueError, "n must be >= 0, got nan"),
    (lambda: inputs.count("n", True, "sum", CPU), TypeError, "got bool"),
    (lambda: inputs.count("n", "3", "sum", CPU), TypeError, "got str"),
    (lambda: inputs.count("n", -0.5, "sum", CPU), ValueError, "n must be >= 0, got -0.5"),
    (lambda: inputs.check_num_valid(SOME, True, None), TypeError, "num_valid_tokens must be .* integer, got bool"),
    (lambda: inputs.check_num_valid(SOME, 2.0, None), TypeError, "got float"),
    (lambda: inputs.check_num_valid(SOME, 2, False), ValueError, "which skip_ignored=False forbids"),
    (lambda: inputs.check_num_valid(SOME, -1, None), ValueError, r"must be in \[0, 3\], the number of tokens, got -1"),
    (lambda: inputs.check_num_valid(SOME, 4, None), ValueError, "got 4"),
    (lambda: inputs.check_num_valid(SOME, 3, None), ValueError, "num_valid_tokens is 3, but 2 of the 3 labels"),
    (lambda: inputs.check_num_valid(SOME, 0, None), ValueError, "num_valid_tokens is 0, but 2 of the 3 labels"),
    (lambda: inputs.check_weights_have_count(1, None), ValueError, "only supported with num_batch_labels"),
    (lambda: inputs.weights(torch.ones(2, 3), SHAPE, "mean", CPU), ValueError, "loss_weights is only supported"),
    (lambda: inputs.weights(torch.ones(3), SHAPE, "sum", CPU), ValueError, r"loss_weights has shape \(3,\)"),
    (lambda: inputs.weights(LABELS == 0, SHAPE, "sum", CPU), TypeError, "must be numbers, got torch.bool"),
    (lambda: inputs.weights(LABELS * 1j, SHAPE, "sum", CPU), TypeError, "must be numbers, got torch.complex64"),
]


@pytest.mark.parametrize(("call", "kind", "text"), REFUSED)
def test_what_does_not_fit_is_refused(call, kind, text):
    with pytest.raises(kind, match=text):
        call()


def test_what_fits_is_accepted():
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert inputs.floats("x", torch.zeros(1, dtype=dtype)).dtype == dtype
    inputs.not_empty("x", "end", torch.zeros(0, 1))
    inputs.not_empty("x", "start", torch.zeros(1, 0), 0)
    for weights, count in ((None, None), (None, 3), (1, 3)):
        inputs.check_weights_have_count(weights, count)
    assert inputs.weights(None, SHAPE, "mean", CPU) is None
    assert inputs.weights(LABELS, SHAPE, "sum", CPU).tolist() == LABELS.flatten().tolist()


def test_under_a_trace_a_wrong_number_of_valid_tokens_makes_every_token_nan():
    with FakeTensorMode() as mode:
        fake = SOME._replace(labels_T=mode.from_tensor(SOME.labels_T), keep_T=mode.from_tensor(SOME.keep_T))
        assert inputs.check_num_valid(fake, 3, None).nan_T.shape == (3,)
        assert inputs.in_range(fake, 5, -100).nan_T.shape == (3,)

"""Classes that are masked by `finfo.min` instead of -inf: a very large loss, and no infinity or NaN."""

import pytest
import torch
import torch.nn.functional as F

from helpers.torch_calls import DTYPES, built, cells, configs, inputs, run, takes

DISTILLATIONS = [config for config in configs() if takes(config, "teacher_logits")]
# A sum with a loss of 3e38 overflows.
OVER_LOGITS = [config for config in configs() if takes(config, "logits")]
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def masked(x, columns, value):
    masked = x.detach().clone()
    masked[..., columns] = value
    return masked.requires_grad_()


def plain_distillation(student, teacher, keep):
    """Mean of KL(teacher || student) in float32 (float64 for float64), by its formula."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    log_s, log_t = (F.log_softmax(x.to(dtype), -1) for x in (student, teacher))
    return F.kl_div(log_s, log_t, log_target=True, reduction="none").sum(-1)[keep].mean()


@every_dtype
@pytest.mark.parametrize("columns", [[3], [0, 5, 10]], ids=["one", "three"])
@cells([config for config in DISTILLATIONS if config.divergence == "forward_kl"])
def test_a_student_masked_where_the_teacher_has_probability(flag, config, columns, dtype):
    arguments = inputs(config, dtype=dtype)
    student = masked(arguments["student_logits"], columns, torch.finfo(dtype).min)
    teacher = arguments["teacher_logits"]
    got = run(built(config, flag), arguments | {"student_logits": student}, upstream=1.0)
    expected = plain_distillation(student, teacher, arguments["labels"] != config.ignore_index)
    by_student, by_teacher = torch.autograd.grad(expected, (student, teacher))
    assert expected.isfinite()
    torch.testing.assert_close(got["loss"], expected.detach(), rtol=1e-5, atol=0)
    assert got["student_logits"].isfinite().all()
    torch.testing.assert_close(got["student_logits"], by_student, rtol=2e-2, atol=1e-4)
    if by_teacher.isfinite().all():
        assert got["teacher_logits"].isfinite().all()
        # Relative to its largest element: the loss itself enters the gradient, with 24 bits.
        torch.testing.assert_close(
            got["teacher_logits"] / by_teacher.abs().max(), by_teacher / by_teacher.abs().max(), rtol=2e-2, atol=1e-4
        )


@every_dtype
@cells(DISTILLATIONS)
def test_student_and_teacher_with_the_same_mask(flag, config, dtype):
    # With a mask on both, the result is that without these classes.
    arguments = inputs(config, dtype=dtype)
    low = torch.finfo(dtype).min
    both = {name: masked(arguments[name], [2, 7], low) for name in ("student_logits", "teacher_logits")}
    rest = [i for i in range(11) if i not in (2, 7)]
    without = {name: arguments[name].detach()[..., rest].requires_grad_() for name in both}
    loss = built(config, flag)
    labels = {"labels": torch.where(arguments["labels"] > 8, 0, arguments["labels"])}
    got, expected = run(loss, both | labels, upstream=1.0), run(loss, without | labels, upstream=1.0)
    torch.testing.assert_close(got["loss"], expected["loss"])
    for name in both:
        torch.testing.assert_close(got[name][..., rest], expected[name])
        assert not got[name][..., [2, 7]].any()


@every_dtype
@cells(DISTILLATIONS)
def test_only_the_teacher_masked(flag, config, dtype):
    arguments = inputs(config, dtype=dtype)
    low, gone = (
        {"teacher_logits": masked(arguments["teacher_logits"], [2, 7], x)} for x in (torch.finfo(dtype).min, -torch.inf)
    )
    loss = built(config, flag)
    got, expected = run(loss, arguments | low, upstream=1.0), run(loss, arguments | gone, upstream=1.0)
    for name, value in expected.items():
        assert got[name].isfinite().all()
        torch.testing.assert_close(got[name], value)


@every_dtype
@cells([config for config in OVER_LOGITS if hasattr(config, "reduction")])
def test_a_cross_entropy_whose_label_is_masked(flag, config, dtype):
    arguments = inputs(config, lead=(1,), ignored=0, dtype=dtype)
    label = int(arguments["labels"][0])
    logits = masked(arguments["logits"], [label], torch.finfo(dtype).min)
    got = run(built(config, flag), arguments | {"logits": logits}, upstream=1.0)
    wide = logits.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    expected = F.cross_entropy(wide, arguments["labels"])
    expected.backward()
    assert expected.isfinite()
    torch.testing.assert_close(got["loss"].reshape(()), expected.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(got["logits"], wide.grad.to(dtype))


@every_dtype
@cells(OVER_LOGITS)
def test_a_cross_entropy_with_other_classes_masked(flag, config, dtype):
    arguments = inputs(config, dtype=dtype)
    arguments["labels"][arguments["labels"] > 8] = 1
    loss = built(config, flag)
    low, gone = ({"logits": masked(arguments["logits"], [9, 10], x)} for x in (torch.finfo(dtype).min, -torch.inf))
    got, expected = run(loss, arguments | low), run(loss, arguments | gone)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)

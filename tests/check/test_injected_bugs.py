"""The check can fail: realistic bugs, injected into a right loss one at a time, fail its rows and no others.

Each bug is one that a user could write, in a loss that is registered in place of the right one.
"""

from dataclasses import fields, make_dataclass

import jax
import pytest
import torch
import torch.nn.functional as F

from helpers.wrong_gradients import with_gradient
from loss_core import LOSS_CONFIG_REGISTRY, register_loss, unregister_loss
from loss_core.check import assert_backends_agree, check

# Name -> (the loss it breaks, a case that must detect it, dtype, the bug): a bug is called as bug(right loss, config,
# **arguments of the call) and returns the result of the wrong loss.
BUGS = {}
JAX_BUGS = {}


def bug(loss, case, dtype="float32", bugs=BUGS):
    def enter(wrong):
        bugs[wrong.__name__] = (loss, case, dtype, wrong)
        return wrong

    return enter


@bug("MaskedCrossEntropy", "ignore-index-in-vocab")
def ignore_index_off_by_one(right, config, logits, labels):
    return right(logits, labels, mask=labels != config.ignore_index + 1)


@bug("MaskedCrossEntropy", "mean")
def mean_over_all_tokens(right, config, logits, labels):
    return right(logits, labels) * (labels != config.ignore_index).double().mean()


@bug("KDLoss", "temperature")
def missing_temperature_squared(right, config, **call):
    return right(**call) / config.temperature**2


@bug("FusedLinearCrossEntropy", "many-tokens", "bfloat16")
def weight_gradient_accumulated_in_bfloat16(right, config, hidden_states, labels, lm_weight):
    # Autograd adds the gradients of the parts in the weight's dtype.
    parts = zip(hidden_states.flatten(0, 1).split(8), labels.flatten().split(8), strict=True)
    return sum(right(hidden, label, lm_weight) for hidden, label in parts)


@bug("MaskedCrossEntropy", "ragged")
def columns_padded_with_zeros_and_not_masked(right, config, logits, labels):
    return right(F.pad(logits, (0, 5)), labels)


@bug("MaskedCrossEntropy", "none")
def first_upstream_gradient_used_for_all(right, config, logits, labels):
    return with_gradient(right(logits, labels), lambda grad: grad.flatten()[0].expand(grad.shape))


@bug("KDLoss", "basic")
def teacher_and_student_swapped(right, config, student_logits, teacher_logits, labels):
    return right(teacher_logits, student_logits, labels)


@bug("KDLoss", "same-logits")
def cross_entropy_instead_of_divergence(right, config, student_logits, teacher_logits, labels):
    log_p = teacher_logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)[labels != config.ignore_index].mean()
    return right(student_logits, teacher_logits, labels) + entropy


@bug("FusedLinearCrossEntropy", "basic")
def upstream_gradient_ignored(right, config, **call):
    return with_gradient(right(**call), torch.ones_like)


@bug("FusedLinearCrossEntropy", "softcap")
def softcap_missing_in_the_gradient(right, config, hidden_states, labels, lm_weight):
    logits = hidden_states @ lm_weight.T
    capped = config.logit_softcapping * torch.tanh(logits / config.logit_softcapping)
    logits = logits + (capped - logits).detach()
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=config.ignore_index)


@bug("MaskedCrossEntropy", "huge-logits")
def exponentials_without_the_maximum(right, config, logits, labels):
    keep = labels != config.ignore_index
    target = logits.gather(-1, torch.where(keep, labels, 0)[..., None])[..., 0]
    return (logits.exp().sum(-1).log() - target)[keep].sum()


@bug("MaskedCrossEntropy", "strided")
def strides_of_a_contiguous_tensor(right, config, logits, labels):
    return right(logits.as_strided(logits.shape, logits.contiguous().stride()), labels)


@bug("MaskedCrossEntropy", "nan-where-ignored")
def ignored_rows_multiplied_by_zero(right, config, logits, labels):
    keep = labels != config.ignore_index
    losses = F.cross_entropy(logits.flatten(0, -2), torch.where(keep, labels, 0).flatten(), reduction="none")
    return (losses * keep.flatten()).sum()


@bug("MaskedCrossEntropy", "basic", "bfloat16")
def gradient_rounded_twice(right, config, logits, labels):
    return right(with_gradient(logits, lambda grad: (grad / 3) * 3), labels)


@bug("MaskedCrossEntropy", "edge-labels")
def last_class_missed(right, config, logits, labels):
    return right(with_gradient(logits, lambda grad: grad[..., -1].zero_().new_tensor(1) * grad), labels)


@bug("KDLoss", "basic")
def no_gradient_for_the_teacher(right, config, student_logits, teacher_logits, labels):
    return right(student_logits, with_gradient(teacher_logits, torch.zeros_like), labels)


@bug("MaskedCrossEntropy", "mask")
def labels_overwritten_by_the_mask(right, config, logits, labels, mask):
    return right(logits, labels.masked_fill_(mask == 0, config.ignore_index))


@bug("MaskedCrossEntropy", "basic", "bfloat16")
def loss_returned_in_bfloat16(right, config, **call):
    return right(**call).to(torch.bfloat16)


@bug("MaskedCrossEntropy", "count")
def count_ignored(right, config, logits, labels, num_label_tokens):
    return right(logits, labels)


@bug("MaskedCrossEntropy", "basic")
def raises(right, config, **call):
    raise RuntimeError("no such kernel image")


@bug("MaskedCrossEntropy", "mean", bugs=JAX_BUGS)
def jax_mean_over_all_tokens(right, config, logits, labels):
    return right(logits, labels) * (labels != config.ignore_index).mean()


@bug("MaskedCrossEntropy", "nan-where-ignored", bugs=JAX_BUGS)
def jax_ignored_rows_multiplied_by_zero(right, config, logits, labels):
    keep = labels != config.ignore_index
    log_p = jax.nn.log_softmax(logits.astype("float32"))
    return -(jax.numpy.take_along_axis(log_p, jax.numpy.where(keep, labels, 0)[..., None], -1)[..., 0] * keep).sum()


@bug("KDLoss", "temperature", bugs=JAX_BUGS)
def jax_missing_temperature_squared(right, config, **call):
    return right(**call) / config.temperature**2


@pytest.fixture
def inject():
    """Registers a loss "Wrong": the right one with a bug, on torch or on jax."""

    def register(loss, wrong, framework="torch"):
        right_cls = LOSS_CONFIG_REGISTRY[loss]
        wrong_cls = make_dataclass("WrongConfig", (), bases=(right_cls,))

        def build_right(backend):
            return lambda c: right_cls(**{f.name: getattr(c, f.name) for f in fields(c)}).build(backend=backend)

        def build_torch(config):
            right = build_right("torch:eager")(config)

            class Wrong(torch.nn.Module):
                def forward(self, **call):
                    return wrong(right, config, **call)

            return Wrong()

        def build_jax(config):
            right = build_right("jax:xla")(config)
            return lambda **call: wrong(right, config, **call)

        builders = {"torch": build_right("torch:eager"), "jax": build_right("jax:xla")}
        register_loss("Wrong", wrong_cls, builders | {framework: build_torch if framework == "torch" else build_jax})
        return "Wrong"

    yield register
    unregister_loss("Wrong")


@pytest.mark.parametrize("name", BUGS)
def test_an_injected_bug_fails_its_row_and_no_other(name, inject):
    loss, case, dtype, wrong = BUGS[name]
    report = check(inject(loss, wrong), ["torch:eager", "jax:xla"], dtypes=[dtype], only=[case])
    rows = {(row.flag, row.against): row.passed for row in report.rows}
    assert not rows["torch:eager", "float64"], f"{name} was not detected"
    assert rows["jax:xla", "float64"], str(report)
    finding = report.failures[0]
    assert finding.case == case
    assert f"--backend torch:eager --dtype {dtype} --case {case}" in finding.reproduce


@pytest.mark.parametrize("name", JAX_BUGS)
def test_an_injected_bug_in_jax_fails_its_row_and_not_torchs(name, inject):
    loss, case, dtype, wrong = JAX_BUGS[name]
    report = check(inject(loss, wrong, "jax"), ["torch:eager", "jax:xla"], dtypes=[dtype], only=[case])
    assert {(row.flag, row.against): row.passed for row in report.rows} == {
        ("torch:eager", "float64"): True,
        ("jax:xla", "float64"): False,
        ("torch:eager", "jax:xla"): False,
    }


def test_a_bug_in_one_loss_does_not_fail_the_others(inject):
    wrong = inject("KDLoss", missing_temperature_squared)
    report = check([wrong, "KDLoss", "MaskedCrossEntropy"], ["torch:eager"], dtypes=["float32"])
    assert {row.loss for row in report.rows if not row.passed} == {"Wrong"}


def test_a_loss_that_raises_is_a_finding(inject):
    report = check(inject("MaskedCrossEntropy", raises), ["torch:eager"], dtypes=["float32"], only=["basic"])
    assert "RuntimeError: no such kernel image" in str(report)


def test_assert_backends_agree_says_what_failed(inject):
    wrong = inject("KDLoss", no_gradient_for_the_teacher)
    with pytest.raises(AssertionError, match=r"(?s)teacher_logits.*loss-core check --config"):
        assert_backends_agree(wrong, ["torch"], dtypes=["float32"])
